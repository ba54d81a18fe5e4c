"""What any build of the loss kernels must compute, against float64; the host build and the GPU run the same cases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oreal.loss import LossSettings, TokenCoefficients
from megatron_oreal.loss.kernels import Kernels, TokenResults
from megatron_oreal.loss.reference import _negative_weights, _positive_weights

SENTINEL = 777.0  # in memory that no kernel may touch

WEIGHT_SETTINGS = [
    {},
    {"correct_threshold": 0.3, "incorrect_threshold": 0.7},
    {"correct_threshold": 0.0, "incorrect_threshold": 0.0},
    {"rescale": "topk"},
    {"rescale": "topk", "correct_topk_ratio": 0.29, "incorrect_topk_ratio": 1.0},
    {"rescale": "topk", "correct_topk_ratio": 0.0, "incorrect_topk_ratio": 0.9},
]
WEIGHT_BLOCK = 512 * 4  # tokens that a block of the weight kernel takes in one round


@dataclass(frozen=True)
class Case:
    """Logits [rows, ranks · width] of which ``vocab_size`` columns count, split over ranks."""

    rows: int = 7
    width: int = 48
    ranks: int = 1
    vocab_size: int | None = None
    dtype: torch.dtype = torch.bfloat16
    temperature: float = 1.0
    scale: float = 4.0
    offset: int = 0  # elements before the first row: moves it off a 16-byte boundary
    gap: int = 0  # elements between two rows
    seed: int = 0

    @property
    def columns(self) -> int:
        return self.ranks * self.width if self.vocab_size is None else self.vocab_size

    def logits(self) -> Tensor:
        """float64 [rows, ranks · width], every value representable in dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        full = torch.randn(self.rows, self.ranks * self.width, generator=generator, dtype=torch.float64)
        return (full * self.scale).to(self.dtype).double()

    def labels(self) -> Tensor:
        """Random ones, and the first and last column of every shard that has one."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        edges = {edge for r in range(self.ranks) for edge in (r * self.width, (r + 1) * self.width - 1)}
        edges = {edge for edge in edges if edge < self.columns} | {self.columns - 1}
        labels = torch.randint(0, self.columns, (self.rows,), generator=generator)
        chosen = torch.tensor(sorted(edges))[: self.rows]
        labels[: len(chosen)] = chosen
        return labels


def shard(full: Tensor, case: Case, rank: int, device: torch.device | str) -> Tensor:
    """A rank's columns in the case's dtype, layout and alignment; everything around them is SENTINEL."""
    stride = case.width + case.gap
    memory = torch.full((case.offset + len(full) * stride + 64,), SENTINEL, dtype=case.dtype, device=device)
    view = memory.as_strided((len(full), case.width), (stride, 1), case.offset)
    view.copy_(full[:, rank * case.width : (rank + 1) * case.width].to(device))
    return view


def around(view: Tensor) -> Tensor:
    """All of the memory behind a shard that is not the shard."""
    memory = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    inside = torch.zeros(len(memory), dtype=torch.bool, device=view.device)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return memory[~inside]


def draw_coefficients(
    logp: Tensor, seed: int, *, old: bool = True, anchor: bool = True, **form: str
) -> TokenCoefficients:
    """Random coefficients, some of them 0, and every fifth row all 0; old and reference values near ``logp`` [N]."""
    rows = len(logp)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.rand(3, rows, generator=generator) * (torch.rand(3, rows, generator=generator) < 0.7)
    vectors[:, ::5] = 0
    logps = (logp + torch.randn(2, rows, generator=generator)).float()
    return TokenCoefficients(
        *vectors.unbind(), old=logps[0] if old else None, kl_anchor=logps[1] if anchor else None, **form
    )


def expected_terms(logp: Tensor, c: TokenCoefficients) -> tuple[Tensor, Tensor]:
    """(positive, negative, KL part [3, N]; derivative [N]) of the loss, by autograd in float64 from its definition."""
    logp = logp.detach().double().requires_grad_()
    old = logp.detach() if c.old is None else c.old.double()
    anchor = logp.detach() if c.kl_anchor is None else c.kl_anchor.double()
    negative = (logp - old).exp() if c.negative_form == "ratio" else logp - old
    delta = anchor - logp
    kl = {"k1": -delta, "k2": delta**2 / 2, "k3": delta.exp() - delta - 1}[c.kl_type]
    terms = torch.stack([c.positive.double() * -logp, c.negative.double() * negative, c.kl.double() * kl])
    (derivative,) = torch.autograd.grad(terms.sum(), logp)
    return terms.detach(), derivative


def forward(
    kernels: Kernels,
    shards: list[Tensor],
    labels: Tensor,
    case: Case,
    coefficients: TokenCoefficients | None = None,
    **options: Tensor,
) -> TokenResults:
    """Statistics of every shard and their combination, as the ranks of a tensor-parallel group compute them."""
    device = shards[0].device
    parts = [
        kernels.row_statistics(
            part,
            labels.to(device),
            vocab_start=rank * case.width,
            vocab_size=case.columns,
            temperature=case.temperature,
            **options,
        )
        for rank, part in enumerate(shards)
    ]
    active = options.get("active")
    return kernels.combine(torch.stack(parts), coefficients, temperature=case.temperature, active=active)


def backward_(
    kernels: Kernels, shards: list[Tensor], labels: Tensor, state: Tensor, case: Case, grad_out: float | None = None
) -> Tensor:
    """The shards' gradient in place; returns it whole, float64 on the CPU."""
    device = shards[0].device
    for rank, part in enumerate(shards):
        kernels.gradient_(
            part,
            labels.to(device),
            state,
            vocab_start=rank * case.width,
            vocab_size=case.columns,
            temperature=case.temperature,
            grad_out=None if grad_out is None else torch.tensor(grad_out, dtype=torch.float64, device=device),
        )
    return torch.cat([part.double().cpu() for part in shards], 1)


def expected_gradient(full: Tensor, labels: Tensor, derivative: Tensor, case: Case, grad_out: float = 1.0) -> Tensor:
    """g (onehot − softmax)/T in float64; the label's entry as −expm1(logp), so that it keeps its digits."""
    logp = (full[:, : case.columns] / case.temperature).log_softmax(1)
    gradient = torch.zeros_like(full)
    gradient[:, : case.columns] = -logp.exp()
    own = logp.gather(1, labels[:, None])[:, 0]
    gradient[torch.arange(len(full)), labels] = -own.expm1()
    return gradient * (derivative.double() * grad_out / case.temperature)[:, None]


def check_case(kernels: Kernels, case: Case, device: torch.device | str = "cpu") -> TokenResults:
    """Forward and backward of a case against float64; returns what forward found."""
    full, labels = case.logits(), case.labels()
    logp = (full[:, : case.columns] / case.temperature).log_softmax(1)
    own, entropy = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    coefficients = draw_coefficients(own, case.seed + 2)
    shards = [shard(full, case, rank, device) for rank in range(case.ranks)]
    found = forward(kernels, shards, labels, case, coefficients)
    tolerance = 5e-6 + 2e-6 * float(full.abs().max()) / case.temperature
    torch.testing.assert_close(found.logp.cpu().double(), own, rtol=1e-6, atol=tolerance)
    torch.testing.assert_close(found.entropy.cpu().double(), entropy, rtol=1e-6, atol=tolerance)
    terms, derivative = expected_terms(found.logp.cpu(), coefficients)
    assert found.terms is not None
    torch.testing.assert_close(found.terms.cpu(), terms, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.state[:, 2].cpu().double(), derivative, rtol=1e-6, atol=1e-7)
    assert torch.equal(found.state[:, 3], found.logp)
    gradient = backward_(kernels, shards, labels, found.state, case, 3.7)
    wanted = expected_gradient(full, labels, derivative, case, 3.7)
    error, size = float((gradient - wanted).norm()), float(wanted.norm())
    assert error <= size * (4e-3 if case.dtype == torch.bfloat16 else 2e-6 + tolerance), error / size
    check_labels_entry(gradient, wanted, labels, case)
    zero = derivative == 0
    assert zero.any()
    assert not gradient[zero].any()
    assert not gradient[:, case.columns :].any()
    for part in shards:
        assert (around(part) == SENTINEL).all()
    return found


def check_labels_entry(gradient: Tensor, wanted: Tensor, labels: Tensor, case: Case) -> None:
    """Each label's entry to the precision of its storage, however near p is to 1."""
    entry, right = (matrix.gather(1, labels[:, None])[:, 0] for matrix in (gradient, wanted))
    some = right != 0
    error = (entry - right).abs() / right.abs()
    assert (error[some] < (8e-3 if case.dtype == torch.bfloat16 else 4e-3)).all(), error


def confident_rows(probabilities: list[float], width: int, dtype: torch.dtype, temperature: float) -> Tensor:
    """Rows [len, width] float64 whose column 3 has about these probabilities; every value representable in dtype."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(len(probabilities), width, generator=generator, dtype=torch.float64)
    rows = rows.to(dtype).double()
    rows[:, 3] = -torch.inf
    others = (rows / temperature).logsumexp(1)
    odds = torch.tensor(probabilities, dtype=torch.float64)
    rows[:, 3] = (((odds / (1 - odds)).log() + others) * temperature).to(dtype).double()
    return rows


def check_confident_tokens(kernels: Kernels, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """The label's gradient where p_y is near 1: what is left after a rounding before the subtraction is noise."""
    case = Case(rows=5, width=1000, dtype=dtype, temperature=1.0)
    full = confident_rows([0.5, 0.9, 0.99, 0.999, 0.9999], case.width, dtype, case.temperature)
    labels = torch.full((5,), 3)
    coefficients = TokenCoefficients(torch.ones(5), torch.zeros(5), torch.zeros(5))
    shards = [shard(full, case, 0, device)]
    found = forward(kernels, shards, labels, case, coefficients)
    gradient = backward_(kernels, shards, labels, found.state, case)
    wanted = expected_gradient(full, labels, torch.full((5,), -1.0), case)
    assert float(wanted[4, 3].abs()) < 2e-4  # 1 − p is what the case says it is
    check_labels_entry(gradient, wanted, labels, case)


def offsets(lengths: list[int]) -> Tensor:
    """cu_seqlens int64 [S + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0)


def oracle_weights(scores: Tensor, lengths: list[int], settings: LossSettings) -> list[Tensor]:
    """(ω⁺, ω⁻) float64 [N], sequence by sequence as the oracle has them."""
    parts = [part.double() for part in scores.split(lengths)]
    return [
        torch.cat([weights(part, settings) for part in parts]) for weights in (_positive_weights, _negative_weights)
    ]


def check_weights(
    kernels: Kernels, scores: Tensor, lengths: list[int], settings: LossSettings, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The weight kernel against the oracle; returns what the kernel found, on the CPU."""
    found = kernels.token_weights(scores.to(device), offsets(lengths).to(device), settings)
    for weight, wanted in zip(found, oracle_weights(scores, lengths, settings), strict=True):
        torch.testing.assert_close(weight.cpu().double(), wanted, rtol=1e-6, atol=1e-7)
    return found[0].cpu(), found[1].cpu()


def check_weight_geometry(kernels: Kernels, mode: str, values: dict, device: torch.device | str = "cpu") -> None:
    """Lengths around the sizes of a thread's and a block's share; ties; both score dtypes."""
    block = WEIGHT_BLOCK
    lengths = [1, 3, 4, 5, 511, 512, 513, block - 1, block, block + 1, 2 * block + 7]
    scores = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(1)) * 3
    scores[13:524].round_()
    for dtype in (torch.float32, torch.bfloat16):
        check_weights(kernels, scores.to(dtype), lengths, LossSettings(mode=mode, **values), device)

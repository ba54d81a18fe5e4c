"""Random batches for the policy-loss tests: logits, labels, sequences, and the float64 result they must give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from loss_host import host_library
from torch import Tensor

from megatron_oreal.loss import LossSettings, TokenCoefficients, make_coefficients, oreal_loss_reference, token_weights


@pytest.fixture(params=["pytorch", "kernels"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The loss's passes on CPU tensors: PyTorch's, or the kernels' own source compiled for the CPU."""
    monkeypatch.setenv("OREAL_KERNELS", "0" if request.param == "pytorch" else str(host_library()))
    return str(request.param)


@dataclass
class Batch:
    """Kept sequences of one global batch; logits float64 [N, V]."""

    logits: Tensor
    labels: Tensor
    ref_logp: Tensor
    old_logp: Tensor
    scores: Tensor
    lengths: list[int]
    rewards: list[int]
    advantages: list[float]
    pass_rates: list[float]
    temperature: float

    def coefficients(
        self, settings: LossSettings, *, with_old: bool, sequences: slice = slice(None)
    ) -> TokenCoefficients:
        """Coefficients of some of the sequences, normalised by the whole batch."""
        first = sum(self.lengths[: sequences.start or 0])
        lengths = self.lengths[sequences]
        tokens = slice(first, first + sum(lengths))
        count = {sign: sum(n for n, r in zip(self.lengths, self.rewards, strict=True) if r == sign) for sign in (1, -1)}
        return make_coefficients(
            lengths,
            self.rewards[sequences],
            self.advantages[sequences],
            settings,
            num_positive_tokens=count[1],
            num_negative_tokens=count[-1],
            num_tokens=sum(self.lengths),
            weights=token_weights(self.scores[tokens], lengths, settings),
            ref_logp=self.ref_logp[tokens],
            old_logp=self.old_logp[tokens] if with_old else None,
            pass_rates=self.pass_rates[sequences],
        )

    def expected(self, settings: LossSettings, *, with_old: bool, vocab_size: int) -> tuple[Any, Tensor, Tensor]:
        """(oracle's losses, its gradient in the logits through log_softmax, logp), all float64."""
        logits = self.logits.clone().requires_grad_()
        logp = (logits[:, :vocab_size] / self.temperature).log_softmax(-1).gather(1, self.labels[:, None])[:, 0]
        values = {name: getattr(settings, name) for name in vars(LossSettings()) if name != "mode"}
        loss = oreal_loss_reference(
            logp,
            self.ref_logp.double(),
            self.scores.double(),
            self.lengths,
            self.rewards,
            self.advantages,
            mode=settings.mode,
            old_logp=self.old_logp.double() if with_old else None,
            pass_rates=self.pass_rates,
            **values,
        )
        loss.total.backward()
        assert logits.grad is not None
        return loss, logits.grad, logp.detach()


def draw_batch(
    seed: int,
    *,
    sequences: int = 7,
    width: int = 48,
    vocab_size: int = 48,
    temperature: float = 1.0,
    scale: float = 2.0,
) -> Batch:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (sequences,), generator=g).tolist()
    n = sum(lengths)
    logits = (torch.randn(n, width, generator=g) * scale).bfloat16().double()  # representable in every logits dtype
    labels = torch.randint(0, vocab_size, (n,), generator=g)
    logp = (logits[:, :vocab_size] / temperature).log_softmax(-1).gather(1, labels[:, None])[:, 0].float()
    rewards = [1, -1, *(torch.randint(0, 2, (max(sequences - 2, 0),), generator=g) * 2 - 1).tolist()][:sequences]
    return Batch(
        logits=logits,
        labels=labels,
        ref_logp=logp + torch.randn(n, generator=g) * 0.3,
        old_logp=logp + torch.randn(n, generator=g) * 0.2,
        scores=torch.randn(n, generator=g) * 2,
        lengths=lengths,
        rewards=rewards,
        advantages=[r * float(torch.rand((), generator=g) + 0.1) for r in rewards],
        pass_rates=torch.rand(sequences, generator=g).tolist(),
        temperature=temperature,
    )


def plain(n: int, positive: float = 0.0, negative: float = 0.0, kl: float = 0.0, **fields: Any) -> TokenCoefficients:
    """The same coefficients for n tokens."""
    values = {"positive": positive, "negative": negative, "kl": kl}
    return TokenCoefficients(**{k: torch.full((n,), v) for k, v in values.items()}, **fields)


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of its own storage that requires grad."""
    return tensor.to(dtype, copy=True).requires_grad_()

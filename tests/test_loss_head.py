"""The vocabulary head in chunks: the same numbers as whole, bounded memory, and Megatron's gradients stay right."""

import os

import pytest
import torch
import torch.nn.functional as F
from actor_cases import make_config, make_model, make_sequences
from dist import run_ranks
from live_bytes import LiveBytes
from loss_cases import passes  # noqa: F401
from loss_host import host_library

from megatron_oreal.actor import head
from megatron_oreal.actor.actor import Actor
from megatron_oreal.actor.parallel import destroy_parallel, init_parallel
from megatron_oreal.errors import UserError
from megatron_oreal.layout import load_model_spec
from megatron_oreal.loss import (
    TokenCoefficients,
    Vocabulary,
    auto_chunk_tokens,
    chunked,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from megatron_oreal.platform import init_distributed, shutdown_distributed

N, HIDDEN, WIDTH, CHUNK = 50, 16, 40, 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few tokens; the rule of 2048 is tested by itself."""
    monkeypatch.setattr(chunked, "LEAST_TOKENS", 4)


# --- which chunks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2048, 2049, 3000, 4096, 6144, 100_000])
def test_chunks_cover_all_tokens_and_none_is_under_2048_unless_fewer_remain_in_all(monkeypatch, limit):
    monkeypatch.setattr(chunked, "LEAST_TOKENS", 2048)
    for count in [*range(8), 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8193, 12288, 12289, 16384, 32768, 65537]:
        slices = chunked.chunk_slices(count, limit)
        sizes = [rows.stop - rows.start for rows in slices]
        assert [i for rows in slices for i in range(rows.start, rows.stop)] == list(range(count))
        assert all(size >= min(2048, count) for size in sizes)
        if limit >= 4096 or count <= limit:
            assert all(size <= limit for size in sizes)
        assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_the_automatic_chunk_holds_four_gibibytes_of_logits():
    for columns, itemsize in ((152064, 2), (152064, 4), (19008, 2), (32000, 2)):
        tokens = auto_chunk_tokens(columns, itemsize)
        assert tokens % 1024 == 0
        assert tokens * columns * itemsize <= 4 * 2**30 < (tokens + 1024) * columns * itemsize
    assert auto_chunk_tokens(2_000_000, 4) == chunked.LEAST_TOKENS


# --- the same numbers ------------------------------------------------------------------------------------------------


def draw(dtype, n=N):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, HIDDEN, generator=g).to(dtype)
    weight = (torch.randn(WIDTH, HIDDEN, generator=g) * 0.5).to(dtype)
    labels = torch.randint(0, WIDTH - 3, (n,), generator=g)
    logp = (hidden.double() @ weight.double().t())[:, : WIDTH - 3].log_softmax(-1).gather(1, labels[:, None])[:, 0]
    positive, negative, kl = torch.rand(3, n, generator=g)
    positive[::5] = negative[::5] = kl[::5] = 0
    old, ref = logp.float() + torch.randn(2, n, generator=g) * 0.2
    coefficients = TokenCoefficients(positive, negative, kl, old, ref)
    return hidden, weight, labels, coefficients, Vocabulary(WIDTH - 3, 0.8)


def leaf(tensor, *, main_grad=False):
    parameter = torch.nn.Parameter(tensor.clone())
    if main_grad:
        parameter.main_grad = torch.full(tensor.shape, 0.25)  # of earlier micro-batches
    return parameter


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize(("upstream", "announced"), [(1.0, 1.0), (1.0, None), (3.7, 3.7), (3.7, None)])
@pytest.mark.parametrize("monitor", [False, True])
def test_chunks_give_the_numbers_of_the_whole_head(dtype, main_grad, upstream, announced, monitor):
    hidden, weight, labels, coefficients, vocabulary = draw(dtype)
    x, w = leaf(hidden), leaf(weight)
    logits = F.linear(x, w)
    whole = policy_loss(logits, labels, coefficients, **vars(vocabulary), monitor=monitor)
    (upstream * whole.total).backward()
    cx, cw = leaf(hidden), leaf(weight, main_grad=main_grad)
    parts = linear_policy_loss(
        cx, cw, labels, coefficients, vocabulary, chunk_tokens=CHUNK, upstream=announced, monitor=monitor
    )
    (upstream * parts.total).backward()
    for name in ("total", "positive", "negative", "kl", "logp", "entropy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=2e-6, atol=2e-6)
    if main_grad:
        assert not cw.grad.any()  # what DistributedDataParallel adds
        weight_gradient = cw.main_grad - 0.25
    else:
        weight_gradient = cw.grad
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5  # bf16: the whole head rounds the weight's gradient
    assert (cx.grad.double() - x.grad.double()).norm() <= tolerance * x.grad.double().norm()
    assert (weight_gradient.double() - w.grad.double()).norm() <= tolerance * w.grad.double().norm()


def test_bf16_weight_gradients_are_summed_in_float32():
    """Over many chunks the sum is closer to float64 than one bf16 rounding of it."""
    hidden, weight, labels, coefficients, vocabulary = draw(torch.bfloat16, n=400)
    w = leaf(weight)
    w.main_grad = torch.zeros(weight.shape)
    linear_policy_loss(hidden, w, labels, coefficients, vocabulary, chunk_tokens=CHUNK, upstream=1.0).total.backward()
    logits = F.linear(hidden, weight).requires_grad_()  # bf16, as the head makes them
    policy_loss(logits, labels, coefficients, **vars(vocabulary)).total.backward()
    exact = logits.grad.double().t() @ hidden.double()
    assert (w.main_grad.double() - exact).norm() <= 1e-5 * exact.norm()
    assert (exact.bfloat16().double() - exact).norm() > 1e-3 * exact.norm()


@pytest.mark.usefixtures("passes")
def test_a_logprob_pass_in_chunks_gives_the_same_numbers():
    hidden, weight, labels, _, vocabulary = draw(torch.bfloat16)
    found = linear_token_logprobs(hidden, weight, labels, vocabulary, chunk_tokens=CHUNK)
    expected = token_logprobs(F.linear(hidden, weight), labels, **vars(vocabulary))
    for ours, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("announced", [1.0, None])
def test_gradcheck_of_hidden_and_weight(announced):
    hidden, weight, labels, coefficients, vocabulary = draw(torch.float64, n=9)
    hidden, weight = hidden[:, :3].clone().requires_grad_(), weight[:, :3].clone().requires_grad_()
    moved = [v.double() for v in coefficients.vectors().values()]

    class Fresh(torch.autograd.Function):  # gradcheck asks for many backwards of one forward
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return total(x, w)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                inputs = [t.clone().requires_grad_() for t in ctx.saved_tensors]
                out = total(*inputs)
            with torch.no_grad():
                return torch.autograd.grad(out, inputs, grad)

    def total(x, w):
        terms = TokenCoefficients(*moved)
        return linear_policy_loss(x, w, labels, terms, vocabulary, chunk_tokens=4, upstream=announced).total

    assert torch.autograd.gradcheck(Fresh.apply, (hidden, weight))


def test_no_token_makes_no_chunk_and_zero_gradients():
    hidden, weight, _, _, vocabulary = draw(torch.float32)
    none = torch.zeros(0)
    x, w = leaf(hidden[:0]), leaf(weight, main_grad=True)
    loss = linear_policy_loss(
        x, w, torch.zeros(0, dtype=torch.int64), TokenCoefficients(none, none, none), vocabulary, chunk_tokens=CHUNK,
        upstream=1.0,
    )  # fmt: skip
    loss.total.backward()
    assert float(loss.total.detach()) == 0.0
    assert x.grad.shape == (0, HIDDEN)
    assert torch.equal(w.main_grad, torch.full_like(w.main_grad, 0.25))


def test_a_forward_without_gradient_leaves_main_grad():
    hidden, weight, labels, coefficients, vocabulary = draw(torch.float32)
    w = leaf(weight, main_grad=True)
    with torch.no_grad():
        linear_policy_loss(hidden, w, labels, coefficients, vocabulary, chunk_tokens=CHUNK, upstream=1.0)
    assert torch.equal(w.main_grad, torch.full_like(w.main_grad, 0.25))


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_an_upstream_gradient_that_was_not_announced_is_an_error():
    hidden, weight, labels, coefficients, vocabulary = draw(torch.float32)
    w = leaf(weight, main_grad=True)
    total = linear_policy_loss(hidden, w, labels, coefficients, vocabulary, chunk_tokens=CHUNK, upstream=1.0).total
    with pytest.raises(RuntimeError, match=r"upstream=1.0 was announced, but total's gradient is another, 2.0"):
        (2 * total).backward()
    with pytest.raises(UserError, match="upstream is 0"):
        linear_policy_loss(hidden, w, labels, coefficients, vocabulary, chunk_tokens=CHUNK, upstream=0.0)


@pytest.mark.parametrize("announced", [1.0, None])
def test_a_second_backward_is_refused(announced):
    hidden, weight, labels, coefficients, vocabulary = draw(torch.float32)
    w = leaf(weight, main_grad=True)
    total = linear_policy_loss(
        hidden, w, labels, coefficients, vocabulary, chunk_tokens=CHUNK, upstream=announced
    ).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward"):
        total.backward()


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    hidden, weight, labels, coefficients, vocabulary = draw(torch.float32)
    for change, message in (
        ({"hidden": hidden[:, :8]}, "must be \\[N, H\\] and \\[V/tp, H\\]"),
        ({"hidden": hidden.bfloat16()}, "both must be bfloat16, float32 or float64"),
        ({"labels": labels[1:]}, "labels is torch.int64"),
        ({"vocabulary": Vocabulary(WIDTH + 1)}, "vocab_size is 41"),
        ({"labels": labels + WIDTH}, "outside the vocabulary"),
    ):
        arguments = {"hidden": hidden, "weight": weight, "labels": labels, "coefficients": coefficients}
        with pytest.raises(UserError, match=message):
            linear_policy_loss(**arguments | {"vocabulary": vocabulary} | change, chunk_tokens=CHUNK)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [1.0, None])
def test_logits_of_one_chunk_live_at_a_time(announced):
    n, width, hidden_size, chunk = 1024, 2048, 32, 64
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, hidden_size, generator=g).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(torch.randn(width, hidden_size, generator=g).bfloat16())
    weight.main_grad = torch.zeros(weight.shape)
    labels = torch.randint(0, width, (n,), generator=g)
    ones, zeros = torch.ones(n), torch.zeros(n)
    with LiveBytes() as watched:
        linear_policy_loss(
            hidden, weight, labels, TokenCoefficients(ones, zeros, zeros), Vocabulary(width), chunk_tokens=chunk,
            upstream=announced,
        ).total.backward()  # fmt: skip
    chunk_logits = chunk * width * 2
    passes_scratch = 3 * chunk * width * 4  # the passes' row chunks: here a whole chunk of the head
    vectors, hidden_gradient, zeros_for_autograd = 40 * n * 8, n * hidden_size * 2, width * hidden_size * 2
    conversions = 2 * chunk * width * 4  # of the weight gradient's products, on a CPU
    bound = chunk_logits + passes_scratch + conversions + vectors + hidden_gradient + zeros_for_autograd
    assert chunk_logits < watched.peak <= bound
    assert bound < n * width * 2  # the whole logits would be more


# --- in Megatron's models --------------------------------------------------------------------------------------------


LAYOUTS = {  # model, parallel sizes, passes
    "TP2": ("qwen3", {"tensor_model_parallel_size": 2}, "pytorch"),
    "TP2-SP-tied": ("qwen2-tied", {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "kernels"),
    "DP2-overlap": ("qwen3", {"overlap_grad_reduce": True, "max_tokens_per_microbatch": 64}, "pytorch"),
    "DP2-overlap-tied": ("qwen2-tied", {"overlap_grad_reduce": True, "max_tokens_per_microbatch": 64}, "pytorch"),
    "PP2-tied": ("qwen2-tied", {"pipeline_model_parallel_size": 2, "max_tokens_per_microbatch": 64}, "pytorch"),
}
CHUNK_TOKENS = 30  # of micro-batches of 64 packed tokens most have more response tokens, some fewer


def train(runs, models, work_dir, kernels, chunk_tokens):
    """By run: the numbers of three updates, and how many micro-batches went through which head on this rank."""
    chunked.LEAST_TOKENS = 8
    counts = {}
    for name in ("policy_loss", "linear_policy_loss", "linear_token_logprobs"):
        original = getattr(head, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            counts[_name] = counts.get(_name, 0) + 1
            return _original(*args, **kwargs)

        setattr(head, name, counted)
    platform = init_distributed("cpu", 300)
    results = {}
    for run, (model, parallel, which) in runs.items():
        os.environ["OREAL_KERNELS"] = kernels if which == "kernels" else "0"
        counts.clear()
        config = make_config(models[model], work_dir, parallel | {"loss_chunk_tokens": chunk_tokens})
        grid = init_parallel(config.parallel, platform)
        actor = Actor(config, load_model_spec(models[model]), grid, platform)
        actor.load_hf()
        steps = [actor.update(make_sequences(10), step) for step in range(3)]
        results[run] = [s.sums.values | {"policy_norm": s.policy_grad_norm} for s in steps], dict(counts)
        destroy_parallel()
    shutdown_distributed()
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(runs on one rank with the whole head by model, runs on each of two ranks with chunks by layout)."""
    folder = tmp_path_factory.mktemp("head")
    models = {name: make_model(name, folder) for name in ("qwen2-tied", "qwen3")}
    arguments = {"models": models, "work_dir": folder, "kernels": str(host_library())}
    alone = {name: (name, {}, "pytorch") for name in models}
    whole = run_ranks("test_loss_head:train", 1, arguments | {"runs": alone, "chunk_tokens": 10_000})[0]
    return whole, run_ranks("test_loss_head:train", 2, arguments | {"runs": LAYOUTS, "chunk_tokens": CHUNK_TOKENS})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_updates_with_chunks_are_those_of_the_whole_head(layout, trained):
    whole, ranks = trained
    expected, counts = whole[LAYOUTS[layout][0]]
    assert counts.keys() == {"policy_loss"}
    for numbers, _ in (rank[layout] for rank in ranks):
        for found, alone in zip(numbers, expected, strict=True):
            for key, value in alone.items():
                assert found[key] == pytest.approx(value, rel=2e-4, abs=1e-7), key
    last_stages = ranks[1:] if "PP2" in layout else ranks
    for _, counts in (rank[layout] for rank in last_stages):
        assert counts["linear_policy_loss"]
        assert counts["linear_token_logprobs"]
    if "overlap" in layout:  # micro-batches with and without chunks add to the same gradients
        assert any(rank[layout][1].get("policy_loss") for rank in ranks)

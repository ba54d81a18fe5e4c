"""Token weights over packed sequences, PyTorch's and the kernels', against the oracle's arithmetic in Python floats."""

import math

import pytest
import torch
from loss_cases import passes  # noqa: F401

from megatron_oreal.errors import UserError
from megatron_oreal.loss import LossSettings, oreal_loss_reference, token_weights
from megatron_oreal.loss.segments import Segments

pytestmark = pytest.mark.usefixtures("passes")


def draw_lengths(generator, count, longest):
    return torch.randint(1, longest + 1, (count,), generator=generator).tolist()


def oracle_weights(scores, lengths, settings):
    """(ω⁺, ω⁻) read off the oracle: with unit factors, logp = 0 and A = ∓1, ∂loss/∂logp_t is ∓ω_t/N of its sign."""
    result = []
    for sign in (1, -1):
        logp = torch.zeros(len(scores), dtype=torch.float64, requires_grad=True)
        loss = oreal_loss_reference(
            logp,
            logp.detach(),
            scores.double(),
            lengths,
            [sign] * len(lengths),
            [float(sign)] * len(lengths),
            mode=settings.mode,
            pass_rates=[0.0] * len(lengths),
            rescale=settings.rescale,
            correct_threshold=settings.correct_threshold,
            incorrect_threshold=settings.incorrect_threshold,
            correct_topk_ratio=settings.correct_topk_ratio,
            incorrect_topk_ratio=settings.incorrect_topk_ratio,
            negative_loss_factor=1.0,
            kl_coef=0.0,
        )
        result.append(torch.autograd.grad(loss.total, logp)[0] * -sign * len(scores))
    return result


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize(
    "rescaling",
    [
        {},
        {"correct_threshold": 0.3, "incorrect_threshold": 0.7},
        {"correct_threshold": 0.0, "incorrect_threshold": 0.0},
        {"rescale": "topk"},
        {"rescale": "topk", "correct_topk_ratio": 0.29, "incorrect_topk_ratio": 1.0},
        {"rescale": "topk", "correct_topk_ratio": 0.0, "incorrect_topk_ratio": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_packed_weights_equal_the_oracles(mode, rescaling, seed):
    generator = torch.Generator().manual_seed(seed)
    settings = LossSettings(mode=mode, **rescaling)
    lengths = [*draw_lengths(generator, 12, 40), 1, 100, 1]  # 100 · 0.29 is 28.999… in binary: the floor is 28 for both
    scores = torch.randn(sum(lengths), generator=generator) * 3
    scores[: lengths[0]] = 0.7  # a whole sequence of equal scores
    scores[lengths[0] : lengths[0] + lengths[1]].round_()  # ties
    positive, negative = token_weights(scores, lengths, settings)
    assert positive.dtype == negative.dtype == torch.float32
    for found, expected in zip((positive, negative), oracle_weights(scores, lengths, settings), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_weights_of_a_three_token_sequence_worked_by_hand():
    # running means of (2, 0, -5): 2, 1, -1; σ = 0.8808, 0.7311, 0.2689
    scores = torch.tensor([2.0, 0.0, -5.0])
    positive, negative = token_weights(scores, [3], LossSettings())
    torch.testing.assert_close(positive, torch.tensor([2 * 0.880797 - 1, 2 * 0.731059 - 1, 0.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(negative, torch.tensor([0.0, 0.0, 1 - 2 * 0.268941]), rtol=1e-5, atol=0)
    # top 2 of 3: the better is 1, the worse 0
    positive, negative = token_weights(
        scores, [3], LossSettings(rescale="topk", correct_topk_ratio=0.7, incorrect_topk_ratio=0.7)
    )
    assert positive.tolist() == [1.0, 0.0, 0.0]
    assert negative.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("value", [0.0, 0.1, -2.3])
def test_topk_of_equal_scores_chooses_the_earliest_tokens_with_weight_one(value):
    settings = LossSettings(rescale="topk", correct_topk_ratio=0.5, incorrect_topk_ratio=0.25)
    lengths = [5, 1, 1000]
    positive, negative = token_weights(torch.full((1006,), value), lengths, settings)
    assert positive.tolist() == [1, 1, 0, 0, 0] + [0] + [1] * 500 + [0] * 500
    assert negative.tolist() == [1, 0, 0, 0, 0] + [0] + [1] * 250 + [0] * 750


def test_a_long_pack_keeps_the_precision_of_each_sequence():
    # A large sequence first: a float32 cumulative sum over the pack minus an offset loses the small one after it.
    generator = torch.Generator().manual_seed(0)
    lengths = [16384, 16384, 1, 16384, 40000, 10847]
    scores = torch.randn(sum(lengths), generator=generator)
    scores[:16384] += 3e4
    segments = Segments.of(lengths, len(scores), scores.device)
    start, worst_naive, worst = 0, 0.0, 0.0
    naive = scores.cumsum(0)
    sums = segments.cumulative_sum(scores.double())
    for n in lengths:
        part = scores[start : start + n].double().tolist()
        for t in {0, 1, n // 3, n - 1} & set(range(n)):
            exact = math.fsum(part[: t + 1])
            worst = max(worst, abs(float(sums[start + t]) - exact))
            offset = float(naive[start - 1]) if start else 0.0
            worst_naive = max(worst_naive, abs(float(naive[start + t]) - offset - exact) / (t + 1))
        start += n
    assert worst < 1e-6
    assert worst_naive > 1.0  # the trap is real: running means wrong by more than 1


def test_weights_do_not_depend_on_what_else_is_in_the_pack():
    generator = torch.Generator().manual_seed(3)
    lengths = draw_lengths(generator, 20, 60)
    scores = torch.randn(sum(lengths), generator=generator)
    for settings in (LossSettings(), LossSettings(rescale="topk"), LossSettings(mode="paper")):
        packed = token_weights(scores, lengths, settings)
        single = [token_weights(part, [len(part)], settings) for part in scores.split(lengths)]
        for found, parts in zip(packed, zip(*single, strict=True), strict=True):
            assert torch.equal(found, torch.cat(parts))


def test_weights_are_detached_and_accept_bf16_scores_and_tensor_lengths():
    scores = torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16, requires_grad=True)
    cu_seqlens = torch.tensor([0, 1, 3], dtype=torch.int32)
    positive, negative = token_weights(scores, cu_seqlens.diff(), LossSettings())
    assert not positive.requires_grad
    assert not negative.requires_grad
    assert torch.equal(positive, token_weights(scores.detach().float(), [1, 2], LossSettings())[0])


def test_an_empty_pack_has_no_weights():
    for rescale in ("threshold", "topk"):
        positive, negative = token_weights(torch.zeros(0), [], LossSettings(rescale=rescale))
        assert positive.shape == negative.shape == (0,)


def test_a_nan_score_is_not_hidden_and_leaves_its_sequence_no_top():
    scores = torch.tensor([0.5, float("nan"), 1.0, 2.0])
    for rescale in ("threshold", "topk"):
        for weights in token_weights(scores, [3, 1], LossSettings(rescale=rescale)):
            assert weights[1:3].isnan().all()
            assert rescale == "threshold" or weights[0].isnan()
            assert not weights[3].isnan()


def test_no_python_loop_over_sequences():
    """As many tensor operations for 500 sequences as for 5."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    for settings in (LossSettings(), LossSettings(rescale="topk")):
        counts = []
        for sequences in (5, 500):
            with Counter() as counter:
                token_weights(torch.randn(sequences * 8), [8] * sequences, settings)
            counts.append(counter.count)
        assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("lengths", [[2, 2], [5, 0], [6, -1], []])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(UserError, match="lengths sum to"):
        token_weights(torch.zeros(5), lengths, LossSettings())
    with pytest.raises(UserError, match="1-D"):
        token_weights(torch.zeros(5, 1), lengths, LossSettings())

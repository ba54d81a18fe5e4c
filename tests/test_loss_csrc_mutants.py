"""Mistakes that such kernels are known to make, put into a copy of the source: the checks must notice each of them."""

import shutil

import pytest
import torch
from kernel_cases import Case, backward_, check_case, check_confident_tokens, draw_coefficients, forward, shard
from loss_host import HOST_SOURCE, compile_host, host_kernels

from megatron_oreal.loss import LossSettings
from megatron_oreal.loss.kernels import Kernels
from megatron_oreal.loss.nvcc import CSRC


def label_gradient(kernels):
    check_confident_tokens(kernels, torch.bfloat16)


def nan_is_seen(kernels):
    case = Case(rows=1, width=64, dtype=torch.float32)
    full = case.logits()
    full[0, 9] = torch.nan
    assert forward(kernels, [shard(full, case, 0, "cpu")], torch.tensor([3]), case).logp.isnan()


def many_rounds(kernels):
    check_case(kernels, Case(width=4500))


def many_shards(kernels):
    check_case(kernels, Case(width=300, ranks=4, vocab_size=1100))


def large_offset(kernels):
    case = Case(rows=2, width=500, dtype=torch.float32, temperature=0.7)
    full = (case.logits() + 2.0**14).float().double()
    labels = case.labels()
    found = forward(kernels, [shard(full, case, 0, "cpu")], labels, case)
    logp = (full / 0.7).log_softmax(1)
    torch.testing.assert_close(found.logp.double(), logp.gather(1, labels[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), -(logp.exp() * logp).sum(1), rtol=0, atol=1e-5)


def masked_columns(kernels):
    case = Case(rows=1, width=64)
    full = case.logits()
    full[0, 8:40] = -torch.inf
    assert forward(kernels, [shard(full, case, 0, "cpu")], torch.tensor([3]), case).entropy.isfinite().all()


def equal_scores(kernels):
    for value in (0.1, 0.7, -2.3):
        scores, cu_seqlens = torch.full((3000,), value), torch.tensor([0, 3000])
        plus, _ = kernels.token_weights(scores, cu_seqlens, LossSettings(rescale="topk"))
        # One bool: a list's difference is exponential to print where CI is set, which asks pytest for all of it.
        assert (plus[:1500] == 1).all() and (plus[1500:] == 0).all()


def pack_neighbours(kernels):
    scores = torch.cat([torch.full((3000,), 9.0), torch.full((5,), -9.0)])
    plus, minus = kernels.token_weights(scores, torch.tensor([0, 3000, 3005]), LossSettings())
    assert (plus[3000:] == 0).all() and (minus[3000:] > 0.9).all()


MUTANTS = {
    "one subtracted after rounding to bf16": (
        "oreal_core.h",
        "return -r.factor * expm1f(r.logp);",
        "return r.factor * (1.f - bits_float(round_bf16x2(expf(r.logp), 0.f) << 16));",
        label_gradient,
    ),
    "maximum that hides a NaN": (
        "oreal_core.h",
        "(a != a || b != b) ? NAN : (a > b ? a : b)",
        "(a > b ? a : b)",
        nan_is_seen,
    ),
    "sums not rescaled to the new maximum": ("oreal_core.h", "fmaf(c, s.t, d0 * shift)", "s.t", many_rounds),
    "weighted sum merged without its shift": (
        "oreal_core.h",
        "fmaf(ca, a.t, ad * da) + fmaf(cb, b.t, bd * db)",
        "ca * a.t + cb * b.t",
        many_rounds,
    ),
    "temperature applied before the subtraction": (
        "oreal_core.h",
        "const float ea = exp2_fast(a * s2), eb = exp2_fast(b * s2);",
        "const float ms = m * s2, ea = exp2_fast(v[u].first(i) * s2 - ms), eb = exp2_fast(v[u].second(i) * s2 - ms);",
        large_offset,
    ),
    "masked columns not kept finite": ("oreal_core.h", "    v[u].floor();\n", "", masked_columns),
    "remainder of the row forgotten": ("oreal_rows.h", "if (g < groups) {  //", "if (false) {  //", many_rounds),
    "last columns of the row forgotten": ("oreal_rows.h", "if (rest != 0 &&", "if (false &&", many_rounds),
    "padding takes part": (
        "oreal_api.h", "std::min(std::max<int64_t>(x.vocab_size - x.vocab_start, 0), x.width)", "x.width", many_shards),
    "shards' statistics added as they are": (
        "oreal_tokens.h", "scale = exp(shift / a.temperature);", "scale = 1.;", many_shards),
    "later of equal values chosen": (
        "oreal_tokens.h", "equal == static_cast<double>(chosen)", "equal >= static_cast<double>(chosen)", equal_scores),
    "scan runs on into the next sequence": (
        "oreal_tokens.h", "const int64_t start = w.cu_seqlens[sequence],", "const int64_t start = w.cu_seqlens[0],",
        pack_neighbours),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_notice(name, tmp_path):
    file, right, wrong, check = MUTANTS[name]
    for path in [CSRC / HOST_SOURCE, *CSRC.glob("*.h")]:
        shutil.copy(path, tmp_path)
    text = (tmp_path / file).read_text()
    assert text.count(right) == 1, "the source has changed: write the mutant anew"
    check(host_kernels())
    (tmp_path / file).write_text(text.replace(right, wrong))
    mutant = Kernels(compile_host(tmp_path))
    with pytest.raises(AssertionError):
        check(mutant)


def results_in_both_orders(folder):
    """All results of a source folder with the threads of a phase run first to last, and last to first."""
    case = Case(rows=6, width=5003, vocab_size=4999)
    full, labels = case.logits(), case.labels()
    scores = torch.randn(6000, generator=torch.Generator().manual_seed(0)).round()
    for last_first in (False, True):
        kernels = Kernels(compile_host(folder, last_thread_first=last_first))
        part = shard(full, case, 0, "cpu")
        found = forward(kernels, [part], labels, case, draw_coefficients(torch.full((6,), -9.0), 0))
        backward_(kernels, [part], labels, found.state, case)
        weights = [
            weight
            for settings in (LossSettings(), LossSettings(rescale="topk"), LossSettings(mode="paper", rescale="topk"))
            for weight in kernels.token_weights(scores, torch.tensor([0, 3, 900, 6000]), settings)
        ]
        equal = kernels.token_weights(torch.zeros(6000), torch.tensor([0, 6000]), LossSettings(rescale="topk"))
        yield [found.state, found.entropy, found.terms, part, *weights, *equal]


RACES = {
    "none": ("oreal_rows.h", "", "", True),
    "a lane reads what another has already merged": (
        "oreal_rows.h", "if (lane < half) shared[lane]", "shared[lane]", False),
    "scan in place": (
        "oreal_tokens.h", "shared.partial[1 - now][thread] = thread >= step",
        "shared.partial[1 - now][thread] = shared.partial[now][thread] = thread >= step", False),
}  # fmt: skip


@pytest.mark.parametrize("name", RACES)
def test_threads_of_a_phase_may_run_in_any_order(name, tmp_path):
    """What the barriers of the device are for; a race changes bits when the order changes."""
    file, right, wrong, same = RACES[name]
    for path in [CSRC / HOST_SOURCE, *CSRC.glob("*.h")]:
        shutil.copy(path, tmp_path)
    text = (tmp_path / file).read_text()
    assert not right or text.count(right) == 1, "the source has changed: write the mutant anew"
    (tmp_path / file).write_text(text.replace(right, wrong) if right else text)
    first, second = results_in_both_orders(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) is same

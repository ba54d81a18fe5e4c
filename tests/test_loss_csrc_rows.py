"""The kernels' row arithmetic and thread geometry, through the host build and its C interface, against float64."""

import ctypes
import dataclasses
import faulthandler
import itertools
import mmap
import os
import resource
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    SENTINEL,
    Case,
    around,
    backward_,
    check_case,
    check_confident_tokens,
    draw_coefficients,
    expected_gradient,
    expected_terms,
    forward,
    shard,
)
from loss_host import host_kernels

from megatron_oreal.errors import UserError
from megatron_oreal.loss import TokenCoefficients, policy_loss
from megatron_oreal.loss.kernels import LABEL_OUTSIDE

GEOMETRIES = [(256, 128), (128, 64), (512, 32)]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(params=GEOMETRIES, ids=lambda g: f"{g[0]}x{g[1]}")
def kernels(request):
    return host_kernels(*request.param)


@pytest.fixture
def host():
    return host_kernels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 8, 127, 2048, 4096 + 8, 9999])
def test_widths_from_one_column_to_many_rounds_of_the_block(kernels, width, dtype):
    check_case(kernels, Case(width=width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_real_vocabulary(host, dtype):
    check_case(host, Case(rows=3, width=152064, vocab_size=151665, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "gap"), [(0, 0), (1, 0), (4, 3), (8, 8), (3, 5), (0, 1)])
def test_any_alignment_and_row_stride(host, offset, gap, dtype):
    check_case(host, Case(width=2051, offset=offset, gap=gap, dtype=dtype))
    check_case(host, Case(width=2048, offset=offset, gap=gap, dtype=dtype))


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("vocab_size", [None, 1500, 300])
def test_shards_with_padding_and_shards_that_are_all_padding(kernels, ranks, vocab_size):
    check_case(kernels, Case(rows=18, width=1600 // ranks + 1, ranks=ranks, vocab_size=vocab_size, temperature=0.7))


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.3, 100.0])
def test_temperatures(host, temperature):
    check_case(host, Case(width=600, ranks=2, temperature=temperature, scale=4 * max(temperature, 0.5)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_constant_rows_and_logits_of_ten_thousand(host, scale, dtype):
    found = check_case(host, Case(width=3000, ranks=2, scale=scale, dtype=dtype))
    if scale == 0:
        assert torch.equal(found.logp, torch.full((7,), 6000.0, dtype=torch.float64).log().neg().float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_gradient_of_confident_tokens(kernels, dtype):
    check_confident_tokens(kernels, dtype)


def test_a_row_has_the_same_bits_at_every_alignment_index_and_stride(host):
    for dtype in DTYPES:
        case = Case(rows=1, width=4321, dtype=dtype)
        full, labels = case.logits(), case.labels()
        wanted = None
        for offset, gap, rows in itertools.product(range(9), (0, 7), (1, 3)):
            moved = dataclasses.replace(case, offset=offset, gap=gap, rows=rows)
            part = shard(full.expand(rows, -1), moved, 0, "cpu")
            c = TokenCoefficients(torch.full((rows,), 0.3), torch.zeros(rows), torch.zeros(rows))
            found = forward(host, [part], labels.expand(rows).contiguous(), moved, c)
            gradient = backward_(host, [part], labels.expand(rows).contiguous(), found.state, moved)
            wanted = (found.state[0], found.entropy[0], gradient[0]) if wanted is None else wanted
            for row in range(rows):
                assert torch.equal(found.state[row], wanted[0])
                assert torch.equal(found.entropy[row], wanted[1])
                assert torch.equal(gradient[row], wanted[2])


def test_every_geometry_and_every_sharding_agree_to_a_few_units_of_the_last_place():
    logps = []
    for geometry, ranks in itertools.product(GEOMETRIES, (1, 2, 4, 8)):
        case = Case(rows=5, width=9504 // ranks, ranks=ranks)
        full = dataclasses.replace(case, width=9504, ranks=1).logits()
        labels = dataclasses.replace(case, width=9504, ranks=1).labels()
        shards = [shard(full, case, rank, "cpu") for rank in range(ranks)]
        logps.append(forward(host_kernels(*geometry), shards, labels, case).logp)
    spread = torch.stack(logps).double()
    assert float((spread.amax(0) - spread.amin(0)).max()) < 4e-6


def test_same_inputs_same_bits(host):
    first, second = (check_case(host, Case(width=777, ranks=3)) for _ in range(2))
    assert torch.equal(first.state, second.state)
    assert torch.equal(first.terms, second.terms)


def test_masked_columns_take_no_part(host):
    for dtype in DTYPES:
        for mask in (-torch.inf, float(torch.finfo(dtype).min)):
            case = Case(rows=4, width=500, ranks=2, dtype=dtype)
            full = case.logits()
            full[:, 100:900] = mask
            full[0, :500] = mask  # a whole shard
            labels = torch.tensor([950, 5, 999, 901])
            shards = [shard(full, case, rank, "cpu") for rank in range(2)]
            c = draw_coefficients(torch.full((4,), -2.0), 1)
            found = forward(host, shards, labels, case, c)
            logp = full.log_softmax(1)
            entropy = -torch.where(logp < -1e30, 0.0, logp.exp() * logp).nan_to_num(0.0).sum(1)
            torch.testing.assert_close(found.logp.double(), logp[torch.arange(4), labels], rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-6, atol=1e-5)
            gradient = backward_(host, shards, labels, found.state, case)
            assert gradient.isfinite().all()
            assert not gradient[:, 100:900].any()


def test_a_masked_label_has_no_probability_and_a_row_without_columns_no_distribution(host):
    case = Case(rows=2, width=64)
    full = case.logits()
    full[0, 7] = -torch.inf
    full[1] = -torch.inf
    part = shard(full, case, 0, "cpu")
    found = forward(host, [part], torch.tensor([7, 7]), case, TokenCoefficients(*torch.ones(3, 2)))
    assert found.logp[0] == -torch.inf
    assert found.entropy[0].isfinite()
    assert found.logp[1].isnan()
    assert found.entropy[1].isnan()
    assert found.terms[:, 1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1234, 2055, 2999])
def test_nan_and_infinity_are_never_hidden(kernels, value, place, dtype):
    case = Case(rows=3, width=1500, ranks=2, dtype=dtype)
    full = case.logits()
    full[1, place] = value
    labels = torch.tensor([4, 4, 4])
    shards = [shard(full, case, rank, "cpu") for rank in range(2)]
    # positive only: the formula of its derivative does not need logp
    found = forward(kernels, shards, labels, case, TokenCoefficients(torch.ones(3), torch.zeros(3), torch.zeros(3)))
    assert found.logp.isnan().tolist() == [False, True, False]
    assert found.terms.isnan().any(0).tolist() == [False, True, False]
    gradient = backward_(kernels, shards, labels, found.state, case)
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_a_zero_coefficient_silences_everything(host):
    case = Case(rows=4, width=130)
    full = case.logits()
    full[1] = torch.nan
    full[2] = torch.inf
    zero = torch.zeros(4)
    c = TokenCoefficients(zero, zero, zero, old=torch.full((4,), -torch.inf), kl_anchor=torch.full((4,), torch.nan))
    part = shard(full, case, 0, "cpu")
    found = forward(host, [part], torch.zeros(4, dtype=torch.int64), case, c)
    assert not found.terms.any()
    assert not backward_(host, [part], torch.zeros(4, dtype=torch.int64), found.state, case).any()


@pytest.mark.parametrize("label", [-1, 300, 2**40, -(2**62)])
def test_a_label_of_no_shard_is_nan_on_every_rank_and_marks_the_status(host, label):
    case = Case(rows=3, width=200, ranks=2, vocab_size=300)
    labels = torch.tensor([0, label, 299])
    shards = [shard(case.logits(), case, rank, "cpu") for rank in range(2)]
    status = torch.zeros(1, dtype=torch.int32)
    found = forward(host, shards, labels, case, TokenCoefficients(*torch.ones(3, 3)), status=status)
    assert found.logp.isnan().tolist() == [False, True, False]
    assert found.terms.sum(0).isnan().tolist() == [False, True, False]
    assert int(status) == LABEL_OUTSIDE
    status.zero_()
    forward(host, shards, torch.tensor([0, 5, 299]), case, status=status)
    assert int(status) == 0
    # an inactive row's label is not looked at
    active = torch.tensor([1, 0, 1], dtype=torch.uint8)
    found = forward(host, shards, labels, case, TokenCoefficients(*torch.ones(3, 3)), status=status, active=active)
    assert int(status) == 0
    assert found.state[1].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert (found.logp[1], found.entropy[1], found.terms[:, 1].abs().sum()) == (0, 0, 0)
    assert not backward_(host, shards, labels, found.state, case)[1].any()


def exit_status(function):
    """How a forked child ends that calls it: 0, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_inactive_rows_are_not_read(host):
    """Row 1 lies on a page that kills the process at a touch."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    logits = torch.from_numpy(np.frombuffer(memory, dtype=np.float32)).view(3, page // 4)
    assert logits.data_ptr() % page == 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(logits[1].data_ptr()), ctypes.c_size_t(page), 0) == 0
    labels, options = torch.zeros(3, dtype=torch.int64), {"vocab_start": 0, "vocab_size": 5, "temperature": 1.0}
    active = torch.tensor([1, 0, 1], dtype=torch.uint8)
    assert exit_status(lambda: host.row_statistics(logits, labels, active=active, **options)) == 0
    assert exit_status(lambda: host.row_statistics(logits, labels, **options)) == -signal.SIGSEGV


def test_rows_beyond_two_to_the_31_elements(host, tmp_path):
    stride, width = 1_500_000_000, 1000
    file = np.memmap(tmp_path / "sparse", dtype=np.uint16, mode="w+", shape=(2 * stride + width,))  # holes: no disk
    logits = torch.from_numpy(file).view(torch.bfloat16).as_strided((3, width), (stride, 1))
    case = Case(rows=3, width=width)
    full, labels = case.logits(), case.labels()
    logits.copy_(full)
    c = draw_coefficients(torch.full((3,), -2.0), 3)
    found = forward(host, [logits], labels, case, c)
    own = full.log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found.logp.double(), own, rtol=1e-6, atol=1e-5)
    gradient = backward_(host, [logits], labels, found.state, case)
    wanted = expected_gradient(full, labels, expected_terms(found.logp, c)[1], case)
    assert float((gradient - wanted).norm() / wanted.norm()) < 4e-3


@pytest.mark.parametrize("negative_form", ["ratio", "log_ratio"])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("anchor", [True, False])
def test_every_form_of_the_loss(host, negative_form, kl_type, old, anchor):
    case = Case(rows=40, width=32)
    c = draw_coefficients(
        torch.full((40,), -2.0), 9, old=old, anchor=anchor, negative_form=negative_form, kl_type=kl_type
    )
    found = forward(host, [shard(case.logits(), case, 0, "cpu")], case.labels(), case, c)
    terms, derivative = expected_terms(found.logp, c)
    torch.testing.assert_close(found.terms, terms, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.state[:, 2].double(), derivative, rtol=1e-7, atol=1e-9)


def test_kernels_and_the_pytorch_path_say_the_same(host):
    case = Case(rows=30, width=400, vocab_size=390, dtype=torch.float32, temperature=0.8)
    full, labels, c = case.logits(), case.labels(), draw_coefficients(torch.full((30,), -2.0), 4)
    part = shard(full, case, 0, "cpu")
    found = forward(host, [part], labels, case, c)
    leaf = full.float().requires_grad_()
    loss = policy_loss(leaf, labels, c, vocab_size=390, temperature=0.8)
    loss.total.backward()
    some = (c.positive != 0) | (c.negative != 0) | (c.kl != 0)
    torch.testing.assert_close(found.logp[some], loss.logp[some], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.entropy[some], loss.entropy[some], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.terms.sum(), loss.total.detach(), rtol=1e-6, atol=1e-6)
    gradient = backward_(host, [part], labels, found.state, case)
    torch.testing.assert_close(gradient.float(), leaf.grad, rtol=1e-5, atol=1e-7)


def test_without_coefficients_only_log_probabilities(host):
    case = Case(rows=6, width=100)
    part = shard(case.logits(), case, 0, "cpu")
    found = forward(host, [part], case.labels(), case)
    with_loss = forward(host, [part], case.labels(), case, draw_coefficients(torch.full((6,), -2.0), 1))
    assert found.terms is None
    assert torch.equal(found.logp, with_loss.logp)
    assert torch.equal(found.entropy, with_loss.entropy)
    assert not found.state[:, 2].any()
    assert (around(part) == SENTINEL).all()


def test_no_rows_and_no_columns(host):
    empty = Case(rows=0, width=16)
    part = torch.zeros(0, 16, dtype=torch.bfloat16)
    found = forward(
        host, [part], torch.zeros(0, dtype=torch.int64), empty, draw_coefficients(torch.full((0,), -2.0), 0)
    )
    assert found.logp.shape == (0,)
    backward_(host, [part], torch.zeros(0, dtype=torch.int64), found.state, empty)


_columns = st.integers(1, 300)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 2.0]))
def test_merging_any_partition_of_a_row_gives_the_whole_row(widths, seed, temperature):
    host = host_kernels()
    columns = sum(widths)
    case = Case(rows=1, width=columns, seed=seed, temperature=temperature, scale=6)
    full, labels = case.logits(), case.labels()
    parts, start = [], 0
    for width in widths:
        x = full[:, start : start + width].bfloat16().contiguous()
        options = {"vocab_start": start, "vocab_size": columns, "temperature": temperature}
        parts.append(host.row_statistics(x, labels, **options))
        start += width
    found = host.combine(torch.stack(parts), None, temperature=temperature)
    shuffled = host.combine(torch.stack(parts[::-1]), None, temperature=temperature)
    whole = forward(host, [full.bfloat16()], labels, case)
    for other in (shuffled, whole):
        torch.testing.assert_close(found.logp, other.logp, rtol=5e-7, atol=1e-6)
        torch.testing.assert_close(found.entropy, other.entropy, rtol=5e-7, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(_columns, st.integers(0, 10**6), st.sampled_from([-4096.0, -1.0, 64.0, 2.0**20]))
def test_adding_a_constant_changes_nothing(columns, seed, constant):
    host = host_kernels()
    case = Case(rows=2, width=columns, dtype=torch.float32, seed=seed)
    full, labels = case.logits().mul(4).round().div(4), case.labels()  # so that the sum is exact
    moved = full + constant
    assert torch.equal(moved.float().double(), moved)
    a, b = (forward(host, [x.float()], labels, case) for x in (full, moved))
    assert torch.equal(a.logp, b.logp)
    assert torch.equal(a.entropy, b.entropy)


@settings(max_examples=40, deadline=None)
@given(_columns, st.integers(0, 10**6))
def test_permuting_the_columns_moves_the_gradient_and_nothing_else(columns, seed):
    host = host_kernels()
    case = Case(rows=2, width=columns, seed=seed)
    full, labels = case.logits(), case.labels()
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    c = draw_coefficients(torch.full((2,), -2.0), seed)
    x, y = full.bfloat16(), full[:, order].contiguous().bfloat16()
    a, b = forward(host, [x], labels, case, c), forward(host, [y], order.argsort()[labels], case, c)
    torch.testing.assert_close(a.logp, b.logp, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(a.entropy, b.entropy, rtol=1e-6, atol=2e-6)
    backward_(host, [x], labels, a.state, case)
    backward_(host, [y], order.argsort()[labels], b.state, case)
    torch.testing.assert_close(x[:, order].float(), y.float(), rtol=1e-2, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(_columns, st.integers(0, 10**6))
def test_a_gradient_row_sums_to_zero(columns, seed):
    host = host_kernels()
    case = Case(rows=3, width=columns, dtype=torch.float32, seed=seed)
    x, labels = case.logits().float(), case.labels()
    found = forward(host, [x], labels, case, TokenCoefficients(*torch.ones(3, 3)))
    gradient = backward_(host, [x], labels, found.state, case)
    assert float(gradient.sum(1).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 8, dtype=torch.float64)}, "the kernels take bfloat16 or float32"),
        ({"logits": torch.zeros(8, 3).t()}, "with unit row stride"),
        ({"logits": torch.zeros(3, 8, 1)}, "the kernels take"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, r"labels is torch\.int32"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels has shape \[4\]"),
        ({"labels": torch.zeros(6, dtype=torch.int64)[::2]}, "contiguous"),
        ({"active": torch.ones(2, dtype=torch.bool)}, "a mask or status is"),
        ({"active": torch.ones(3)}, "a mask or status is"),
        ({"status": torch.zeros(1)}, "a mask or status is"),
    ],
)
def test_tensors_that_the_kernels_cannot_take_are_refused(host, change, message):
    arguments = {"logits": torch.zeros(3, 8), "labels": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(UserError, match=message):
        host.row_statistics(**arguments, vocab_start=0, vocab_size=8, temperature=1.0)


@pytest.mark.parametrize(
    "change", [{"temperature": 0.0}, {"temperature": -1.0}, {"vocab_size": 0}, {"vocab_start": -1}]
)
def test_numbers_that_the_kernels_cannot_take_are_refused(host, change):
    columns = {"vocab_start": 0, "vocab_size": 8, "temperature": 1.0} | change
    with pytest.raises(RuntimeError, match="no kernel accepts"):
        host.row_statistics(torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64), **columns)
    with pytest.raises(RuntimeError, match="no kernel accepts"):
        host.gradient_(torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4), **columns)


def test_rows_that_share_memory_are_not_overwritten(host):
    columns = {"vocab_start": 0, "vocab_size": 8, "temperature": 1.0}
    logits, labels = torch.zeros(8).expand(3, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no kernel accepts"):
        host.gradient_(logits, labels, torch.zeros(3, 4), **columns)

"""The policy loss over real gloo tensor-parallel ranks."""

import os

import pytest
import torch
import torch.distributed as dist
from dist import run_ranks
from loss_cases import draw_batch
from loss_host import host_library

from megatron_oreal.errors import UserError
from megatron_oreal.loss import LossSettings, policy_loss, token_logprobs

WIDTH = 64
CASES = {  # logits dtype, mode, valid columns (20 of 64 at TP 4: two ranks hold padding alone), sequences
    "float64": (torch.float64, "paper", 50, 6),
    "float32": (torch.float32, "released", 20, 6),
    "bf16": (torch.bfloat16, "released", 50, 6),
    "no_tokens": (torch.bfloat16, "paper", 50, 0),
}
VALUES = ("total", "positive", "negative", "kl", "logp", "entropy")
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "barrier",
    "all_to_all",
    "all_to_all_single",
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
)


def count_collectives(counts):
    """Count every call into torch.distributed from here on."""
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            counts[_name] = counts.get(_name, 0) + 1
            return _original(*args, **kwargs)

        setattr(dist, name, counted)


def draw_case(name):
    """(batch, coefficients, settings, dtype, vocab_size)."""
    dtype, mode, vocab_size, sequences = CASES[name]
    batch = draw_batch(len(name), width=WIDTH, vocab_size=vocab_size, temperature=0.8, sequences=sequences)
    settings = LossSettings(mode=mode)
    return batch, batch.coefficients(settings, with_old=mode == "paper"), settings, dtype, vocab_size


def worker(kernels):
    """Loss, gradient shard and collectives of this rank for each case, and the messages of what it refuses."""
    os.environ["OREAL_KERNELS"] = kernels
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.new_group(list(range(dist.get_world_size())))
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    counts = {}
    count_collectives(counts)
    results = {}
    for name in CASES:
        batch, coefficients, _, dtype, vocab_size = draw_case(name)
        arguments = {"vocab_size": vocab_size, "temperature": 0.8, "tp_group": group}
        shard = batch.logits.chunk(world, dim=1)[rank].contiguous().to(dtype, copy=True).requires_grad_()
        logp, _ = token_logprobs(shard, batch.labels, **arguments)
        counts.clear()
        loss = policy_loss(shard, batch.labels, coefficients, **arguments)
        forward = dict(counts)
        loss.total.backward()
        values = {key: getattr(loss, key).detach() for key in VALUES}
        results[name] = values | {"gradient": shard.grad, "forward": forward, "both": dict(counts), "logprobs": logp}
    results["masked"] = masked(group)
    results["refused"] = refused(group)
    dist.destroy_process_group()
    return results


def masked(group):
    """(logp, entropy) where every second row is not read."""
    batch, _, _, _, vocab_size = draw_case("float32")
    shard = batch.logits.float().chunk(group.size(), dim=1)[group.rank()].contiguous()
    active = torch.arange(len(shard)) % 2 == 0
    return token_logprobs(shard, batch.labels, vocab_size=vocab_size, temperature=0.8, tp_group=group, active=active)


def refused(group):
    """Messages of mistakes that every rank must refuse alike, before any of them waits in a collective."""
    batch, coefficients, _, _, _ = draw_case("float32")
    shard = batch.logits.chunk(group.size(), dim=1)[group.rank()].contiguous()
    messages = []
    for vocab_size, labels in ((65, batch.labels), (20, batch.labels + 20), (10, batch.labels.clamp(min=10))):
        with pytest.raises(UserError) as caught:
            policy_loss(shard, labels, coefficients, vocab_size=vocab_size, tp_group=group)
        messages.append(str(caught.value))
    return messages


@pytest.fixture(scope="module", params=["tp1", "tp2", "tp4", "tp2-kernels"])
def ranks(request):
    """What each rank returned; with PyTorch's passes, or with the kernels' source built for the CPU."""
    kernels = str(host_library()) if "kernels" in request.param else "0"
    return run_ranks("test_loss_parallel:worker", int(request.param[2]), {"kernels": kernels})


@pytest.mark.parametrize("name", ["float64", "float32", "bf16"])
def test_shards_over_ranks_give_the_loss_and_gradient_of_one_rank_and_of_the_oracle(ranks, name):
    batch, coefficients, settings, dtype, vocab_size = draw_case(name)
    logits = batch.logits.to(dtype, copy=True).requires_grad_()
    alone = policy_loss(logits, batch.labels, coefficients, vocab_size=vocab_size, temperature=0.8)
    alone.total.backward()
    expected, oracle_gradient, _ = batch.expected(settings, with_old=settings.mode == "paper", vocab_size=vocab_size)
    tight = 1e-12 if dtype == torch.float64 else 2e-6
    for key in VALUES:
        torch.testing.assert_close(ranks[0][name][key], getattr(alone, key).detach(), rtol=tight, atol=tight)
    for key in ("total", "positive", "negative", "kl"):
        torch.testing.assert_close(ranks[0][name][key], getattr(expected, key).detach(), rtol=3e-6, atol=1e-7)
    gradient = torch.cat([rank[name]["gradient"] for rank in ranks], dim=1)
    slack = 2.0**-7 if dtype == torch.bfloat16 else tight  # one bf16 rounding may fall to the other side
    torch.testing.assert_close(gradient, logits.grad, rtol=slack, atol=1e-9)
    bound = 1e-2 if dtype == torch.bfloat16 else 5e-6
    assert (gradient.double() - oracle_gradient).norm() <= bound * oracle_gradient.norm()


def test_rows_that_are_not_read_are_zero_whatever_the_number_of_ranks(ranks):
    for rank in ranks:
        for value, whole in zip(rank["masked"], (rank["float32"]["logp"], rank["float32"]["entropy"]), strict=True):
            assert torch.equal(value[0::2], whole[0::2])
            assert not value[1::2].any()


@pytest.mark.parametrize("name", ["float64", "float32", "bf16"])
def test_every_rank_has_the_same_bits(ranks, name):
    for rank in ranks:
        assert torch.equal(rank[name]["logprobs"], rank[name]["logp"])
        for key in VALUES:
            assert torch.equal(rank[name][key], ranks[0][name][key]), key


@pytest.mark.parametrize("name", ["float64", "float32", "bf16"])
def test_forward_makes_one_collective_and_backward_none(ranks, name):
    once = {} if len(ranks) == 1 else {"all_gather_into_tensor": 1}
    assert all(rank[name]["forward"] == rank[name]["both"] == once for rank in ranks)


def test_without_tokens_all_ranks_skip_the_collective_and_have_an_empty_gradient(ranks):
    for rank in ranks:
        assert float(rank["no_tokens"]["total"]) == 0.0
        assert rank["no_tokens"]["gradient"].shape == (0, WIDTH // len(ranks))
        assert rank["no_tokens"]["both"] == {}


def test_every_rank_refuses_a_wrong_label_or_vocabulary_instead_of_hanging(ranks):
    for rank in ranks:
        assert rank["refused"] == ranks[0]["refused"]
    assert "vocab_size is 65; it must be in [1, 64], the columns of all ranks" in ranks[0]["refused"][0]
    assert all("outside the vocabulary" in message for message in ranks[0]["refused"][1:])

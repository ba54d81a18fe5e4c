"""Activations of a training step in closed form: what a layer keeps for its backward pass, and what a peak holds.

Letters: t tokens of a micro-batch, s of them on a sequence-parallel rank (else s = t), h hidden size; q, k, f the
rank's query, key and MLP widths; e bytes of an element; n response tokens of a micro-batch.

``local``: counted off the torch-native modules (``actor/local_modules.py``, Megatron's unfused rotary and gated MLP),
and held against the real ones on meta tensors by a test.

``transformer_engine``: what the modules hand to ``save_for_backward`` in bf16, read off TransformerEngine's source
(2.20.0.dev0, d0067d0; ``transformer_engine/pytorch/``) and megatron-core 0.16.1's, and never run here:

* ``LayerNormLinear`` (qkv, fc1; ``module/layernorm_linear.py``, ``_LayerNormLinear.forward``): ``inputmat`` (s h),
  ``ln_out`` (s h; gathered again in the backward pass, its gathered copy is freed), ``rsigma`` (fp32, s), no ``mu``
* rotary embedding (``attention/rope.py``): the angles, which all layers share; the rotated q and k are new tensors
* attention (``attention/dot_product_attention/backends.py``, ``FusedAttnFunc``): q, k, v, out and the softmax's
  statistics (fp32 a token and head). v is a view of qkv's output with other strides than the rotated k, so
  ``get_qkv_layout`` (``utils.py``) makes it contiguous, and that output is freed. flash-attn saves the same
* ``Linear`` (projection, fc2; ``module/linear.py``): its input. The projection's is attention's ``out`` itself
* SwiGLU (megatron-core ``fusions/fused_bias_swiglu.py``, ``SwiGLUFunction``): fc1's output (2 f)
* norms of q and k (``ops/basic/rmsnorm.py``): their inputs, made contiguous, and fp32 ``rstdevs`` a token and head

The residual additions save nothing. With ``parallel.cpu_offloading_num_layers`` so many layers fewer are held at a
time, before and behind the loss: ``DefaultOffloadSynchronizer`` (``cpu_offload.py``) says so, and waits where copies
are late. It is the count of Korthikanti et al. (arXiv 2205.05198) for RMSNorm, SwiGLU, grouped queries and attention
that keeps no scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_oreal.data.packing import WorkModel, plan_for
from megatron_oreal.loss.chunked import auto_chunk_tokens, chunk_slices
from megatron_oreal.loss.vocab_parallel import CHUNK_ELEMENTS
from megatron_oreal.planner.parameters import Shapes, layer_counts
from megatron_oreal.planner.types import Setting


@dataclass(frozen=True)
class Load:
    """The micro-batches of one data-parallel rank: the largest one's tokens and response tokens, and how many."""

    tokens: int
    responses: int
    count: int


def load_of(setting: Setting, pp_rank: int, dp_rank: int = 0) -> Load:
    """The worst case, or the plan of ``setting.lengths``."""
    parallel = setting.config.parallel
    pp = parallel.pipeline_model_parallel_size
    prompt = max(setting.prompt_tokens, 1)
    if setting.lengths is None:
        tokens = parallel.max_tokens_per_microbatch
        count = 2 * pp if parallel.virtual_pipeline_model_parallel_size else pp - pp_rank + 1
        sequences = -(-tokens // setting.config.rollout.gen_max_length)
        return Load(tokens, tokens - sequences * prompt, count)
    lengths = setting.lengths
    plan = plan_for(parallel, lengths, dp_size=setting.dp, work=WorkModel.from_spec(setting.spec))
    mine, tokens_of = plan.ranks[dp_rank], plan.tokens[dp_rank]
    largest = max(range(len(mine)), key=lambda index: tokens_of[index])
    return Load(tokens_of[largest], sum(lengths[i] - prompt for i in mine[largest]), len(mine))


@dataclass(frozen=True)
class LayerBytes:
    """``saved`` for the backward pass; ``forward`` and ``backward``: the most that either pass has beside that."""

    saved: float
    forward: float
    backward: float


def layer_bytes(setting: Setting, tokens: int) -> LayerBytes:
    """One layer and one micro-batch, without recomputation or with the selective one of TransformerEngine's layers.

    Selective recomputation is left out of the torch-native count, which is an upper bound with it.
    """
    x, t = Shapes.of(setting), tokens
    s = t / x.tp if setting.config.parallel.sequence_parallel else t
    gathered = x.e * t * x.h if setting.config.parallel.sequence_parallel and x.tp > 1 else 0
    # In the gated MLP: gradients of its width beyond what has been freed by then, and the second weight's.
    backward = gathered + x.e * s * x.h + x.e * t * x.f + x.e * x.f * x.h
    if setting.implementation == "transformer_engine":
        saved = 2 * (2 * x.e * s * x.h + 4 * s) + x.e * t * (2 * x.q + 2 * x.k) + 4 * t * x.heads + x.e * t * 3 * x.f
        if x.qk_norm:
            saved += x.e * t * (x.q + x.k) + 4 * t * (x.heads + x.k // x.head_dim)
        # fc1's output and SwiGLU's, or fc1's beside its gathered input; q before and after the rotation, with k and v.
        forward = x.e * t * max(3 * x.f, 3 * x.q + 4 * x.k) + x.e * s * x.h
        forward = max(forward, gathered + x.e * t * 2 * x.f + x.e * s * x.h)
        return _selective(setting, LayerBytes(saved, forward, max(backward, _later_in_mlp(x, t, s, gathered))), t, s)
    norm = (16 if x.e == 2 else 24) * s * x.h + 8 * s
    saved = norm + x.e * t * (5 * x.q + 4 * x.head_dim + 5 * x.f) + 4 * t * x.heads
    if x.qk_norm:
        saved += (3 * x.e * t * (x.q + x.k)) + 4 * t * (x.heads + x.k // x.head_dim)
    forward = x.e * t * max(5 * x.f, 5 * x.q + 2 * x.k) + x.e * s * x.h
    return LayerBytes(saved, max(forward, gathered), backward)


def _later_in_mlp(x: Shapes, t: int, s: float, gathered: float) -> float:
    """The most beside ``saved`` in the backward pass of SwiGLU and of fc1, when fc2's input (f) has been freed.

    SwiGLU: gradients of its output (f) and input (2 f). fc1, when SwiGLU's input (2 f) is freed too: the gradient of
    its output (2 f), its gathered input and that input's gradient (h), which is scattered, and its weight's (2 f h).
    """
    swiglu = x.e * t * (3 - 1) * x.f
    fc1 = x.e * t * (2 - 3) * x.f + gathered + x.e * t * x.h + x.e * 2 * x.f * x.h
    return max(swiglu, fc1) + x.e * s * x.h


def _selective(setting: Setting, one: LayerBytes, t: int, s: float) -> LayerBytes:
    """``parallel.recompute_modules``: ``core_attn`` drops the softmax's statistics, ``mlp`` all but the MLP's input.

    Megatron checkpoints what a module is given; the projection keeps attention's output all the same.
    """
    x, parallel = Shapes.of(setting), setting.config.parallel
    if parallel.recompute_granularity != "selective":
        return one
    modules = parallel.recompute_modules or ["core_attn"]
    attention = 4 * t * x.heads if "core_attn" in modules else 0
    mlp = x.e * s * x.h + 4 * s + x.e * t * 3 * x.f if "mlp" in modules else 0
    return LayerBytes(one.saved - attention - mlp, one.forward, one.backward + max(attention, mlp))


def in_flight(setting: Setting, pp_rank: int, count: int) -> int:
    """Chunk passes whose activations a stage holds at once: Megatron's 1F1B and interleaved schedules."""
    parallel = setting.config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if not vpp:
        return min(pp - pp_rank, count)
    return min((pp - pp_rank - 1) * 2 + (vpp - 1) * pp + 1, count * vpp)


@dataclass(frozen=True)
class PassBytes:
    """Peaks of one pass over the micro-batches beside what is there all the time."""

    activations: int
    logits: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.logits


def forward_pass(setting: Setting, pp_rank: int, dp_rank: int = 0) -> PassBytes:
    """The reference's: nothing is kept for a backward pass."""
    load, x = load_of(setting, pp_rank, dp_rank), Shapes.of(setting)
    t = load.tokens
    s = t / x.tp if setting.config.parallel.sequence_parallel else t
    one = layer_bytes(setting, t)
    hidden = x.e * s * x.h
    held = _batch_bytes(setting, load) + hidden
    if setting.config.parallel.pipeline_model_parallel_size > 1:  # the schedule keeps what a stage received and sent
        chunks = setting.config.parallel.virtual_pipeline_model_parallel_size or 1
        last = _has_head(setting, pp_rank)
        held += (load.count * (chunks - last) + (1 if last else 0)) * hidden
    within = held + one.forward
    if not _has_head(setting, pp_rank):
        return PassBytes(round(within))
    head = head_bytes(setting, load, training=False)
    kept = held + head.gathered
    return max(PassBytes(round(within)), PassBytes(round(kept), round(head.logits)), key=lambda peak: peak.total)


def backward_pass(setting: Setting, pp_rank: int, dp_rank: int = 0, *, score_head: bool = False) -> PassBytes:
    """Forward and backward of a trained model."""
    load, x = load_of(setting, pp_rank, dp_rank), Shapes.of(setting)
    t = load.tokens
    s = t / x.tp if setting.config.parallel.sequence_parallel else t
    hidden, one = x.e * s * x.h, layer_bytes(setting, t)
    chunks = layer_counts(setting)[pp_rank]
    layers = chunks[-1]
    kept, transient = _with_recompute(setting, one, layers, hidden)
    flying = in_flight(setting, pp_rank, load.count)
    pipeline = 2 * hidden * (flying > 1 or setting.config.parallel.pipeline_model_parallel_size > 1)
    saved = flying * (kept + hidden + pipeline / 2) + pipeline + _batch_bytes(setting, load)
    if not _has_head(setting, pp_rank):
        return PassBytes(round(saved + transient))
    norm = ((8 if x.e == 2 else 10) if setting.implementation == "local" else 2 * x.e) * s * x.h
    body = PassBytes(round(saved + norm + transient))
    if score_head:
        gathered = x.e * t * x.h if setting.config.parallel.sequence_parallel and x.tp > 1 else 0
        head = PassBytes(round(saved + norm + gathered + (8 + x.e) * load.responses * x.h))
    else:
        parts = head_bytes(setting, load, training=True)
        head = PassBytes(round(saved + norm + parts.gathered + parts.gradients), round(parts.logits))
    return max(body, head, key=lambda peak: peak.total)


@dataclass(frozen=True)
class HeadBytes:
    """``gathered``: hidden states, of all positions and of those that are read; ``gradients``: of hidden and weight."""

    gathered: float
    logits: float
    gradients: float


def head_bytes(setting: Setting, load: Load, *, training: bool) -> HeadBytes:
    """The vocabulary head and the loss: logits of the response tokens once, in place their gradient."""
    x, parallel, n = Shapes.of(setting), setting.config.parallel, load.responses
    gathered = x.e * n * x.h
    if parallel.sequence_parallel and x.tp > 1:
        gathered += x.e * load.tokens * x.h
    chunk = parallel.loss_chunk_tokens or auto_chunk_tokens(x.vocab, x.e)
    rows = n if n <= chunk else max(piece.stop - piece.start for piece in chunk_slices(n, chunk))
    scratch = 0.0
    if setting.device == "cpu" or setting.implementation == "local":
        row = -(-x.vocab // 64) * 64
        step = max(CHUNK_ELEMENTS[setting.device] // x.vocab, 1)
        scratch = 2 * 4 * min(step, n) * row
    logits = x.e * rows * x.vocab + scratch + 8 * n * 8
    gradients = 0.0
    if training:
        gradients = x.e * n * x.h + x.e * x.vocab * x.h
    return HeadBytes(gathered, logits, gradients)


def _with_recompute(setting: Setting, one: LayerBytes, layers: int, hidden: float) -> tuple[float, float]:
    """(kept for the backward pass by a chunk, the most beside that) under the chosen recomputation."""
    parallel = setting.config.parallel
    if parallel.recompute_granularity != "full":
        return (layers - parallel.cpu_offloading_num_layers) * one.saved, one.backward
    group = min(parallel.recompute_num_layers or 1, layers)
    again = one.saved + one.backward
    if parallel.recompute_method == "block":
        # Of the last layers, whose backward pass is over when others are recomputed.
        whole = (layers - group) * one.saved
        return whole + group * hidden, max(one.backward, again - whole)
    return -(-layers // group) * hidden, (group - 1) * one.saved + again


def offloaded_activations(setting: Setting, pp_rank: int, dp_rank: int = 0) -> int:
    """Host bytes of ``parallel.cpu_offloading_num_layers``."""
    layers = setting.config.parallel.cpu_offloading_num_layers
    return round(layers * layer_bytes(setting, load_of(setting, pp_rank, dp_rank).tokens).saved) if layers else 0


def _batch_bytes(setting: Setting, load: Load) -> float:
    """Token numbers, positions, indices and log-probabilities of all micro-batches, and rotary angles."""
    x, local = Shapes.of(setting), setting.implementation == "local"
    numbers = load.count * (8 * load.tokens * (4 if local else 2) + (3 * 8 + 8) * load.responses)
    return numbers + 4 * x.head_dim * (setting.config.rollout.gen_max_length + (load.tokens if local else 0))


def _has_head(setting: Setting, pp_rank: int) -> bool:
    return pp_rank == setting.config.parallel.pipeline_model_parallel_size - 1

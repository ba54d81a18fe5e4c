"""The compiled loss kernels as Python calls on tensors: ctypes over the C ABI of csrc/oreal_loss.h.

The calls allocate their results with torch, queue the kernels on the current stream and return; they never wait for
the device. Comments on every array's shape and meaning are in the header.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.loss.coefficients import NegativeForm, TokenCoefficients
from megatron_oreal.loss.settings import KlType, LossSettings, Mode, Rescale

ABI_VERSION = 2
LABEL_OUTSIDE = 1
"""Bit of ``status``: a row's label was outside the vocabulary."""

_DTYPES = {torch.bfloat16: 0, torch.float32: 1}
_POINTER, _LONG, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double


class _Logits(ctypes.Structure):
    _fields_ = [
        *(("data", _POINTER), ("rows", _LONG), ("width", _LONG), ("stride", _LONG)),
        *(("vocab_start", _LONG), ("vocab_size", _LONG), ("temperature", _DOUBLE), ("dtype", _INT)),
    ]


class _Coefficients(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("positive", "negative", "kl", "old", "anchor")),
        *(("negative_form", _INT), ("kl_type", _INT)),
    ]


class _TokenWeights(ctypes.Structure):
    _fields_ = [
        *(("scores", _POINTER), ("cu_seqlens", _POINTER), ("tokens", _LONG), ("sequences", _LONG)),
        *(("dtype", _INT), ("mode", _INT), ("rescale", _INT), ("positive_cut", _DOUBLE), ("negative_cut", _DOUBLE)),
        *(("scratch", _POINTER), ("strengths", _POINTER), ("kl", _DOUBLE)),
        *((name, _POINTER) for name in ("positive_weight", "negative_weight", "positive", "negative", "kl_out")),
        ("active", _POINTER),
    ]


_SIGNATURES: dict[str, list[Any]] = {
    "oreal_row_statistics": [ctypes.POINTER(_Logits), _POINTER, _POINTER, _POINTER, _POINTER, _POINTER],
    "oreal_combine": [
        *(_POINTER, _LONG, _LONG, _DOUBLE, _POINTER, ctypes.POINTER(_Coefficients)),
        *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    ],
    "oreal_gradient": [ctypes.POINTER(_Logits), _POINTER, _POINTER, _POINTER, _POINTER],
    "oreal_token_weights": [ctypes.POINTER(_TokenWeights), _POINTER],
    "oreal_probe": [],
}


class LibraryError(RuntimeError):
    """A shared library that is not ours, has another ABI, or cannot be loaded or run."""


@dataclass(frozen=True)
class TokenResults:
    """What ``combine`` knows of every row.

    ``state`` [N, 4] float32 = (m, d, g, logp), what ``gradient_`` needs; ``logp``, ``entropy`` (nats) float32 [N];
    ``terms`` [3, N] float64 = the positive, negative and KL part of loss_t (None without coefficients).
    """

    state: Tensor
    logp: Tensor
    entropy: Tensor
    terms: Tensor | None


@dataclass(frozen=True)
class PackedCoefficients:
    """Of a pack's tokens, all [N]: float32 coefficients of the loss and weights ω⁺, ω⁻; ``active`` uint8, 1 where a
    coefficient is not 0.
    """

    positive: Tensor
    negative: Tensor
    kl: Tensor
    active: Tensor
    positive_weight: Tensor
    negative_weight: Tensor


class Kernels:
    """One loaded library. ``device_type``: ``cuda``, or ``cpu`` for the host build that the tests make of the kernels.

    Every method raises UserError for tensors it cannot take, RuntimeError when a launch fails.
    """

    def __init__(self, path: Path) -> None:
        """Load and check; raises LibraryError."""
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
            found = int(self._library.oreal_abi_version())
        except (OSError, AttributeError) as error:
            raise LibraryError(f"{path} cannot be loaded: {error}") from error
        if found != ABI_VERSION:
            raise LibraryError(f"{path} has ABI version {found}, this package needs {ABI_VERSION}; build it again")
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        for name in ("oreal_build_info", "oreal_error_string"):
            getattr(self._library, name).restype = ctypes.c_char_p
        text = self._library.oreal_build_info().decode()
        self.build_info = dict(part.split("=", 1) for part in text.split())
        self.device_type = self.build_info["device"]

    def probe(self) -> None:
        """Load every kernel on the current device, launch none; raises LibraryError where none could be launched."""
        code = self._library.oreal_probe()
        if code:
            raise LibraryError(f"{self.path} cannot run on this device: {self._reason(code)}")

    def row_statistics(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        vocab_start: int,
        vocab_size: int,
        temperature: float,
        active: Tensor | None = None,
        status: Tensor | None = None,
    ) -> Tensor:
        """Read a shard once: (m, d, t, x_y) of its valid columns, float32 [N, 4]; 16 bytes a token to all-gather.

        Args:
            logits: [N, width] bf16 or float32, unit stride along the row, any row stride; not modified.
            labels: int64 [N], global ids; one outside [0, vocab_size) makes the row's logp NaN on every rank.
            vocab_start: global id of the shard's first column.
            vocab_size: global columns from here on are padding and take no part.
            temperature: T > 0.
            active: uint8 or bool [N]; rows with 0 are not read.
            status: int32 [1] on the device, zeroed by the caller; LABEL_OUTSIDE is set in it without a wait.

        """
        shard = self._shard(logits, labels, vocab_start, vocab_size, temperature)
        out = logits.new_empty(len(logits), 4, dtype=torch.float32)
        mask, word = self._optional(active, len(logits), logits), self._pointer(status, torch.int32, 1, logits)
        self._call("oreal_row_statistics", logits, shard, labels.data_ptr(), mask, out.data_ptr(), word)
        return out

    def combine(
        self,
        gathered: Tensor,
        coefficients: TokenCoefficients | None,
        *,
        temperature: float,
        active: Tensor | None = None,
    ) -> TokenResults:
        """Merge the shards' statistics [TP, N, 4] float32 in rank order; loss and derivative of every token.

        Same input bits give the same output bits on every rank. Rows with ``active`` 0 get zeros everywhere.
        """
        if gathered.dim() != 3 or gathered.shape[2] != 4 or not gathered.is_contiguous():
            raise UserError(f"gathered has shape {list(gathered.shape)}; it must be a contiguous [ranks, N, 4]")
        self._require("gathered", gathered, torch.float32, gathered)
        ranks, rows = gathered.shape[:2]
        state = gathered.new_empty(rows, 4)
        logp, entropy = gathered.new_empty(2, rows).unbind()
        terms, structure, kept = None, None, None
        if coefficients is not None:
            terms = gathered.new_empty(3, rows, dtype=torch.float64)
            structure, kept = self._coefficients(coefficients, gathered, rows)
        mask = self._optional(active, rows, gathered)
        self._call(
            "oreal_combine",
            gathered,
            *(gathered.data_ptr(), ranks, rows, temperature, mask, structure),
            *(state.data_ptr(), logp.data_ptr(), entropy.data_ptr(), None if terms is None else terms.data_ptr()),
        )
        del kept  # alive until the launch; after it, stream order protects their memory
        return TokenResults(state, logp, entropy, terms)

    def gradient_(
        self,
        logits: Tensor,
        labels: Tensor,
        state: Tensor,
        *,
        vocab_start: int,
        vocab_size: int,
        temperature: float,
        grad_out: Tensor | None = None,
    ) -> None:
        """Overwrite the shard with g·grad_out·(onehot − softmax)/T; ``grad_out`` a 0-d tensor on the device, or 1.

        Rows whose factor is 0 are not read and become exactly 0, as do padding columns.
        """
        shard = self._shard(logits, labels, vocab_start, vocab_size, temperature)
        self._require("state", state, torch.float32, logits)
        if state.shape != (len(logits), 4) or not state.is_contiguous():
            raise UserError(f"state has shape {list(state.shape)}; it must be a contiguous [{len(logits)}, 4]")
        factor = None
        if grad_out is not None:
            factor = grad_out.detach().to(torch.float64)
            self._require("grad_out", factor, torch.float64, logits)
            if factor.numel() != 1:
                raise UserError(f"grad_out has shape {list(grad_out.shape)}; it must be one number")
        pointer = None if factor is None else factor.data_ptr()
        self._call("oreal_gradient", logits, shard, labels.data_ptr(), state.data_ptr(), pointer)

    def token_weights(self, scores: Tensor, cu_seqlens: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
        """(ω⁺, ω⁻) float32 [N] of a pack, as ``megatron_oreal.loss.token_weights``.

        Args:
            scores: [N] bf16 or float32 (others are converted to float32).
            cu_seqlens: int64 [S + 1] on the device: 0, …, N, strictly increasing.
            settings: ``mode``, ``rescale``, thresholds or ratios.

        """
        positive, negative = scores.new_empty(2, len(scores), dtype=torch.float32).unbind()
        self._weights(
            scores,
            cu_seqlens,
            settings,
            scores,
            positive_weight=positive.data_ptr(),
            negative_weight=negative.data_ptr(),
        )
        return positive, negative

    def token_coefficients(
        self,
        scores: Tensor | None,
        cu_seqlens: Tensor,
        strengths: Tensor,
        settings: LossSettings,
        *,
        num_tokens: int,
        kl: float,
    ) -> PackedCoefficients:
        """Weights and loss coefficients of a pack in one pass.

        Args:
            scores: as in ``token_weights``; None: no reward model, every weight is 1.
            cu_seqlens: as in ``token_weights``.
            strengths: float64 [S, 2] on the device: factor · advantage (or 1, or 1 − p) / N⁺ of the positives and the
                same of the negatives, 0 for sequences of the other kind.
            settings: as in ``token_weights``.
            num_tokens: N.
            kl: ``kl_coef``/N of the global batch.

        """
        self._require("strengths", strengths, torch.float64, cu_seqlens)
        if strengths.shape != (len(cu_seqlens) - 1, 2) or not strengths.is_contiguous():
            raise UserError(f"strengths has shape {list(strengths.shape)}; it must be [{len(cu_seqlens) - 1}, 2]")
        a, b, k, plus, minus = cu_seqlens.new_empty(5, num_tokens, dtype=torch.float32).unbind()
        active = cu_seqlens.new_empty(num_tokens, dtype=torch.uint8)
        self._weights(
            scores,
            cu_seqlens,
            settings,
            a,
            strengths=strengths.data_ptr(),
            kl=kl,
            positive_weight=plus.data_ptr(),
            negative_weight=minus.data_ptr(),
            positive=a.data_ptr(),
            negative=b.data_ptr(),
            kl_out=k.data_ptr(),
            active=active.data_ptr(),
        )
        return PackedCoefficients(a, b, k, active, plus, minus)

    def _weights(
        self, scores: Tensor | None, cu_seqlens: Tensor, settings: LossSettings, like: Tensor, **outputs: Any
    ) -> None:
        topk = settings.rescale == "topk"
        right = cu_seqlens.dtype == torch.int64 and cu_seqlens.dim() == 1 and cu_seqlens.is_contiguous()
        if not right or not len(cu_seqlens):
            raise UserError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; it must be int64 [S + 1]")
        self._require("cu_seqlens", cu_seqlens, torch.int64, like)
        scratch = None
        if scores is not None:
            if scores.dim() != 1 or len(scores) != len(like):
                raise UserError(f"scores has shape {list(scores.shape)}; it must be [{len(like)}]")
            scores = scores.detach().to(scores.dtype if scores.dtype in _DTYPES else torch.float32).contiguous()
            self._require("scores", scores, scores.dtype, like)
            scratch = like.new_empty(len(like), dtype=torch.float64) if topk else None
        arguments = _TokenWeights(
            scores=None if scores is None else scores.data_ptr(),
            cu_seqlens=cu_seqlens.data_ptr(),
            tokens=len(like),
            sequences=len(cu_seqlens) - 1,
            dtype=_DTYPES[torch.float32 if scores is None else scores.dtype],
            mode=get_args(Mode).index(settings.mode),
            rescale=get_args(Rescale).index(settings.rescale),
            positive_cut=settings.correct_topk_ratio if topk else settings.correct_threshold,
            negative_cut=settings.incorrect_topk_ratio if topk else settings.incorrect_threshold,
            scratch=None if scratch is None else scratch.data_ptr(),
            **outputs,
        )
        self._call("oreal_token_weights", like, ctypes.byref(arguments))

    def _shard(self, logits: Tensor, labels: Tensor, vocab_start: int, vocab_size: int, temperature: float) -> Any:
        if logits.dim() != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1) or logits.dtype not in _DTYPES:
            layout = f"{logits.dtype} {list(logits.shape)}, strides {list(logits.stride())}"
            raise UserError(f"logits is {layout}; the kernels take bfloat16 or float32 [N, width] with unit row stride")
        self._require("logits", logits, logits.dtype, logits)
        self._require("labels", labels, torch.int64, logits)
        if labels.shape != logits.shape[:1] or not labels.is_contiguous():
            raise UserError(f"labels has shape {list(labels.shape)}; it must be a contiguous [{len(logits)}]")
        stride = logits.stride(0) if len(logits) > 1 else max(logits.stride(0), logits.shape[1])
        return ctypes.byref(
            _Logits(
                *(logits.data_ptr(), *logits.shape, stride, vocab_start, vocab_size, temperature),
                _DTYPES[logits.dtype],
            )
        )

    def _coefficients(self, coefficients: TokenCoefficients, like: Tensor, rows: int) -> tuple[Any, list[Tensor]]:
        if len(coefficients) != rows:
            raise UserError(f"coefficients are of {len(coefficients)} tokens; there are {rows} rows")
        vectors = {n: v.detach().to(like.device, torch.float32).contiguous() for n, v in coefficients.vectors().items()}
        pointers: dict[str, int | None] = {name: vector.data_ptr() for name, vector in vectors.items()}
        pointers["anchor"] = pointers.pop("kl_anchor", None)
        structure = _Coefficients(
            **pointers,
            negative_form=get_args(NegativeForm).index(coefficients.negative_form),
            kl_type=1 + get_args(KlType).index(coefficients.kl_type),
        )
        return ctypes.byref(structure), list(vectors.values())

    def _require(self, name: str, tensor: Tensor, dtype: torch.dtype, like: Tensor) -> None:
        if tensor.dtype != dtype or tensor.device != like.device or tensor.device.type != self.device_type:
            raise UserError(f"{name} is {tensor.dtype} on {tensor.device}; it must be {dtype} on {like.device}")

    def _optional(self, mask: Tensor | None, rows: int, like: Tensor) -> int | None:
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        return self._pointer(mask, torch.uint8, rows, like)

    def _pointer(self, tensor: Tensor | None, dtype: torch.dtype, count: int, like: Tensor) -> int | None:
        if tensor is None:
            return None
        if (
            tensor.dtype != dtype
            or tensor.shape != (count,)
            or not tensor.is_contiguous()
            or tensor.device != like.device
        ):
            raise UserError(f"a mask or status is {tensor.dtype} {list(tensor.shape)}; it must be {dtype} [{count}]")
        return tensor.data_ptr()

    def _call(self, name: str, like: Tensor, *arguments: Any) -> None:
        """Queue on the current stream of the tensors' device."""
        stream: int | None = None
        scope: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if like.is_cuda:
            stream = torch.cuda.current_stream(like.device).cuda_stream
            if like.device.index != torch.cuda.current_device():
                scope = torch.cuda.device(like.device)
        with scope:
            code = getattr(self._library, name)(*arguments, stream)
        if code:
            raise RuntimeError(f"{name}: {self._reason(code)}")

    def _reason(self, code: int) -> str:
        return f"{self._library.oreal_error_string(code).decode()} (code {code})"

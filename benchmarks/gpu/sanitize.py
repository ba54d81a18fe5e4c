"""All kernels on small shapes, for compute-sanitizer; no caching allocator, so that a step outside a tensor is seen.

compute-sanitizer --tool memcheck|racecheck|initcheck|synccheck --error-exitcode 9 python benchmarks/gpu/sanitize.py
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch is imported

import torch

from megatron_oreal.loss import LossSettings, TokenCoefficients
from megatron_oreal.loss.kernels import Kernels
from megatron_oreal.loss.library import choose_kernels


def run(kernels: Kernels, dtype: torch.dtype, rows: int, width: int, vocab_size: int, offset: int) -> None:
    host = torch.randn(offset + rows * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = host.cuda()[offset:].view(rows, width)  # ends where its allocation ends
    labels = torch.arange(rows).remainder(vocab_size).cuda()
    active = torch.arange(rows).remainder(3).ne(1).cuda()
    vectors = torch.rand(5, rows, generator=torch.Generator().manual_seed(1)).cuda().unbind()
    status = torch.zeros(1, dtype=torch.int32).cuda()
    columns = {"vocab_start": 0, "vocab_size": vocab_size, "temperature": 0.9}
    statistics = kernels.row_statistics(logits, labels, **columns, active=active, status=status)
    found = kernels.combine(statistics[None], TokenCoefficients(*vectors), temperature=0.9, active=active)
    kernels.gradient_(logits, labels, found.state, **columns, grad_out=torch.tensor(2.0).cuda())
    # to the host: a result that no kernel has written is seen by initcheck
    values = [logits.float().cpu(), found.state.cpu(), found.terms.cpu(), found.logp.cpu(), found.entropy.cpu()]
    assert all(value.isfinite().all() for value in values), (dtype, rows, width)
    assert int(status.cpu()) == 0


def main() -> None:
    choice = choose_kernels(torch.device("cuda"))
    assert choice.kernels is not None, choice.line
    for dtype in (torch.bfloat16, torch.float32):
        for rows, width, vocab_size, offset in (
            *((4, 1, 1, 0), (4, 7, 7, 0), (5, 2048, 2048, 0), (3, 2051, 2051, 0)),
            *((3, 2051, 2049, 1), (4, 4112, 4100, 0), (2, 20000, 19999, 8)),
        ):
            run(choice.kernels, dtype, rows, width, vocab_size, offset)
    lengths = torch.tensor([0, 1, 4, 700, 3000])
    scores = torch.randn(3000, generator=torch.Generator().manual_seed(2)).round().cuda()
    strengths = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).cuda()
    for rescale in ("threshold", "topk"):
        for values in (scores, torch.full_like(scores, 0.3), scores.bfloat16()):
            found = choice.kernels.token_coefficients(
                values, lengths.cuda(), strengths, LossSettings(rescale=rescale), num_tokens=3000, kl=0.1
            )
            assert all(value.cpu().isfinite().all() for value in vars(found).values())
    print("ran every kernel")


if __name__ == "__main__":
    main()

"""The step between two halves of a decoder layer: residual and root mean square norm of 30 rows."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Problem, eager_and_compiled, largest_error
from vispec import ops

EPSILON = 1e-6


def plain(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' layers write it; returns the norm and the new residual."""
    residual = residual + hidden
    values = residual.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + EPSILON)
    return weight * values.to(weight.dtype), residual


def make(device: torch.device, generator: torch.Generator, *, M: int, C: int) -> Problem:
    hidden, before, weight = (
        torch.randn(*shape, generator=generator, device=device).bfloat16() for shape in ((M, C), (M, C), (C,))
    )
    residual, written = before.clone(), torch.zeros_like(hidden)

    # The sum is rounded before the norm reads it: that is what the layers do.
    total = hidden.double() + before.double()
    rounded = total.bfloat16().double()
    exact = weight.double() * rounded * torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + EPSILON)

    def restore() -> None:
        residual.copy_(before)
        written.fill_(torch.nan)

    def error_of(answer: tuple[Tensor, Tensor]) -> float:
        return max(largest_error(answer[0], exact), largest_error(answer[1], total))

    return Problem(
        run=lambda: ops.rms_norm(hidden, weight, output=written, epsilon=EPSILON, residual=residual),
        outputs=[written, residual],
        error=lambda: error_of((written, residual)),
        error_bound=2 * error_of(plain(hidden, before, weight)),
        bytes_moved=4 * hidden.nbytes + weight.nbytes,
        baselines=eager_and_compiled("PyTorch", plain, (hidden, before, weight), error_of),
        restore=restore,
    )


def _case(name: str, C: int) -> Case:
    return Case("rms_norm", f"{name}, 30 rows", make, {"M": 30, "C": C}, {"M": 3, "C": 200}, cold=False)


CASES = [_case("LLaVA 7B", 4096), _case("Qwen 3B", 2048)]

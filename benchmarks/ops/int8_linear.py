"""A linear layer of few rows with an int8 weight: a draft layer's largest product, and heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.ops.case import Baseline, Case, Problem, eager_and_compiled, largest_error
from vispec import ops

ROWS_AT_ONCE = 8192  # of a weight in float64


def dequantised(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return linear(rows, weight.to(rows.dtype)) * scales


def exactly(rows: Tensor, weight: Tensor) -> Tensor:
    """The product in float64, of a block of the weight at a time."""
    return torch.cat([rows.double() @ part.double().T for part in weight.split(ROWS_AT_ONCE)], dim=1)


def make(device: torch.device, generator: torch.Generator, *, M: int, N: int, C: int) -> Problem:
    rows = torch.randn(M, C, generator=generator, device=device).bfloat16()
    full = torch.empty(N, C, dtype=torch.bfloat16, device=device).normal_(std=C**-0.5, generator=generator)
    weight, scales = ops.int8_weight(full)
    short_scales = scales.bfloat16()
    written = torch.zeros(M, N, dtype=torch.bfloat16, device=device)
    exact = exactly(rows, weight) * scales.double()
    exact_full = exactly(rows, full)

    def error_of(answer: Tensor) -> float:
        return largest_error(answer, exact)

    arguments = (rows, weight, short_scales)
    return Problem(
        run=lambda: ops.int8_linear(rows, weight, scales, output=written),
        outputs=[written],
        error=lambda: error_of(written),
        error_bound=2 * error_of(dequantised(*arguments)),
        bytes_moved=weight.nbytes + scales.nbytes + rows.nbytes + written.nbytes,
        operations=2 * M * N * C,
        baselines=[
            Baseline(
                "PyTorch, bfloat16 weight", lambda: lambda: linear(rows, full), lambda y: largest_error(y, exact_full)
            ),
            *eager_and_compiled("PyTorch, int8 made bfloat16", dequantised, arguments, error_of),
        ],
    )


def _case(name: str, M: int, N: int, C: int) -> Case:
    return Case(
        "int8_linear", f"{name}, {M} rows", make, {"M": M, "N": N, "C": C}, {"M": M, "N": 40, "C": 112}, cold=True
    )


CASES = [
    _case("LLaVA 7B, gate or up", 8, 11008, 4096),
    _case("LLaVA 7B, gate or up", 30, 11008, 4096),
    _case("LLaVA 7B, head", 8, 32000, 4096),
    _case("Qwen 7B, head", 8, 152064, 3584),
]

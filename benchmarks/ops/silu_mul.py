"""The gated activation of a decoder layer's MLP over 30 rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.ops.case import Case, Problem, eager_and_compiled, largest_error
from vispec import ops


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def make(device: torch.device, generator: torch.Generator, *, M: int, I: int) -> Problem:  # noqa: E741
    # The two halves of one fused product, as the layers keep them.
    both = torch.randn(M, 2 * I, generator=generator, device=device).bfloat16()
    gate, up = both[:, :I], both[:, I:]
    written = torch.zeros(M, I, dtype=torch.bfloat16, device=device)
    exact = silu(gate.double()) * up.double()

    def error_of(answer: Tensor) -> float:
        return largest_error(answer, exact)

    return Problem(
        run=lambda: ops.silu_mul(gate, up, output=written),
        outputs=[written],
        error=lambda: error_of(written),
        error_bound=2 * error_of(plain(gate, up)),
        bytes_moved=3 * written.nbytes,
        baselines=eager_and_compiled("PyTorch", plain, (gate, up), error_of),
    )


def _case(name: str, units: int) -> Case:
    return Case("silu_mul", f"{name}, 30 rows", make, {"M": 30, "I": units}, {"M": 3, "I": 100}, cold=False)


CASES = [_case("LLaVA 7B", 11008), _case("Qwen 7B", 18944)]

"""The gated activation of a decoder layer's MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from vispec.ops.backend import native_for, stream_of
from vispec.ops.checks import check_rows


def silu_mul(gate: Tensor, up: Tensor, *, output: Tensor, parity: bool = True) -> None:
    """output = silu(gate) * up, where silu(x) = x / (1 + exp(-x)).

    Shapes (M rows, I units inside the MLP; all float32, float16 or bfloat16, all alike):
        gate, up: [M, I], last dimension contiguous, rows as they come: the two halves of one fused
            product will do.
        output: [M, I], written; may be `gate` or `up` itself.

    Returns:
        None; the destination is written.

    Raises:
        ValueError: a dtype, shape, device or stride that does not fit.

    Notes:
        `parity` rounds where the models of transformers do: silu(gate), taken in float32, to the
        dtype, then the product. Without it there is one rounding, at the end. In float32 both are
        the same. Does not synchronise; a CUDA graph can replay it.

    Source: Shazeer 2020 (GLU variants); the roundings are those of transformers' LlamaMLP.
    """
    op = "silu_mul"
    check_rows(op, "gate", gate, "M, I", gate)
    check_rows(op, "up", up, "M, I", gate)
    check_rows(op, "output", output, "M, I", gate)

    module = native_for(op, gate)
    if module is None:
        silu_mul_reference(gate, up, output=output, parity=parity)
        return
    module.silu_mul(gate, up, output=output, parity=parity, stream=stream_of(gate))


def silu_mul_reference(gate: Tensor, up: Tensor, *, output: Tensor, parity: bool = True) -> None:
    """`silu_mul` in plain PyTorch, on any device: the oracle of its tests."""
    silu = torch.nn.functional.silu
    output.copy_(silu(gate) * up if parity else silu(gate.float()) * up.float())

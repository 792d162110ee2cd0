"""Root mean square norm of rows, with the residual's addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from vispec.ops.backend import native_for, stream_of
from vispec.ops.checks import LOGITS_DTYPES, check_range, check_rows, check_tensor

# What the kernel keeps in registers: 4096 vectors of 16 bytes.
MAX_BYTES = 65536


def rms_norm(
    hidden: Tensor,
    weight: Tensor,
    *,
    output: Tensor,
    epsilon: float,
    residual: Tensor | None = None,
    parity: bool = True,
) -> None:
    """Divide each row by its root mean square and multiply by the weight, after an optional addition.

    Without a residual output = norm(hidden). With one, residual becomes residual + hidden (rounded to
    the dtype) and output = norm(residual): the step between two halves of a decoder layer.

    Shapes (M rows, C hidden units; all float32, float16 or bfloat16, all alike):
        hidden: [M, C], last dimension contiguous, rows as they come; M may be 0.
        weight: [C].
        output: [M, C], written; may be `hidden` itself.
        residual: [M, C], read and written, or None; no part of `hidden` or `output`.

    Units: `epsilon` is added to the mean of the squares.

    Returns:
        None; the destinations are written.

    Raises:
        ValueError: a dtype, shape, device or stride that does not fit, or rows above 64 KiB.

    Notes:
        The mean of the squares is taken in float32, in an order that depends on C alone.
        `parity` rounds exactly where the models of transformers do: the normalised value to the
        dtype, then its product with the weight. Without it there is one rounding, at the end. In
        float32 both are the same. A row with NaN or inf is NaN where the model's is; other rows do
        not see it. Does not synchronise; a CUDA graph can replay it.

    Source: Zhang and Sennrich 2019; the roundings are those of transformers' LlamaRMSNorm.
    """
    op = "rms_norm"
    _, C = check_rows(op, "hidden", hidden, "M, C", hidden)
    check_tensor(op, "weight", weight, hidden.dtype, "C", (C,), hidden)
    check_rows(op, "output", output, "M, C", hidden)
    if residual is not None:
        check_rows(op, "residual", residual, "M, C", hidden)
    check_range(op, "C (hidden units)", C, 1, MAX_BYTES // hidden.element_size())

    module = native_for(op, hidden)
    if module is None:
        rms_norm_reference(hidden, weight, output=output, epsilon=epsilon, residual=residual, parity=parity)
        return
    module.rms_norm(
        hidden,
        weight,
        output=output,
        residual=residual,
        epsilon=epsilon,
        parity=parity,
        stream=stream_of(hidden),
    )


def serves_layers(like: Tensor) -> bool:
    """Whether `rms_norm`, `silu_mul` and `rope_append` have native code for tensors of this dtype and device."""
    return like.dtype in LOGITS_DTYPES and native_for("rms_norm", like) is not None


def rms_norm_reference(
    hidden: Tensor,
    weight: Tensor,
    *,
    output: Tensor,
    epsilon: float,
    residual: Tensor | None = None,
    parity: bool = True,
) -> None:
    """`rms_norm` in plain PyTorch, on any device: the oracle of its tests."""
    if residual is not None:
        hidden = residual.add_(hidden)
    values = hidden.to(torch.float32)
    variance = values.pow(2).mean(-1, keepdim=True)
    values = values * torch.rsqrt(variance + epsilon)
    output.copy_(weight * values.to(weight.dtype) if parity else weight.float() * values)

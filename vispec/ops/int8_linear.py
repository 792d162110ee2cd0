"""A product of a few rows with an int8 matrix: a linear layer at half the bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vispec.ops.backend import kernels_for, stream_of
from vispec.ops.checks import check_kind, check_range, check_rows, check_tensor

LARGEST = 127
MAX_COLUMNS = 1 << 24  # the kernel's offsets within 32 rows of the weight are 32 bits
# Of a weight, as float32 at once: a head of 152064 x 3584 would take 2 GiB.
BLOCK_ELEMENTS = 1 << 23


def int8_linear(rows: Tensor, weight: Tensor, scales: Tensor, *, output: Tensor, bias: Tensor | None = None) -> None:
    """output[m, n] = scales[n] * sum over c of rows[m, c] * weight[n, c], plus bias[n], rounded once.

    Shapes (M rows, C hidden units, N output columns):
        rows: [M, C] float32, float16 or bfloat16, last dimension contiguous, rows as they come; M may be 0.
        weight: [N, C] int8, as `int8_weight` gives it; any value, -128 too. On a GPU it starts at a multiple of 16
            bytes.
        scales: [N] float32.
        output: [M, N] of the rows' dtype, last dimension contiguous, rows as they come; written, no part of `rows`.
        bias: [N] of the rows' dtype, or None.

    Returns:
        None; the destination is written.

    Raises:
        ValueError: a dtype, shape, device or stride that does not fit, or C no multiple of 16.

    Notes:
        Sums are float32. The kernel adds in an order that depends on C alone: a row's bits do not depend on the rows
        beside it. It is made for up to 16 rows, and takes up to 32 for one reading of the weight; rows that do not
        start at multiples of 16 bytes are right, and slower. Does not synchronise; a CUDA graph can replay it. CPU
        tensors take the PyTorch reference.

    Source: original.
    """
    op = "int8_linear"
    M, C = check_rows(op, "rows", rows, "M, C", rows)
    if C % 16 != 0:
        raise ValueError(f"{op}: C (hidden units) must be a multiple of 16, got {C}")
    check_range(op, "C (hidden units)", C, 16, MAX_COLUMNS)
    check_tensor(op, "weight", weight, torch.int8, "N, C", (-1, C), rows)
    N = weight.shape[0]
    check_tensor(op, "scales", scales, torch.float32, "N", (N,), rows)
    check_kind(op, "output", output, rows.dtype, "M, N", (M, N), rows)
    if N > 1 and output.stride(1) != 1:
        raise ValueError(f"{op}: the last dimension of output must be contiguous, got strides {output.stride()}")
    if bias is not None:
        check_tensor(op, "bias", bias, rows.dtype, "N", (N,), rows)

    module = kernels_for(op, rows)
    if module is None:
        int8_linear_reference(rows, weight, scales, output=output, bias=bias)
        return
    module.int8_linear(rows, weight, scales, output=output, bias=bias, stream=stream_of(rows))


def int8_linear_reference(
    rows: Tensor, weight: Tensor, scales: Tensor, *, output: Tensor, bias: Tensor | None = None
) -> None:
    """`int8_linear` in plain PyTorch, on any device: the oracle of its tests."""
    values = rows.float()
    for part in _blocks(weight):
        product = values @ weight[part].float().T * scales[part]
        output[:, part] = product if bias is None else product + bias[part].float()


def int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a matrix to 127 steps on either side of zero.

    Shapes:
        weight: [N, C] float32, float16 or bfloat16, last dimension contiguous.

    Returns:
        The rounded weight, int8 [N, C] from -127 to 127, and the rows' steps, float32 [N]: the row's largest
        magnitude / 127. A row of zeros has step 0.

    Raises:
        ValueError: a weight that does not fit, or that is not finite.

    Notes:
        Allocates the results, and a block of rows at a time in float32. Synchronises.
    """
    op = "int8_weight"
    N, C = check_rows(op, "weight", weight, "N, C", weight)
    check_range(op, "C (hidden units)", C, 1, MAX_COLUMNS)
    rounded = torch.empty(N, C, dtype=torch.int8, device=weight.device)
    scales = torch.empty(N, dtype=torch.float32, device=weight.device)
    for part in _blocks(weight):
        values = weight[part].float()
        largest = values.abs().amax(dim=1)  # NaN where there is one
        if not bool(largest.isfinite().all()):
            row = part.start + int((~largest.isfinite()).nonzero()[0])
            raise ValueError(f"{op}: weight must be finite, got {float(largest[row - part.start])} in row {row}")
        scales[part] = largest / LARGEST
        # Where the step is so small that it has few bits, the quotient may lie above 127.
        steps = values / scales[part].where(scales[part] > 0, 1.0).unsqueeze(1)
        rounded[part] = steps.round_().clamp_(-LARGEST, LARGEST)
    return rounded, scales


def _blocks(weight: Tensor) -> Iterator[slice]:
    """The rows of a weight, as many at a time as may be in float32."""
    N, C = weight.shape
    count = max(BLOCK_ELEMENTS // C, 1)
    for start in range(0, N, count):
        yield slice(start, min(start + count, N))

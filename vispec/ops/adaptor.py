"""A vision adaptor's attention over image rows that are never projected."""

from __future__ import annotations

import torch
from torch import Tensor

from vispec.ops.backend import kernels_for, stream_of
from vispec.ops.checks import LOGITS_DTYPES, check_range, check_tensor, check_tensors, describe


def adaptor(queries: Tensor, rows: Tensor, starts: Tensor, lengths: Tensor, *, output: Tensor) -> None:
    """Attend with R fixed queries over the rows of every span: rows are keys and values at once.

    output[p, r] = softmax over j of (queries[r] . rows[j]), times rows, over the rows j of span p.

    Shapes (R queries, N image rows, C hidden units, P spans):
        queries: [R, C] float32, float16 or bfloat16, folded with the key projection and with the softmax's scale.
        rows: [N, C] in the same dtype; rows outside every span may hold anything, NaN too.
        starts, lengths: [P] int64, span p is rows [starts[p], starts[p] + lengths[p]); spans may overlap, and what
            lies outside [0, N) is left out. A span without rows gives zeros.
        output: [P, R, C] in the same dtype, written.
        The kernels read vectors of 16 bytes: for them C is a multiple of 8, and queries and rows have a dense last
        dimension, row strides that are multiples of 8 and an address that is a multiple of 16.

    Returns:
        None; the destination is written.

    Raises:
        ValueError: a dtype, shape, device, stride or alignment that does not fit.

    Notes:
        Scores, softmax and sums in float32, the weights of a run of rows rounded to the rows' dtype; the same bits
        every time. CUDA kernels serve float16 and bfloat16 without synchronising, and a CUDA graph can replay them.
        float32, and every dtype on a CPU, runs in PyTorch span by span, which on a GPU waits for `starts` and
        `lengths`.

    Source: ViSpec (arXiv 2509.15235), section 3.1, for the attention; folding both projections into fixed matrices is
    original: sum_j w_j (V x_j + b) = V (sum_j w_j x_j) + b because weights sum to 1.
    """
    op = "adaptor"
    if not isinstance(rows, Tensor) or rows.dtype not in LOGITS_DTYPES or rows.dim() != 2:
        raise ValueError(f"{op}: rows must be float32, float16 or bfloat16 [N, C], got {describe(rows)}")
    N, C = rows.shape
    if not isinstance(queries, Tensor) or queries.dtype is not rows.dtype or queries.dim() != 2 or queries.size(1) != C:
        kind = str(rows.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: queries must be {kind} [R, C] = [*, {C}], got {describe(queries)}")
    if queries.device != rows.device:
        raise ValueError(f"{op}: queries must be on {rows.device} like the rest, got {queries.device}")
    R, P = queries.shape[0], starts.numel()
    check_range(op, "R (queries)", R, 1, 65535)
    check_range(op, "P (spans)", P, 1, 65535)
    check_tensors(op, {"starts": starts, "lengths": lengths}, torch.int64, "P", (P,), rows)
    check_tensor(op, "output", output, rows.dtype, "P, R, C", (P, R, C), rows)

    module = None if rows.dtype is torch.float32 else kernels_for(op, rows)
    if module is None:
        adaptor_reference(queries, rows, starts, lengths, output=output)
        return
    for name, tensor in (("queries", queries), ("rows", rows)):
        _check_vectors(op, name, tensor)
    needed = module.adaptor_workspace_bytes(N, C, R, P)
    workspace = torch.empty(needed, dtype=torch.uint8, device=rows.device)
    module.adaptor(queries, rows, starts, lengths, output=output, workspace=workspace, stream=stream_of(rows))


def adaptor_reference(queries: Tensor, rows: Tensor, starts: Tensor, lengths: Tensor, *, output: Tensor) -> None:
    """`adaptor` in plain PyTorch, on any device: the oracle. Span by span."""
    N = rows.shape[0]
    for span, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        start = min(max(start, 0), N)
        output[span] = attend(queries, rows[start : start + min(max(length, 0), N - start)])


def attend(queries: Tensor, rows: Tensor) -> Tensor:
    """`adaptor` over one span that is all of `rows` [N, C]: [R, C]. Gradients flow through."""
    return torch.softmax((queries @ rows.T).float(), dim=-1).to(rows.dtype) @ rows


def _check_vectors(op: str, name: str, tensor: Tensor) -> None:
    """Require lines of a matrix that vectors of 16 bytes can read."""
    C = tensor.shape[1]
    if C == 0 or C % 8:
        raise ValueError(f"{op}: C (hidden units) must be a multiple of 8, got {C}")
    if tensor.stride(1) != 1 or tensor.stride(0) % 8:
        raise ValueError(f"{op}: {name} must have strides (a multiple of 8, 1), got {tensor.stride()}")
    if tensor.data_ptr() % 16:
        raise ValueError(f"{op}: {name} must start at a multiple of 16 bytes, got {tensor.data_ptr():#x}")

"""The accepted rows of the key-value cache moved to where committed tokens lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vispec.ops.backend import native_for, stream_of
from vispec.ops.checks import check_tensor, describe


def commit(
    tensors: Sequence[Tensor],
    path: Tensor,
    counts: Tensor,
    lengths: Tensor,
    *,
    table: Tensor | None = None,
) -> None:
    """Move, in every tensor, slot lengths + path[j] to slot lengths + j for j below counts.

    Shapes (B batch, G heads, L slots, D longest path; integers int64):
        tensors: each [B, G, L, head], all with the same shape, strides, dtype and device; keys and
            values of every layer, for example. Changed in place.
        path: [B, D] node indices, root first and ascending (`accept` writes them so), -1 beyond
            counts.
        counts: [B] nodes to commit. lengths: [B] tokens committed before this round.
        table: int64 [len(tensors)] on the GPU, from `pointer_table(tensors)`; None makes one for
            this call.

    Returns:
        None.

    Raises:
        ValueError: a dtype, shape, stride or device that does not fit, or tensors that differ; on
            the CPU also a path which leaves [0, L).

    Notes:
        Path nodes ascend, so a destination never lies behind its source and no copy of the rows is
        needed.
        Under CUDA graph capture pass a table and keep it alive as long as the graph: without one, a
        copy from the host is made, which a graph cannot hold. Does not synchronise.

    Source: original.
    """
    op = "commit"
    if len(tensors) == 0:
        raise ValueError(f"{op}: tensors must hold at least one tensor, got none")
    first = tensors[0]
    if first.dim() != 4 or (first.shape[3] > 1 and first.stride(3) != 1):
        raise ValueError(
            f"{op}: tensors must be [B, G, L, head] with a contiguous last dimension, "
            f"got {describe(first)} with strides {first.stride()}"
        )
    kind = (first.shape, first.stride(), first.dtype, first.device)
    for index, tensor in enumerate(tensors):
        if (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) != kind:
            raise ValueError(
                f"{op}: all tensors must be alike; "
                f"tensors[0] is {describe(first)} {first.stride()}, "
                f"tensors[{index}] is {describe(tensor)} {tensor.stride()} on {tensor.device}"
            )
    B = first.shape[0]
    D = path.shape[-1] if path.dim() == 2 else -1
    check_tensor(op, "path", path, torch.int64, "B, D", (B, D), first)
    check_tensor(op, "counts", counts, torch.int64, "B", (B,), first)
    check_tensor(op, "lengths", lengths, torch.int64, "B", (B,), first)

    module = native_for(op, first)
    if module is None:
        commit_reference(tensors, path, counts, lengths)
        return
    if first.is_cuda:
        table = pointer_table(tensors) if table is None else table
        check_tensor(op, "table", table, torch.int64, "len(tensors)", (len(tensors),), first)
    else:
        table = None
    module.commit(list(tensors), path, counts, lengths, table=table, stream=stream_of(first))


def pointer_table(tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of `tensors` as int64 [len(tensors)] on their device, for `commit`.

    Notes:
        Copies from the host. Valid as long as none of the tensors is reallocated.
    """
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64).to(tensors[0].device)


def commit_reference(
    tensors: Sequence[Tensor],
    path: Tensor,
    counts: Tensor,
    lengths: Tensor,
    *,
    table: Tensor | None = None,
) -> None:
    """`commit` in plain PyTorch, on any device: the oracle of its tests."""
    B, _, L, _ = tensors[0].shape
    D = path.shape[1]
    places = torch.arange(D, device=path.device)
    valid = places < counts[:, None]
    source = torch.where(valid, lengths[:, None] + path, 0)
    target = torch.where(valid, lengths[:, None] + places, -1)
    if not tensors[0].is_cuda:
        _check_slots(path, counts, lengths, source, target, L, D)
    # Slots keep their own content unless some place of the path is written there.
    slots = torch.arange(L, device=path.device)
    hit = target[:, :, None] == slots
    origin = torch.where(hit.any(1), (source[:, :, None] * hit).sum(1), slots)
    for tensor in tensors:
        tensor.copy_(tensor.gather(2, origin[:, None, :, None].expand_as(tensor)))


def _check_slots(path: Tensor, counts: Tensor, lengths: Tensor, source: Tensor, target: Tensor, L: int, D: int) -> None:
    for row in range(path.shape[0]):
        count, length = int(counts[row]), int(lengths[row])
        if count < 0 or count > D or length < 0:
            raise ValueError(
                f"commit: counts must be from 0 to {D} and lengths not negative, got {count} and {length} in row {row}"
            )
        nodes = path[row, :count].tolist()
        ascending = all(a < b for a, b in zip(nodes, nodes[1:], strict=False))
        if not ascending or (count and (nodes[0] < 0 or length + nodes[-1] >= L)):
            raise ValueError(
                f"commit: path must ascend from 0 to {L - 1 - length} (L={L}, length {length}), "
                f"got {nodes} in row {row}"
            )

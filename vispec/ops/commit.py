"""What a round leaves: accepted rows of the cache where committed tokens lie, each row's state, the draft's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vispec.ops.backend import native_for, stream_of
from vispec.ops.checks import check_kind, check_range, check_tensor, check_tensors, describe


class RowState(NamedTuple):
    """Where each row stands: int64 [B] tensors, changed in place."""

    lengths: Tensor
    """Committed tokens; counts are added."""
    positions: Tensor
    """What a rotary embedding sees at the next root; counts are added."""
    remaining: Tensor
    """Tokens that the row may still emit; counts are taken off."""
    roots: Tensor
    """The last token that was emitted; left alone where counts is 0."""


class Gather(NamedTuple):
    """What the draft learns of a round."""

    features: Tensor
    """[B, T, C] of all nodes, of any floating-point dtype; last dimension contiguous, the others as they come."""
    picked: Tensor
    """[B, D, C] like `features`, written: those of the path's nodes, zeros beyond counts."""
    tokens: Tensor
    """[B, D] int64, written: the token emitted at each node, 0 beyond counts."""


def commit(
    tensors: Sequence[Tensor],
    path: Tensor,
    emitted: Tensor,
    counts: Tensor,
    starts: Tensor,
    *,
    table: Tensor | None = None,
    rows: RowState | None = None,
    gather: Gather | None = None,
) -> None:
    """Move, in every tensor, slot starts + path[j] to slot starts + j for j below counts; advance the rows' state;
    gather what the draft learns.

    Shapes (B batch, G heads, L slots, T nodes, D longest path, C hidden units; integers int64):
        tensors: each [B, G, L, head], all with the same shape, strides, dtype and device; keys and
            values of every layer, for example. Changed in place. None at all: nothing moves.
        path: [B, D] node indices, root first and ascending (`accept` writes them so); emitted: [B, D]
            the token at each. What lies beyond counts is not used.
        counts: [B] nodes to commit.
        starts: [B] with any stride, the slot of node 0: tokens committed before this round. Not the
            memory of `rows.lengths`, which is written while this is read.
        table: int64 [len(tensors)] on the GPU, from `pointer_table(tensors)`; None makes one for
            this call.
        rows: [B] each; None: no state is advanced.
        gather: None: nothing is gathered.

    Returns:
        None.

    Raises:
        ValueError: a dtype, shape, stride or device that does not fit, or tensors that differ; on
            the CPU also a path which leaves [0, L - starts) or the T nodes, before anything changes.

    Notes:
        Path nodes ascend, so a destination never lies behind its source and no copy of the rows is
        needed. One launch on a GPU, where a node out of range moves nothing and gathers zeros.
        Under CUDA graph capture pass a table and keep it alive as long as the graph: without one, a
        copy from the host is made, which a graph cannot hold. Does not synchronise.

    Source: original.
    """
    op, like = "commit", path
    B, D = path.shape if path.dim() == 2 else (-1, -1)
    check_tensors(op, {"path": path, "emitted": emitted}, torch.int64, "B, D", (B, D), like)
    check_range(op, "D (longest path)", D, 1, 1 << 20)
    check_tensor(op, "counts", counts, torch.int64, "B", (B,), like)
    check_kind(op, "starts", starts, torch.int64, "B", (B,), like)
    _check_moved(op, tensors, B, like)
    if rows is not None:
        check_tensors(op, {f"rows.{name}": one for name, one in rows._asdict().items()}, torch.int64, "B", (B,), like)
        if rows.lengths.data_ptr() == starts.data_ptr():
            raise ValueError(f"{op}: starts must not lie in the memory of rows.lengths, got one address for both")
    if gather is not None:
        _check_gather(op, gather, B, D, like)

    module = native_for(op, path)
    if module is None:
        commit_reference(tensors, path, emitted, counts, starts, rows=rows, gather=gather)
        return
    if path.is_cuda and len(tensors):
        table = pointer_table(tensors) if table is None else table
        check_tensor(op, "table", table, torch.int64, "len(tensors)", (len(tensors),), like)
    else:
        table = None
    places = {"table": table, "rows": rows and tuple(rows), "gather": gather and tuple(gather)}
    module.commit(list(tensors), path, emitted, counts, starts, stream=stream_of(path), **places)


def _check_moved(op: str, tensors: Sequence[Tensor], B: int, like: Tensor) -> None:
    if len(tensors) == 0:
        return
    first = tensors[0]
    if first.dim() != 4 or (first.shape[3] > 1 and first.stride(3) != 1):
        raise ValueError(
            f"{op}: tensors must be [B, G, L, head] with a contiguous last dimension, "
            f"got {describe(first)} with strides {first.stride()}"
        )
    check_kind(op, "tensors[0]", first, first.dtype, "B, G, L, head", (B, *first.shape[1:]), like)
    kind = (first.shape, first.stride(), first.dtype, first.device)
    for index, tensor in enumerate(tensors):
        if (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) != kind:
            raise ValueError(
                f"{op}: all tensors must be alike; "
                f"tensors[0] is {describe(first)} {first.stride()}, "
                f"tensors[{index}] is {describe(tensor)} {tensor.stride()} on {tensor.device}"
            )


def _check_gather(op: str, gather: Gather, B: int, D: int, like: Tensor) -> None:
    features = gather.features
    if not features.is_floating_point():
        raise ValueError(f"{op}: gather.features must be floating-point [B, T, C], got {describe(features)}")
    check_kind(op, "gather.features", features, features.dtype, "B, T, C", (B, -1, -1), like)
    T, C = features.shape[1:]
    if T == 0 or (C > 1 and features.stride(2) != 1):
        raise ValueError(
            f"{op}: gather.features must have nodes and a contiguous last dimension, "
            f"got {describe(features)} with strides {features.stride()}"
        )
    check_tensor(op, "gather.picked", gather.picked, features.dtype, "B, D, C", (B, D, C), like)
    check_tensor(op, "gather.tokens", gather.tokens, torch.int64, "B, D", (B, D), like)


def pointer_table(tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of `tensors` as int64 [len(tensors)] on their device, for `commit`.

    Notes:
        Copies from the host. Valid as long as none of the tensors is reallocated.
    """
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64).to(tensors[0].device)


def commit_reference(
    tensors: Sequence[Tensor],
    path: Tensor,
    emitted: Tensor,
    counts: Tensor,
    starts: Tensor,
    *,
    table: Tensor | None = None,
    rows: RowState | None = None,
    gather: Gather | None = None,
) -> None:
    """`commit` in plain PyTorch, on any device: the oracle of its tests."""
    if not path.is_cuda:
        _check_values(tensors, path, counts, starts, gather)
    places = torch.arange(path.shape[1], device=path.device)
    inside = places < counts[:, None]
    if len(tensors):
        source = torch.where(inside, starts[:, None] + path, 0)
        target = torch.where(inside, starts[:, None] + places, -1)
        # Slots keep their own content unless some place of the path is written there.
        slots = torch.arange(tensors[0].shape[2], device=path.device)
        hit = target[:, :, None] == slots
        origin = torch.where(hit.any(1), (source[:, :, None] * hit).sum(1), slots)
        for tensor in tensors:
            tensor.copy_(tensor.gather(2, origin[:, None, :, None].expand_as(tensor)))
    if gather is not None:
        nodes = torch.where(inside, path, 0)[:, :, None].expand(gather.picked.shape)
        gather.picked.copy_(gather.features.gather(1, nodes)).masked_fill_(~inside[:, :, None], 0)
        gather.tokens.copy_(torch.where(inside, emitted, 0))
    if rows is not None:
        last = emitted.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        rows.roots.copy_(torch.where(counts > 0, last, rows.roots))
        rows.lengths.add_(counts)
        rows.positions.add_(counts)
        rows.remaining.sub_(counts)


def _check_values(
    tensors: Sequence[Tensor], path: Tensor, counts: Tensor, starts: Tensor, gather: Gather | None
) -> None:
    D = path.shape[1]
    for row, (count, start) in enumerate(zip(counts.tolist(), starts.tolist(), strict=True)):
        if count < 0 or count > D or start < 0:
            raise ValueError(
                f"commit: counts must be from 0 to {D} and starts not negative, got {count} and {start} in row {row}"
            )
        # Nodes there are: slots behind the start, rows of features.
        known = min(
            tensors[0].shape[2] - start if len(tensors) else torch.iinfo(torch.int64).max,
            torch.iinfo(torch.int64).max if gather is None else gather.features.shape[1],
        )
        nodes = path[row, :count].tolist()
        ascending = all(a < b for a, b in zip(nodes, nodes[1:], strict=False))
        if not ascending or (count and (nodes[0] < 0 or nodes[-1] >= known)):
            raise ValueError(f"commit: path must ascend from 0 to {known - 1}, got {nodes} in row {row}")

"""Attention of a tree's nodes over a ragged key-value cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vispec.ops.backend import kernels_for, stream_of
from vispec.ops.checks import check_kind, check_range, check_tensor, describe
from vispec.ops.rope_append import Tail, check_alike, check_tail, rope_append_reference

HEADS = (64, 80, 96, 128, 256)
MAX_SLOTS = 256
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *KERNEL_DTYPES)


def tree_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    *,
    output: Tensor,
    offset: int = 0,
    scale: float | None = None,
    tail: Tail | None = None,
) -> None:
    """Attend from T new nodes a row to its committed slots and to the tail slots of each node's ancestors.

    The tail is the S = offset + T slots behind the committed ones; the nodes' own keys and values lie in its last T,
    those of earlier passes over the same tree before them. Without `tail` all of it is in the cache already, and the
    queries are rotated. With `tail` the same launch does the work of `rope_append(queries, tail, keys, values,
    lengths, offset=offset)` first, with the same bits in the output and in the cache.

    Shapes (B batch, H query heads, G key-value heads, T nodes, L cache slots, D head width; integers int64):
        queries: [B, H, T, D] float16, bfloat16 or float32, D one of 64, 80, 96, 128 and 256.
        keys, values: [B, G, L, D], query head h reads head h // (H / G). Both with the same strides. Appended to
            where there is a `tail`, otherwise only read.
        ancestors: [B, T, W], W = ceil(S / 64): bit i % 64 of word i // 64 lets the node see tail slot lengths + i.
        lengths: [B] committed slots, which every node sees; taken as the nearest of 0 and L where they lie outside.
        output: [B, H, T, D] written in place; a view of [B, T, H * D] will do.
        All float tensors: one dtype, last dimension contiguous, other strides multiples of 8 elements, first element
        at a multiple of 16 bytes.

    Args:
        offset: tail slots before the nodes' own.
        scale: factor of the products of queries and keys; None: D to the power -1/2.
        tail: the nodes' keys and values as the projections leave them, with an R that is a multiple of 16; the
            queries are then as their projection leaves them too.

    Returns:
        None.

    Raises:
        ValueError: a dtype, shape, device, stride or address that does not fit, or S above 256.

    Notes:
        A node that sees nothing gets zeros. Slots that no node of a row sees may hold anything, NaN too. Sums are
        float32, weights are rounded to the values' dtype. The same bits every time, whatever the other rows hold.
        There is no kernel for float32: such tensors take the reference, over all L slots. Does not synchronise; a
        CUDA graph can replay it, and reads the lengths that it then finds.

    Source: the tree mask is SpecInfer's (arXiv 2305.09781), the split over keys that of flash decoding; the rest is
        original.
    """
    op = "tree_attention"
    own = (queries, keys, values, ancestors, lengths, output)
    check_attention(op, *own, most_slots=MAX_SLOTS, offset=offset, widths=HEADS)
    B, H, T, D = queries.shape
    G, L = keys.shape[1:3]
    for name, tensor in {"queries": queries, "keys": keys, "values": values, "output": output}.items():
        check_vectors(op, name, tensor)
    if tail is not None:
        check_tail(op, tail, queries, G)
        for name, tensor in zip(Tail._fields, tail, strict=True):
            if tensor is not None:
                check_vectors(op, f"tail.{name}", tensor)
        if tail.cosines.shape[2] % 16:
            raise ValueError(f"{op}: tail.cosines must have a multiple of 16 columns, got {tail.cosines.shape[2]}")
    scale = checked_scale(op, scale, D)

    module = kernels_for(op, queries) if queries.dtype in KERNEL_DTYPES else None
    if module is None:
        tree_attention_reference(
            queries, keys, values, ancestors, lengths, output=output, offset=offset, scale=scale, tail=tail
        )
        return
    needed = module.tree_attention_workspace_bytes(B=B, H=H, G=G, T=T, L=L, head=D)
    module.tree_attention(
        queries,
        keys,
        values,
        ancestors,
        lengths,
        output=output,
        tail=None if tail is None else tuple(tail),
        slots=offset + T,
        scale=scale,
        workspace=torch.empty(needed, dtype=torch.uint8, device=queries.device),
        stream=stream_of(queries),
    )


def serves_tree_attention(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `tree_attention` has a kernel for such tensors on their device, and not the reference only.

    Shapes as for `tree_attention`. Does not synchronise.
    """
    alike = keys.shape == values.shape and keys.stride() == values.stride() and queries.dtype == keys.dtype
    if not alike or queries.dtype not in KERNEL_DTYPES:
        return False
    T, D = queries.shape[2:]
    if D not in HEADS or T > MAX_SLOTS or not all(map(has_vectors, (queries, keys, values))):
        return False
    return kernels_for("tree_attention", queries) is not None


def check_attention(
    op: str,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    output: Tensor,
    *,
    most_slots: int,
    offset: int = 0,
    widths: Sequence[int] | None = None,
) -> None:
    """Require the dtypes and shapes of `tree_attention`, with at most so many slots behind the committed ones."""
    if not isinstance(queries, Tensor) or queries.dtype not in DTYPES or queries.dim() != 4:
        raise ValueError(f"{op}: queries must be float32, float16 or bfloat16 [B, H, T, D], got {describe(queries)}")
    B, H, T, D = queries.shape
    G, L = keys.shape[1:3] if isinstance(keys, Tensor) and keys.dim() == 4 else (-1, -1)
    if widths is not None and D not in widths:
        raise ValueError(f"{op}: the head width D must be one of {', '.join(map(str, widths))}, got {D}")
    check_range(op, "T", T, 1, most_slots)
    check_range(op, "offset", offset, 0, most_slots - T)
    check_kind(op, "keys", keys, queries.dtype, "B, G, L, D", (B, G, L, D), queries)
    check_kind(op, "values", values, queries.dtype, "B, G, L, D", (B, G, L, D), queries)
    check_kind(op, "output", output, queries.dtype, "B, H, T, D", (B, H, T, D), queries)
    check_tensor(op, "ancestors", ancestors, torch.int64, "B, T, W", (B, T, (offset + T + 63) // 64), queries)
    check_tensor(op, "lengths", lengths, torch.int64, "B", (B,), queries)
    if min(B, D, G, L) < 1 or H % G != 0:
        raise ValueError(
            f"{op}: sizes must be positive and H a multiple of G, got {describe(queries)} and {describe(keys)}"
        )
    check_alike(op, "keys and values", keys, values)


def checked_scale(op: str, scale: float | None, width: int) -> float:
    """The factor of the products of queries and keys; None: `width` to the power -1/2."""
    scale = width**-0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be positive and finite, got {scale}")
    return scale


def has_vectors(tensor: Tensor) -> bool:
    """Whether every row of a tensor starts where 16-byte copies of 8 elements can start."""
    *outer, last = [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return last == 1 and all(stride % 8 == 0 for stride in outer) and tensor.data_ptr() % 16 == 0


def check_vectors(op: str, name: str, tensor: Tensor) -> None:
    """Require rows that start where 16-byte copies of 8 elements can start."""
    if not has_vectors(tensor):
        raise ValueError(
            f"{op}: {name} must have a contiguous last dimension, strides that are multiples of 8 and a first element "
            f"at a multiple of 16 bytes, got strides {tensor.stride()} and address {tensor.data_ptr():#x}"
        )


def tree_attention_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    *,
    output: Tensor,
    offset: int = 0,
    scale: float | None = None,
    tail: Tail | None = None,
) -> None:
    """`tree_attention` in plain PyTorch, with a dense mask and sums in float32: the oracle of its tests."""
    B, H, T, D = queries.shape
    G, L = keys.shape[1:3]
    if tail is not None:
        projected, queries = queries, torch.empty_like(queries)
        rope_append_reference(projected, tail, keys, values, lengths, output=queries, offset=offset)
    seen = visible_slots(ancestors, lengths, offset + T, L)
    # A weight of 0 does not silence a NaN in a slot that nobody sees.
    unseen = ~seen.any(dim=1)[:, None, :, None]
    heads = queries.float().reshape(B, G, H // G, T, D)
    scores = heads @ keys.float().masked_fill(unseen, 0)[:, :, None].transpose(-1, -2)
    scores = (scores * (D**-0.5 if scale is None else scale)).masked_fill(~seen[:, None, None], -torch.inf)
    best = scores.amax(dim=-1, keepdim=True)
    weights = (scores - best.masked_fill(best == -torch.inf, 0)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    sums = weights @ values.float().masked_fill(unseen, 0)[:, :, None]
    output.copy_((sums / total.masked_fill(total == 0, 1)).reshape(B, H, T, D))


def visible_slots(ancestors: Tensor, lengths: Tensor, tail: int, slots: int) -> Tensor:
    """Which of a cache's slots each node sees, [B, T, L] bool, from the words of a tail of so many slots."""
    lengths = lengths.clamp(0, slots)[:, None, None]
    place = torch.arange(slots, device=ancestors.device) - lengths
    inside = (place >= 0) & (place < tail)
    bit = place.clamp(0, tail - 1).expand(-1, ancestors.shape[1], -1)
    return (place < 0) | inside & (ancestors.gather(2, bit // 64) >> (bit % 64) & 1 == 1)

"""New tokens' projections to attention's inputs: bias, rotation, and the cache's next slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vispec.ops.backend import native_for, stream_of
from vispec.ops.checks import check_kind, check_range, check_tensor, describe

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_TOKENS = 65535  # blocks in a launch's second dimension


class Tail(NamedTuple):
    """Keys and values of T new tokens as the projections leave them, and what makes cache rows of them.

    Shapes (G key-value heads, D head width, R rotary columns, even, from 2 to D):
        keys, values: [B, G, T, D], both with the same strides; views of [B, T, G * D] will do.
        cosines, sines: [B, T, R] each frequency twice, as Hugging Face's rotary embeddings give them. Columns from R
            on are not rotated. Positions enter here alone; a token's slot says nothing about them.
        query_bias: [H * D]. key_bias, value_bias: [G * D]. None: nothing is added.
    """

    keys: Tensor
    values: Tensor
    cosines: Tensor
    sines: Tensor
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None


def rope_append(
    queries: Tensor,
    tail: Tail,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    output: Tensor,
    offset: int = 0,
) -> None:
    """Add biases, rotate the queries into `output` and the keys into the cache, and append the values.

    Shapes (B batch, H query heads, G key-value heads, T tokens, L cache slots, D head width):
        queries: [B, H, T, D] float32, float16 or bfloat16, the dtype of all; a view of [B, T, H * D] will do.
        tail: the tokens' keys, values, rotary tables and biases.
        keys, values: [B, G, L, D] the caches, with the same strides; slots lengths + offset + t are written, those
            that lie beyond L are not.
        lengths: [B] int64 committed slots; taken as the nearest of 0 and L where they lie outside.
        output: [B, H, T, D] written in place; must not overlap `queries`.

    Args:
        offset: slots between the committed ones and the first new token's own.

    Returns:
        None.

    Raises:
        ValueError: a dtype, shape, device or stride that does not fit.

    Notes:
        The bias, both products and their sum are each rounded to the dtype, where `apply_rotary_pos_emb` of Hugging
        Face's models rounds: the same bits as theirs. Does not synchronise; a CUDA graph can replay it.

    Source: rotary embeddings are RoFormer's (arXiv 2104.09864), here in the rotate-half form.
    """
    op = "rope_append"
    if not isinstance(queries, Tensor) or queries.dtype not in DTYPES or queries.dim() != 4:
        raise ValueError(f"{op}: queries must be float32, float16 or bfloat16 [B, H, T, D], got {describe(queries)}")
    B, H, T, D = queries.shape
    G, L = keys.shape[1:3] if isinstance(keys, Tensor) and keys.dim() == 4 else (-1, -1)
    if min(B, H, D, G, L) == 0:
        raise ValueError(f"{op}: sizes must be positive, got {describe(queries)} and {describe(keys)}")
    check_range(op, "T", T, 1, MAX_TOKENS)
    check_kind(op, "keys", keys, queries.dtype, "B, G, L, D", (B, G, L, D), queries)
    check_kind(op, "values", values, queries.dtype, "B, G, L, D", (B, G, L, D), queries)
    check_kind(op, "output", output, queries.dtype, "B, H, T, D", (B, H, T, D), queries)
    check_range(op, "offset", offset, 0, L)
    check_tensor(op, "lengths", lengths, torch.int64, "B", (B,), queries)
    check_tail(op, tail, queries, G)
    check_alike(op, "keys and values", keys, values)
    for name, tensor in {"queries": queries, "keys": keys, "output": output, "tail.keys": tail.keys}.items():
        if D > 1 and tensor.stride(3) != 1:
            raise ValueError(f"{op}: the last dimension of {name} must be contiguous, got strides {tensor.stride()}")

    module = native_for(op, queries)
    if module is None:
        rope_append_reference(queries, tail, keys, values, lengths, output=output, offset=offset)
        return
    module.rope_append(
        queries, tuple(tail), keys, values, lengths, output=output, offset=offset, stream=stream_of(queries)
    )


def check_tail(op: str, tail: Tail, queries: Tensor, G: int) -> None:
    """Require a tail that fits queries [B, H, T, D] and G key-value heads."""
    B, H, T, D = queries.shape
    if not isinstance(tail, Tail):
        raise ValueError(f"{op}: tail must be a Tail, got {describe(tail)}")
    R = tail.cosines.shape[-1] if isinstance(tail.cosines, Tensor) and tail.cosines.dim() == 3 else -1
    for name in ("keys", "values"):
        check_kind(op, f"tail.{name}", getattr(tail, name), queries.dtype, "B, G, T, D", (B, G, T, D), queries)
    for name in ("cosines", "sines"):
        check_tensor(op, f"tail.{name}", getattr(tail, name), queries.dtype, "B, T, R", (B, T, R), queries)
    if R % 2 or not 2 <= R <= D:
        raise ValueError(f"{op}: tail.cosines must have an even number of columns from 2 to {D}, got {R}")
    for name, heads in (("query_bias", H), ("key_bias", G), ("value_bias", G)):
        bias = getattr(tail, name)
        if bias is not None:
            check_tensor(op, f"tail.{name}", bias, queries.dtype, "heads * D", (heads * D,), queries)
    check_alike(op, "tail.keys and tail.values", tail.keys, tail.values)


def check_alike(op: str, names: str, first: Tensor, second: Tensor) -> None:
    """Require equal strides of two tensors of one shape."""
    if first.stride() != second.stride():
        raise ValueError(f"{op}: {names} must have equal strides, got {first.stride()} and {second.stride()}")


def rope_append_reference(
    queries: Tensor,
    tail: Tail,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    output: Tensor,
    offset: int = 0,
) -> None:
    """`rope_append` in plain PyTorch, on any device: the oracle of its tests."""
    output.copy_(rotate(with_bias(queries, tail.query_bias), tail.cosines, tail.sines))
    new_keys = rotate(with_bias(tail.keys, tail.key_bias), tail.cosines, tail.sines)
    L, T = keys.shape[2], queries.shape[2]
    token = torch.arange(L, device=lengths.device) - (lengths.clamp(0, L) + offset)[:, None]
    written = ((token >= 0) & (token < T))[:, None, :, None]
    source = token.clamp(0, T - 1)[:, None, :, None].expand(keys.shape)
    for new, cache in ((new_keys, keys), (with_bias(tail.values, tail.value_bias), values)):
        cache.copy_(torch.where(written, new.gather(2, source), cache))


def with_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    """Projections [B, heads, T, D] plus their bias [heads * D]."""
    return rows if bias is None else rows + bias.view(rows.shape[1], 1, rows.shape[3])


def rotate(rows: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotates the first R columns of [B, heads, T, D] by tables [B, T, R]."""
    turning, rest = rows.tensor_split([cosines.shape[2]], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cosines[:, None] + torch.cat([-second, first], dim=-1) * sines[:, None]
    return torch.cat([turned, rest], dim=-1)

"""Attention of a tree's nodes whose sums do not depend on the tree."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vispec.ops.backend import choice, native_for, stream_of
from vispec.ops.tree_attention import HEADS, KERNEL_DTYPES, check_attention, check_vectors, checked_scale

# Most nodes, and so the longest path. A multiple of the 16 rows of a matrix product's tile, and of the 24 that MKL
# works in where there is no AVX-512: with a part of a tile left over, its rows would be added up in another order.
PATH_NODES = 48
# Positions that are sealed together, and positions whose partial sums are merged with those of the next ones.
TILE, RUN = 64, 256


def path_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    *,
    output: Tensor,
    scale: float | None = None,
) -> None:
    """Attend as `tree_attention` does, with the same bits for a node whatever tree it stands in.

    A node's result is a function of its query and of the keys and values along its path, in order: the committed slots,
    then its ancestors and itself. It does not depend on which of these are committed already, on the slots of the
    others, on the other nodes, or on the node's own index. The number of nodes T (but where `counts_any_nodes`) and all
    sizes but L must be the same.

    Shapes (B batch, H query heads, G key-value heads, T nodes, L cache slots, D head width; integers int64):
        queries: [B, H, T, D] float16, bfloat16 or float32, rotated.
        keys, values: [B, G, L, D], query head h reads head h // (H / G). Both with the same strides. The nodes' own lie
            at slots lengths + t.
        ancestors: [B, T, 1]: bit i lets the node see slot lengths + i. Parents come before their children.
        lengths: [B] committed slots, which every node sees; taken as the nearest of 0 and L where they lie outside.
        output: [B, H, T, D] written in place; a view of [B, T, H * D] will do.
        All float tensors: one dtype, last dimension contiguous. On a GPU, for float16 and bfloat16 with a D of 64, 80,
            96, 128 or 256: other strides multiples of 8 elements, first element at a multiple of 16 bytes.

    Args:
        scale: factor of the products of queries and keys; None: D to the power -1/2.

    Returns:
        None.

    Raises:
        ValueError: a dtype, shape, device, stride or address that does not fit, or T above 48.

    Notes:
        A node that sees nothing gets zeros. Slots that no node of a row sees may hold anything, NaN too. Sums are
        float32. There is no GPU kernel for float32 and for other head widths: such tensors take the reference, over all
        L slots, whose products are those of PyTorch: that a row of them does not depend on its index is a property of
        the library, which `targets.check_rows` tries. Does not synchronise; a CUDA graph can replay it, and reads the
        lengths that it then finds.

    Source: original.
    """
    op = "path_attention"
    check_attention(op, queries, keys, values, ancestors, lengths, output, most_slots=PATH_NODES)
    B, H, T, D = queries.shape
    G, L = keys.shape[1:3]
    scale = checked_scale(op, scale, D)

    for name, tensor in {"queries": queries, "keys": keys, "output": output}.items():
        if D > 1 and tensor.stride(3) != 1:
            raise ValueError(f"{op}: the last dimension of {name} must be contiguous, got strides {tensor.stride()}")

    on_cpu = _is_for_cpu(queries)
    served = on_cpu or (queries.dtype in KERNEL_DTYPES and D in HEADS)
    module = native_for(op, queries) if served else None
    if module is None:
        path_attention_reference(queries, keys, values, ancestors, lengths, output=output, scale=scale)
        return
    if not on_cpu:
        for name, tensor in {"queries": queries, "keys": keys, "values": values, "output": output}.items():
            check_vectors(op, name, tensor)
    needed = module.path_attention_workspace_bytes(B=B, H=H, G=G, T=T, L=L, head=D, on_gpu=queries.is_cuda)
    module.path_attention(
        queries,
        keys,
        values,
        ancestors,
        lengths,
        output=output,
        scale=scale,
        workspace=torch.empty(needed, dtype=torch.uint8, device=queries.device) if needed else None,
        stream=stream_of(queries),
    )


def counts_any_nodes(queries: Tensor) -> bool:
    """Whether a node's bits do not depend on the number of nodes T either: so it is in native CPU code."""
    return _is_for_cpu(queries) and native_for("path_attention", queries) is not None


def _is_for_cpu(queries: Tensor) -> bool:
    return queries.device.type == "cpu" and choice() != "emulated"


def path_attention_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    *,
    output: Tensor,
    scale: float | None = None,
) -> None:
    """`path_attention` in plain PyTorch: the oracle of its tests.

    Keys below `sealed`, which depends on the node's position alone, are multiplied run by run, every run in a product
    of one size; the newest ones are gathered from each node's own path.
    """
    B, H, T, D = queries.shape
    G, L = keys.shape[1:3]
    group = H // G
    places = torch.arange(L + RUN, device=lengths.device)
    lengths = lengths.clamp(0, L)[:, None]
    on_path = (ancestors >> places[:T] & 1).bool() & (lengths + places[:T] < L)[:, None]
    seen = lengths + on_path.sum(2)
    sealed = (seen - PATH_NODES).clamp(min=0) // TILE * TILE
    rows = queries.reshape(B, G, group, T, D).transpose(2, 3).float() * (D**-0.5 if scale is None else scale)

    best = rows.new_full((B, G, T, group, 1), -torch.inf)
    total, sums = torch.zeros_like(best), torch.zeros_like(rows)

    def add(scores: Tensor, visible: Tensor, weigh_values) -> None:
        """One run of keys: scores [B, G, T, group, N], `visible` [B, T, N]."""
        nonlocal best, total, sums
        scores = scores.masked_fill(~visible[:, None, :, None], -torch.inf)
        before, best = best, torch.maximum(best, scores.amax(-1, keepdim=True))
        base = best.masked_fill(best == -torch.inf, 0)
        # Where nothing of this run is visible, this is exactly 1, and the weights exactly 0.
        kept, weights = (before - base).exp(), (scores - base).exp()
        total = total * kept + weights.sum(-1, keepdim=True)
        sums = sums * kept + weigh_values(weights)

    most = sealed.amax(1)[:, None]
    for start in range(0, L, RUN):
        run = places[start : start + RUN]
        # A weight of 0 does not silence a NaN in a slot that nobody sees.
        unseen = (run >= most)[:, None, :, None]
        run_keys, run_values = (
            F.pad(cache[:, :, start : start + RUN], (0, 0, 0, max(start + RUN - L, 0))).float().masked_fill(unseen, 0)
            for cache in (keys, values)
        )
        scores = rows.reshape(B, G, T * group, D) @ run_keys.transpose(2, 3)
        add(
            scores.view(B, G, T, group, RUN),
            run < sealed[:, :, None],
            lambda weights, run_values=run_values: (weights.flatten(2, 3) @ run_values).view_as(rows),
        )

    position = sealed[:, :, None] + places[: PATH_NODES + TILE]
    behind = position - lengths[:, :, None]
    # A stable sort by "is not on the path" lists a path's nodes first, in order.
    nodes = torch.argsort((~on_path).to(torch.uint8), dim=2, stable=True)
    slots = torch.where(behind < 0, position, lengths[:, :, None] + nodes.gather(2, behind.clamp(0, T - 1)))
    newest = position < seen[:, :, None]
    picked = slots.masked_fill(~newest, 0).view(B, 1, -1, 1).expand(B, G, -1, D)
    new_keys, new_values = (
        cache.gather(2, picked).view(B, G, T, -1, D).float().masked_fill(~newest[:, None, :, :, None], 0)
        for cache in (keys, values)
    )
    add(rows @ new_keys.transpose(3, 4), newest, lambda weights: weights @ new_values)
    result = sums / total.masked_fill(total == 0, 1)
    output.copy_(result.transpose(2, 3).reshape(B, H, T, D))

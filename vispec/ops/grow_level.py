"""One level of the draft tree, from logits to the next frontier."""

from __future__ import annotations

import torch
from torch import Tensor

from vispec.ops.backend import native_for, stream_of
from vispec.ops.checks import (
    LOGITS_DTYPES,
    check_kind,
    check_logits,
    check_range,
    check_tensor,
    check_tensors,
    describe,
)
from vispec.ops.order import best
from vispec.ops.tree_attention import MAX_SLOTS

MAX_TOP_K = 64


def grow_level(
    logits: Tensor,
    frontier_scores: Tensor,
    frontier: Tensor,
    *,
    candidate_tokens: Tensor,
    candidate_scores: Tensor,
    candidate_parents: Tensor,
    offset: int,
    next_frontier: Tensor,
    next_rows: Tensor,
    next_tokens: Tensor,
    next_scores: Tensor,
    arrivals: Tensor,
    head_tokens: Tensor | None = None,
    slots: int = 0,
    ancestors: Tensor | None = None,
    next_ancestors: Tensor | None = None,
    hidden: Tensor | None = None,
    next_hidden: Tensor | None = None,
) -> None:
    """Score the children of every frontier row and choose the next frontier among them.

    Each row's best K tokens become candidates at columns [offset, offset + R*K), row after row; the
    best K of those R*K children become the next frontier. Where the destinations are given, the same
    launch writes what the draft's next pass reads of each: the tail slots that it sees, for
    `tree_attention`, and the row of `hidden` that it descends from.

    Shapes (B batch, R frontier rows, V columns, N candidates, K top_k, C hidden units; integers int64):
        logits: [B, R, V] float32, float16 or bfloat16; last dimension contiguous, the others as
            they come.
        frontier_scores: [B, R] float32. frontier: [B, R] candidate index of each row, -1 for the
            root.
        candidate_tokens, candidate_scores (float32), candidate_parents: [B, N], written in place.
        next_frontier, next_rows, next_tokens, next_scores (float32): [B, K], written in place.
        arrivals: [B] int32 zeros, and zeros again afterwards: what a GPU's blocks count themselves in.
        head_tokens: [V] token of each column where the draft's head is reduced; None: the column
            itself.
        next_ancestors: [B, K, ceil((slots + K) / 64)] written in place, packed as `tree_attention`
            takes them: node k sees what its row sees, and tail slot slots + k, its own. None: left
            out. ancestors: [B, R, ceil(slots / 64)] what each row sees; not read where slots is 0.
        next_hidden: [B, K, C] written in place: the row of `hidden` that each node descends from.
            None: left out. hidden: [B, R, C] float32, float16 or bfloat16, whatever the logits are;
            last dimension contiguous, the others as they come.

    Args:
        offset: candidates of earlier levels, which stay as they are.
        slots: tail slots of earlier levels, before the next frontier's own.

    Units: scores are cumulative natural-log probabilities.

    Returns:
        None; the destinations are written.

    Raises:
        ValueError: a dtype, shape, device or stride that does not fit, K > V, or a level beyond N;
            slots + K above 256 with next_ancestors; on a GPU also V above 524287, or R * K above 16384.

    Notes:
        Ties: within a row by logit, then lower column; across rows by score, then lower child
        index. A NaN logit counts as -inf, and +inf as the largest float32. A row without any finite
        logit gives children of score -inf. No log-probability exceeds 0, so no child outranks its
        parent. Sums run in float32 within a block of columns and in float64 across blocks. Does not
        synchronise; a CUDA graph can replay it.

        On a GPU one launch does it all: the last block of a batch row to arrive goes on with what
        the others found, and sets the row's counter back. The caller owns the counters, so that no
        launch has to clear them first: one tensor serves all levels of a tree. Calls that may run at
        the same time must not share it.

    Source: EAGLE-2 (Li et al., 2024), section 4.1, for the expansion; the tie rules are original.
    """
    B, R, V = check_logits("grow_level", logits, "B, R, V")
    K = next_frontier.shape[-1] if next_frontier.dim() == 2 else -1
    N = candidate_tokens.shape[-1] if candidate_tokens.dim() == 2 else -1
    op, like = "grow_level", logits
    check_tensor(op, "frontier_scores", frontier_scores, torch.float32, "B, R", (B, R), like)
    check_tensor(op, "frontier", frontier, torch.int64, "B, R", (B, R), like)
    lists = {"candidate_tokens": candidate_tokens, "candidate_parents": candidate_parents}
    check_tensors(op, lists, torch.int64, "B, N", (B, N), like)
    check_tensor(op, "candidate_scores", candidate_scores, torch.float32, "B, N", (B, N), like)
    chosen = {"next_frontier": next_frontier, "next_rows": next_rows, "next_tokens": next_tokens}
    check_tensors(op, chosen, torch.int64, "B, K", (B, K), like)
    check_tensor(op, "next_scores", next_scores, torch.float32, "B, K", (B, K), like)
    if head_tokens is not None:
        check_tensor(op, "head_tokens", head_tokens, torch.int64, "V", (V,), like)
    check_range(op, "top_k", K, 1, min(V, MAX_TOP_K))
    check_range(op, "offset", offset, 0, N - R * K)
    check_tensor(op, "arrivals", arrivals, torch.int32, "B", (B,), like)
    if next_ancestors is not None:
        check_range(op, "slots", slots, 0, MAX_SLOTS - K)
        shape = (B, K, _words(slots + K))
        check_tensor(op, "next_ancestors", next_ancestors, torch.int64, "B, K, W", shape, like)
        if slots:
            check_tensor(op, "ancestors", ancestors, torch.int64, "B, R, W", (B, R, _words(slots)), like)
    if next_hidden is not None:
        _check_hidden(hidden, next_hidden, logits, K)

    module = native_for(op, logits)
    places = {**lists, "candidate_scores": candidate_scores, **chosen, "next_scores": next_scores}
    places |= {"arrivals": arrivals, "offset": offset, "head_tokens": head_tokens, "slots": slots}
    places |= {"ancestors": ancestors, "next_ancestors": next_ancestors, "hidden": hidden, "next_hidden": next_hidden}
    if module is None:
        grow_level_reference(logits, frontier_scores, frontier, **places)
        return
    needed = module.grow_level_workspace_bytes(B, R, V, K, logits.is_cuda)
    workspace = torch.empty(needed, dtype=torch.uint8, device=logits.device) if needed else None
    stream = stream_of(logits)
    module.grow_level(logits, frontier_scores, frontier, workspace=workspace, stream=stream, **places)


def _words(slots: int) -> int:
    """Words of 64 bits for so many tail slots."""
    return (slots + 63) // 64


def _check_hidden(hidden: Tensor | None, next_hidden: Tensor | None, logits: Tensor, K: int) -> None:
    op, (B, R, _) = "grow_level", logits.shape
    if not isinstance(hidden, Tensor) or hidden.dtype not in LOGITS_DTYPES or hidden.dim() != 3:
        raise ValueError(f"{op}: hidden must be float32, float16 or bfloat16 [B, R, C], got {describe(hidden)}")
    C = hidden.shape[2]
    check_kind(op, "hidden", hidden, hidden.dtype, "B, R, C", (B, R, C), logits)
    if C > 1 and hidden.stride(2) != 1:
        raise ValueError(f"{op}: the last dimension of hidden must be contiguous, got strides {hidden.stride()}")
    check_tensor(op, "next_hidden", next_hidden, hidden.dtype, "B, K, C", (B, K, C), logits)


def grow_level_reference(
    logits: Tensor,
    frontier_scores: Tensor,
    frontier: Tensor,
    *,
    candidate_tokens: Tensor,
    candidate_scores: Tensor,
    candidate_parents: Tensor,
    offset: int,
    next_frontier: Tensor,
    next_rows: Tensor,
    next_tokens: Tensor,
    next_scores: Tensor,
    arrivals: Tensor,
    head_tokens: Tensor | None = None,
    slots: int = 0,
    ancestors: Tensor | None = None,
    next_ancestors: Tensor | None = None,
    hidden: Tensor | None = None,
    next_hidden: Tensor | None = None,
) -> None:
    """`grow_level` in plain PyTorch, on any device: the oracle of its tests."""
    B, R, _ = logits.shape
    K = next_frontier.shape[1]
    largest = torch.finfo(torch.float32).max
    values = torch.nan_to_num(logits.float(), nan=-torch.inf, posinf=largest, neginf=-torch.inf)
    columns = best(values, K)
    # The maximum is taken out by hand: log_softmax of a row that is -inf throughout is NaN.
    top = values.amax(dim=-1, keepdim=True).clamp(min=-largest)
    log_sum = (values - top).exp().sum(dim=-1, keepdim=True, dtype=torch.float64).log().float()
    log_probabilities = (values.gather(-1, columns) - top) - log_sum.clamp(min=0)
    scores = (frontier_scores[:, :, None] + log_probabilities).reshape(B, R * K)
    scores = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    tokens = (columns if head_tokens is None else head_tokens[columns]).reshape(B, R * K)

    level = slice(offset, offset + R * K)
    candidate_tokens[:, level] = tokens
    candidate_scores[:, level] = scores
    candidate_parents[:, level] = frontier.repeat_interleave(K, dim=1)
    children = best(scores, K)
    next_frontier.copy_(children + offset)
    rows = children // K
    next_rows.copy_(rows)
    next_tokens.copy_(tokens.gather(1, children))
    next_scores.copy_(scores.gather(1, children))
    if next_ancestors is not None:
        own = slots + torch.arange(K, device=logits.device)[:, None]
        word = torch.arange(next_ancestors.shape[2], device=logits.device)
        next_ancestors.copy_((own // 64 == word) * (1 << own % 64))
        if slots:
            next_ancestors[:, :, : ancestors.shape[2]] |= _rows_of(ancestors, rows)
    if next_hidden is not None:
        next_hidden.copy_(_rows_of(hidden, rows))


def _rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """Of [B, R, C] the rows [B, K], [B, K, C]."""
    return values.gather(1, rows[:, :, None].expand(-1, -1, values.shape[2]))

"""The final draft tree, chosen among all scored candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from vispec.ops.backend import native_for, stream_of
from vispec.ops.checks import check_range, check_tensor, check_tensors, describe
from vispec.ops.order import best

MAX_NODES = 256
WORD_BITS = 64


def build_tree(
    root_tokens: Tensor,
    candidate_tokens: Tensor,
    candidate_scores: Tensor,
    candidate_parents: Tensor,
    *,
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    scores: Tensor,
) -> None:
    """Keep the best T-1 of N candidates, in order of creation, behind the root.

    Shapes (B batch, N candidates, T nodes, W = ceil(T / 64) words; integers int64):
        root_tokens: [B]. candidate_tokens, candidate_scores (float32), candidate_parents: [B, N]; a
            parent is a candidate index below the candidate's own; anything else makes a child of
            the root, -1 by convention.
        tokens, parents, depths, scores (float32): [B, T], ancestors: [B, T, W]; written in place.
            Node 0 is the
            root: parent -1, depth 0, score 0. Bit i % 64 of ancestors[b, n, i // 64] says that node
            i is an ancestor of n or n itself.

    Units: scores are cumulative natural-log probabilities; depths count ancestors.

    Returns:
        None; the destinations are written.

    Raises:
        ValueError: a dtype, shape or device that does not fit, T > N + 1, or T > 256.

    Notes:
        Ties: lower candidate index. Scores never rise along a path and a parent precedes its
        children, hence a kept candidate's parent is kept. NaN scores count as -inf. Does not
        synchronise.

    Source: EAGLE-2 (Li et al., 2024), section 4.2, for the reranking; the tie rule is original.
    """
    op, like = "build_tree", candidate_scores
    if candidate_scores.dim() != 2 or tokens.dim() != 2:
        raise ValueError(
            f"{op}: candidate_scores must be float32 [B, N] and tokens int64 [B, T], "
            f"got {describe(candidate_scores)} and {describe(tokens)}"
        )
    (B, N), T = candidate_scores.shape, tokens.shape[1]
    W = (T + WORD_BITS - 1) // WORD_BITS
    check_tensor(op, "root_tokens", root_tokens, torch.int64, "B", (B,), like)
    lists = {"candidate_tokens": candidate_tokens, "candidate_parents": candidate_parents}
    check_tensors(op, lists, torch.int64, "B, N", (B, N), like)
    check_tensor(op, "candidate_scores", candidate_scores, torch.float32, "B, N", (B, N), like)
    nodes = {"tokens": tokens, "parents": parents, "depths": depths}
    check_tensors(op, nodes, torch.int64, "B, T", (B, T), like)
    check_tensor(op, "ancestors", ancestors, torch.int64, "B, T, W", (B, T, W), like)
    check_tensor(op, "scores", scores, torch.float32, "B, T", (B, T), like)
    check_range(op, "T (nodes)", T, 1, min(N + 1, MAX_NODES))

    module = native_for(op, candidate_scores)
    places = {
        "tokens": tokens,
        "parents": parents,
        "depths": depths,
        "ancestors": ancestors,
        "scores": scores,
    }
    if module is None:
        build_tree_reference(root_tokens, candidate_tokens, candidate_scores, candidate_parents, **places)
    else:
        stream = stream_of(candidate_scores)
        module.build_tree(
            root_tokens,
            candidate_tokens,
            candidate_scores,
            candidate_parents,
            stream=stream,
            **places,
        )


def build_tree_reference(
    root_tokens: Tensor,
    candidate_tokens: Tensor,
    candidate_scores: Tensor,
    candidate_parents: Tensor,
    *,
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    scores: Tensor,
) -> None:
    """`build_tree` in plain PyTorch, on any device: the oracle of its tests."""
    (B, N), T = candidate_scores.shape, tokens.shape[1]
    device = tokens.device
    ranked = torch.nan_to_num(candidate_scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    kept = best(ranked, T - 1).sort(dim=1).values

    # node_of[b, c + 1] is the node of candidate c; column 0 stands for the root, which is
    # "candidate" -1.
    node_of = torch.zeros(B, N + 1, dtype=torch.int64, device=device)
    node_of.scatter_(1, kept + 1, torch.arange(1, T, device=device).expand(B, -1))

    tokens[:, 0] = root_tokens
    tokens[:, 1:] = candidate_tokens.gather(1, kept)
    scores[:, 0] = 0
    scores[:, 1:] = ranked.gather(1, kept)
    parents[:, 0] = -1
    above = candidate_parents.gather(1, kept)
    parents[:, 1:] = node_of.gather(1, torch.where((above >= 0) & (above < kept), above, -1) + 1)

    # A parent precedes its children: one pass in order of nodes completes every ancestor row.
    is_ancestor = torch.eye(T, dtype=torch.bool, device=device).repeat(B, 1, 1)
    rows = torch.arange(B, device=device)
    for node in range(1, T):
        is_ancestor[:, node] |= is_ancestor[rows, parents[:, node]]
    depths.copy_(is_ancestor.sum(dim=2) - 1)
    bit = torch.ones((), dtype=torch.int64, device=device) << torch.arange(WORD_BITS, device=device)
    padded = torch.nn.functional.pad(is_ancestor, (0, ancestors.shape[2] * WORD_BITS - T))
    ancestors.copy_((padded.view(B, T, -1, WORD_BITS) * bit).sum(dim=3))

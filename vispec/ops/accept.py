"""Verification: the target's own choice at every visited node, followed down the tree."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vispec.ops.backend import native_for, stream_of
from vispec.ops.checks import check_logits, check_range, check_tensor, check_tensors, describe
from vispec.ops.draw import MAX_VOCABULARY, draw_uniform, keep_weights, pick, token_weights


class Sampling(NamedTuple):
    """Sampling settings, one value per row: tensors [B] on the device of the logits."""

    temperature: Tensor
    """float32, above 0; for the greedy choice pass no Sampling at all."""
    top_k: Tensor
    """int64; 0: off."""
    top_p: Tensor
    """float32, from 0 to 1; 1: off."""
    min_p: Tensor
    """float32, from 0 to 1; 0: off."""
    seeds: Tensor
    """int64, all 64 bits are the Philox key."""


def accept(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    lengths: Tensor,
    *,
    end_tokens: Tensor,
    remaining: Tensor,
    finished: Tensor,
    path: Tensor,
    emitted: Tensor,
    counts: Tensor,
    status: Tensor,
    sampling: Sampling | None = None,
    log_probabilities: Tensor | None = None,
) -> None:
    """Walk down the tree from the root: choose a token at the node, go to the child that carries
    it, or stop.

    The choice is the argmax, or one draw from the target's distribution; either way each emitted
    token is the target's own, which makes speculation lossless. The walk ends after an end token,
    after `remaining` tokens, after D tokens, or where no child carries the choice.

    Shapes (B batch, T nodes, V vocabulary, D longest path with the root, E end tokens; integers
    int64):
        logits: [B, T, V] float32, float16 or bfloat16; last dimension contiguous, the others as
            they come.
        tokens, parents: [B, T]; node 0 is the root, a node follows its parent.
        lengths: [B] tokens committed before this round, so that the root's draw has position
            lengths.
        end_tokens: [E], E may be 0. remaining: [B] tokens the row may still emit.
        finished: [B], read and written: a nonzero row emits nothing; set to 1 for a row which has
            emitted an end token or has none remaining.
        path: [B, D] visited nodes, root first; emitted: [B, D] the choice at each; both -1 beyond
            counts.
        counts: [B] tokens emitted, which is also the number of nodes of `path` to commit.
        status: [B] 1: a visited row of logits holds NaN or +inf, or nothing above -inf, before or
            after the division by the temperature; such a row emits nothing and keeps its
            `finished`. Otherwise 0.
        log_probabilities: [B, D] float32 or None: the log-probability of each emitted token, 0
            beyond counts, so that a row's sum is that of all it emitted.

    Units: natural log of the softmax of the raw logits at the visited node, before temperature and
        filters.

    Returns:
        None; the destinations are written.

    Raises:
        ValueError: a dtype, shape, device or stride that does not fit, V above 524287; on the CPU
            also sampling values out of range.

    Notes:
        Argmax: the lowest index wins a tie, on the values in their own dtype. Draw: logits in
        float32 divided by the temperature; top-k, top-p, min-p as transformers orders and ties them
        (see `draw.keep_weights`); then an inverse-CDF draw over ascending token ids by one 48-bit
        uniform number keyed by (seed, lengths + depth). It depends neither on the tree nor on the
        batch, so the same seed gives the tokens that plain sampling gives for equal logits. Weights
        are integers, hence reference, CPU and any other implementation of csrc/sampling.h draw the
        same token always, not just nearly always.
        Two children with one token: the lower node is taken. Does not synchronise (CUDA).

    Source: lossless verification, Leviathan et al. 2023; for deterministic candidates "sample, then
    match" has the same law and the same acceptance probability. Keying and arithmetic are original.
    """
    op, like = "accept", logits
    B, T, V = check_logits(op, logits, "B, T, V")
    D = path.shape[-1] if path.dim() == 2 else -1
    check_range(op, "V (vocabulary)", V, 1, MAX_VOCABULARY)
    check_tensors(op, {"tokens": tokens, "parents": parents}, torch.int64, "B, T", (B, T), like)
    rows = {"lengths": lengths, "remaining": remaining, "finished": finished}
    check_tensors(op, rows, torch.int64, "B", (B,), like)
    check_tensor(op, "end_tokens", end_tokens, torch.int64, "E", (-1,), like)
    check_tensor(op, "path", path, torch.int64, "B, D", (B, D), like)
    check_tensor(op, "emitted", emitted, torch.int64, "B, D", (B, D), like)
    check_tensors(op, {"counts": counts, "status": status}, torch.int64, "B", (B,), like)
    check_range(op, "D (longest path)", D, 1, 1 << 20)
    if log_probabilities is not None:
        check_tensor(op, "log_probabilities", log_probabilities, torch.float32, "B, D", (B, D), like)
    if sampling is not None:
        if not isinstance(sampling, Sampling):
            raise ValueError(f"{op}: sampling must be a Sampling or None, got {describe(sampling)}")
        for name, tensor in sampling._asdict().items():
            dtype = torch.int64 if name in ("top_k", "seeds") else torch.float32
            check_tensor(op, f"sampling.{name}", tensor, dtype, "B", (B,), like)

    places = {
        "end_tokens": end_tokens,
        "remaining": remaining,
        "finished": finished,
        "path": path,
        "emitted": emitted,
        "counts": counts,
        "status": status,
        "log_probabilities": log_probabilities,
    }
    module = native_for(op, logits)
    if module is None:
        accept_reference(logits, tokens, parents, lengths, sampling=sampling, **places)
        return
    needed = module.accept_workspace_bytes(B, T, V, logits.is_cuda)
    workspace = torch.empty(needed, dtype=torch.uint8, device=logits.device) if needed else None
    module.accept(
        logits,
        tokens,
        parents,
        lengths,
        sampling=None if sampling is None else tuple(sampling),
        workspace=workspace,
        stream=stream_of(logits),
        **places,
    )


def accept_reference(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    lengths: Tensor,
    *,
    end_tokens: Tensor,
    remaining: Tensor,
    finished: Tensor,
    path: Tensor,
    emitted: Tensor,
    counts: Tensor,
    status: Tensor,
    sampling: Sampling | None = None,
    log_probabilities: Tensor | None = None,
) -> None:
    """`accept` in plain PyTorch, on any device: the oracle. Chooses at every node, then walks."""
    if sampling is not None and not logits.is_cuda:
        check_sampling(sampling)
    (B, T), D = tokens.shape, path.shape[1]
    depths = _depths(parents)
    choices, bad = _choices(logits, lengths[:, None] + depths, sampling)

    index = torch.arange(T, device=tokens.device)
    rows = torch.arange(B, device=tokens.device)
    path.fill_(-1)
    emitted.fill_(-1)
    counts.zero_()
    status.zero_()
    node = torch.zeros_like(lengths)
    walking = (finished == 0) & (remaining > 0)
    ended = torch.zeros_like(walking)
    for step in range(D):
        status.masked_fill_(walking & bad[rows, node], 1)
        walking &= status == 0
        token = choices[rows, node]
        path[:, step] = torch.where(walking, node, -1)
        emitted[:, step] = torch.where(walking, token, -1)
        counts += walking
        ended |= walking & (token[:, None] == end_tokens).any(dim=1)
        child = (parents == node[:, None]) & (tokens == token[:, None]) & (index > 0)
        walking = walking & ~ended & (counts < remaining) & child.any(dim=1)
        # argmax over int64 takes the first of the largest: the lowest matching node.
        node = torch.where(walking, (child * (T - index)).argmax(dim=1), 0)
    failed = status != 0
    path.masked_fill_(failed[:, None], -1)
    emitted.masked_fill_(failed[:, None], -1)
    counts.masked_fill_(failed, 0)
    finished.masked_fill_(~failed & (ended | (counts >= remaining)), 1)
    if log_probabilities is not None:
        visited = logits[rows[:, None], path.clamp(min=0)].double().log_softmax(dim=-1)
        chosen = visited.gather(-1, emitted.clamp(min=0)[:, :, None])[:, :, 0]
        log_probabilities.copy_(torch.where(path < 0, 0, chosen))


def _choices(logits: Tensor, positions: Tensor, sampling: Sampling | None) -> tuple[Tensor, Tensor]:
    """The token chosen at every node, and whether its logits are unusable; both [B, T]."""
    scores = logits.float()
    if sampling is not None:
        scores = scores / sampling.temperature[:, None, None]
    best = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(dim=-1)
    bad = best.isinf()
    scores = scores.masked_fill(bad[:, :, None], 0)
    if sampling is None:
        V = scores.shape[-1]
        is_best = scores == scores.amax(dim=-1, keepdim=True)
        return (is_best * torch.arange(V, 0, -1, device=scores.device)).argmax(dim=-1), bad
    weights = token_weights(scores - scores.amax(dim=-1, keepdim=True))
    top_k, top_p, min_p = (setting[:, None, None] for setting in (sampling.top_k, sampling.top_p, sampling.min_p))
    weights = keep_weights(scores, weights, top_k, top_p, min_p)
    uniform = draw_uniform(sampling.seeds[:, None], positions)
    return pick(weights, uniform[:, :, None]), bad


def _depths(parents: Tensor) -> Tensor:
    """Number of ancestors of each node; a node follows its parent."""
    depths = torch.zeros_like(parents)
    rows = torch.arange(parents.shape[0], device=parents.device)
    for node in range(1, parents.shape[1]):
        depths[:, node] = depths[rows, parents[:, node].clamp(min=0)] + 1
    return depths


def check_sampling(sampling: Sampling) -> None:
    """Require sampling values in range; reads them, so that it synchronises for CUDA tensors.

    Raises:
        ValueError: naming the row and the value.
    """
    limits = (("temperature", 0.0, float("inf")), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0))
    for name, low, high in limits:
        for row, value in enumerate(getattr(sampling, name).tolist()):
            if not (low <= value <= high and 0.0 < value + (name != "temperature") < float("inf")):
                what = "above 0 and finite" if name == "temperature" else "from 0 to 1"
                raise ValueError(f"accept: {name} must be {what}, got {value:g} in row {row}")
    for row, value in enumerate(sampling.top_k.tolist()):
        if value < 0:
            raise ValueError(f"accept: top_k must be 0 (off) or above, got {value} in row {row}")

"""Passes over whole samples that compute, row by row, what a generation would: chains of drafted tokens.

Pass s gives every supervised row what drafting gives it at level s of a chain that began s rows before: it reads its
own output of the row before, attends to its own last s rows and otherwise to rows that read the target's features.
Dimension letters: B samples, M rows of the first pass, A supervised rows, S passes so far, H heads, G key-value heads,
D head width, C hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from vispec.drafts import ViSpecDraft
from vispec.drafts.vispec import rotary_tables
from vispec.train.rows import Passes, Reading, lay_out


def chain_passes(
    draft: ViSpecDraft,
    readings: Sequence[Reading],
    supervised: Sequence[range],
    *,
    passes: int = 1,
    noises: Sequence[Tensor] | None = None,
    checkpointed: bool = False,
) -> Passes:
    """Runs the draft as deep as `passes` levels of a tree, for a chain that begins at every supervised row.

    Arguments as for `rows.whole_passes`. A sample's first s supervised rows do not count in pass s: no chain of that
    depth ends there. Later passes run over supervised rows alone, so they cost less than the first.
    """
    dtype = draft.fc.weight.dtype
    laid, wanted = lay_out(readings, supervised, noises, dtype)
    rows, places, visuals = zip(*(draft.prompt_rows(x.embeddings, x.features, x.spans) for x in laid), strict=True)
    hidden, positions = pad_sequence(rows, batch_first=True), pad_sequence(places, batch_first=True)
    # Behind its last picture, where the answer stands, a sample's packed rows are its own rows, moved.
    firsts = torch.tensor([int((place < x.supervised.start).sum()) for place, x in zip(places, laid, strict=True)])
    counts = torch.tensor([len(x.supervised) for x in laid])
    longest = int(counts.max())
    firsts, counts = firsts.to(hidden.device), counts.to(hidden.device)
    picked = firsts[:, None] + torch.arange(longest, device=hidden.device)
    inside = torch.arange(longest, device=hidden.device) < counts[:, None]
    picked = torch.where(inside, picked, 0)
    answer = [x.embeddings[x.supervised.start : x.supervised.stop] for x in laid]
    embeddings, visual = (
        pad_sequence(answer, batch_first=True),
        torch.stack([one.to(dtype) for one in visuals])[:, None],
    )
    visual = visual.expand(-1, longest, -1)

    layer = draft.layers[0]

    def run(hidden: Tensor, positions: Tensor, *known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # `known`: the keys of the passes before, then their values.
        rotary = rotary_tables(positions, draft.config.head_dim, draft.config.rope_theta, hidden.dtype)
        query, key, value = layer.self_attn.project(hidden, rotary)
        if known:
            keys, values = [*known[: len(known) // 2], key], [*known[len(known) // 2 :], value]
            attended = layer.self_attn.o_proj(attend_chains(query, keys, values, firsts).transpose(1, 2).flatten(2))
        else:
            attended = layer.self_attn.attend(query, key, value, None)
        return layer.finish(hidden, attended), key, value

    keys, values, outputs = [], [], []
    for number in range(passes):
        if number:
            features = F.pad(outputs[-1], (0, 0, 1, 0))[:, :longest].to(dtype)
            hidden = draft.combine(embeddings, features, visual)
        inputs = (hidden, positions, *keys, *values)
        output, key, value = checkpoint(run, *inputs, use_reentrant=False) if checkpointed else run(*inputs)
        keys.append(key)
        values.append(value)
        if not number:
            output = output.gather(1, picked[..., None].expand(-1, -1, output.shape[-1]))
            positions = positions.gather(1, picked)
        outputs.append(output)
    place = torch.arange(longest, device=hidden.device)
    counted = torch.stack([(place >= number).expand_as(inside)[inside] for number in range(passes)])
    return Passes(torch.stack([output[inside] for output in outputs]), wanted, counted)


def attend_chains(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], firsts: Tensor) -> Tensor:
    """What the queries of pass S - 1 read: row a sees rows up to a - S + 1 of pass 0, and row a - t of pass S - 1 - t.

    Shapes: `query` [B, H, A, D]; `keys` and `values` of S >= 2 passes, [B, G, M, D] of the first and [B, G, A, D] of
    the others; `firsts` [B], which row of the first pass is supervised row 0. Returns [B, H, A, D].
    Notes: by plain products, since a fused kernel would take the other passes' rows as full columns.
    """
    shape, newest = query.shape, len(keys) - 1
    length = shape[2]
    # Query heads that share a key head lie side by side.
    query = query.unflatten(1, (keys[0].shape[1], -1)) * shape[-1] ** -0.5
    row = torch.arange(length, device=query.device)
    column = torch.arange(keys[0].shape[2], device=query.device)
    hidden = column > (firsts[:, None] + row - newest)[..., None]
    scores = query @ keys[0].unsqueeze(2).transpose(-1, -2)
    scores = [scores.masked_fill(hidden[:, None, None], float("-inf"))]
    for age in range(newest):
        scores.append((query * _shifted(keys[newest - age], age)).sum(-1, keepdim=True))
    weights = torch.cat(scores, -1).float().softmax(-1).to(values[0].dtype)
    mixed = weights[..., :-newest] @ values[0].unsqueeze(2)
    for age in range(newest):
        mixed = mixed + weights[..., age - newest, None] * _shifted(values[newest - age], age)
    return mixed.flatten(1, 2)


def _shifted(rows: Tensor, age: int) -> Tensor:
    """Rows [B, G, A, D] moved `age` places on: [B, G, 1, A, D]. The zeros in front meet rows that do not count."""
    return F.pad(rows, (0, 0, age, 0))[:, :, None, : rows.shape[2]]

"""Targets whose passes say the same of a node, bit by bit, whatever tree it stands in: `exact="self"`.

Every pass, plain ones too, has `ops.PATH_NODES` rows for each row of the batch, so that all products have one shape;
attention is `ops.path_attention`; all else in a decoder works row by row.
"""

from __future__ import annotations

import copy

import torch

from vispec import ops
from vispec.prompt import Prompt
from vispec.targets.base import Target
from vispec.tree import DraftTree

# Rotary embeddings that take their frequencies from the largest position of a pass.
ROPES_OF_THE_PASS = ("dynamic", "longrope")


def row_exact(target: Target) -> Target:
    """The same target with such passes; the one that was given stays as it is.

    Raises: ValueError for a model in which a row depends on the others.
    """
    config, name = target.text_config, type(target.model).__name__
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (ropes, *ropes.values()) if isinstance(part, dict)}
    if found := kinds.intersection(ROPES_OF_THE_PASS):
        raise ValueError(
            f'target: exact="self" needs rotary frequencies that do not depend on the pass, got {found.pop()} in {name}'
        )
    # How many rows an expert multiplies at once, and so in which order it sums, is for all rows together to say.
    experts = [key for key, value in vars(config).items() if "expert" in key and isinstance(value, int) and value > 1]
    if experts:
        raise ValueError(f'target: exact="self" needs layers without experts, got {experts[0]} in {name}')
    exact = copy.copy(target)
    exact.row_exact = True
    return exact


def check_rows(target: Target, prompt: Prompt) -> None:
    """Tries on the prompt's own cache that a node's logits depend neither on its row nor on the others.

    That the rows of a product do not is a property of the library that computes it: on a GPU all rows of a tile are
    added up alike, on a CPU not in every library. Two passes: over copies of one token alone, and over copies among a
    path of other tokens. Nothing is committed.

    Raises: ValueError where the copies' logits differ.
    """
    last = prompt.tokens.gather(1, prompt.lengths[:, None] - 1)[:, 0]
    alone = DraftTree.root_only(last).padded(ops.PATH_NODES)
    mixed = _among_others(alone, target.vocabulary)
    logits = [target.verify(tree, prompt.next_positions, prompt.cache)[0] for tree in (alone, mixed)]
    copies = torch.cat([logits[0], logits[1][:, ::2]], dim=1)
    differences = (copies - copies[:, :1]).abs().amax()
    if not differences == 0:
        raise ValueError(
            f'target: exact="self" needs passes in which no row depends on its place or on the others, got logits of '
            f"{type(target.model).__name__} that differ by {float(differences):.3g} for the same token "
            f"({prompt.tokens.shape[0]} x {ops.PATH_NODES} rows of {target.dtype} on {target.device})"
        )


def _among_others(copies: DraftTree, vocabulary: int) -> DraftTree:
    """Every second row of a tree of copies replaced by other tokens, each behind the one before it."""
    places = torch.arange(copies.size, device=copies.tokens.device)
    other, depths, own = places % 2 == 1, (places + 1) // 2, 1 << places
    # Of the copies the other tokens see the root alone.
    words = torch.where(other, torch.where(other, own, 0).cumsum(0) | 1, own)
    return DraftTree(
        tokens=torch.where(other, (copies.tokens + depths) % vocabulary, copies.tokens),
        parents=torch.where(other, (places - 2).clamp(min=0), -1).expand_as(copies.parents).contiguous(),
        depths=torch.where(other, depths, 0).expand_as(copies.depths).contiguous(),
        ancestors=words[:, None].expand_as(copies.ancestors).contiguous(),
        scores=copies.scores,
        longest_path=copies.size // 2 + 1,
    )

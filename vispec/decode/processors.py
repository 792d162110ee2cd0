"""Hugging Face logits processors applied to every node of a tree with that node's own history."""

from __future__ import annotations

import torch
from torch import Tensor

from vispec.tree import DraftTree


def process_logits(
    processors: list, logits: Tensor, tree: DraftTree, histories: list[Tensor], prompt_lengths: list[int]
) -> Tensor:
    """What `generate` would have made of the logits at each node.

    A processor may look at the tokens so far (a repetition penalty does), and they differ from node to node:
    each sees the row's emitted tokens and then its own path. Nodes of one depth have histories of one length and
    are processed together.

    Shapes: logits [B, T, V]; `histories` B tensors [n] int64, every token before the root, prompt included.
    Returns: [B, T, V] float32 (the logits as they are when there is no processor).
    """
    if not processors:
        return logits
    processed = logits.to(torch.float32, copy=True)
    visible = tree.mask()
    for row, history in enumerate(histories):
        for processor in processors:
            # Processors that count from the end of the prompt are told where it ends in this row.
            if hasattr(processor, "at"):
                processor.at(prompt_lengths[row])
        for depth in range(int(tree.depths[row].max()) + 1):
            nodes = torch.nonzero(tree.depths[row] == depth)[:, 0]
            # Nodes are numbered in order of creation, so a node's visible nodes in order are its path.
            path = tree.tokens[row].expand(len(nodes), -1)[visible[row, nodes]].view(len(nodes), depth + 1)
            tokens = torch.cat([history.expand(len(nodes), -1), path], dim=1)
            scores = processed[row, nodes]
            for processor in processors:
                scores = processor(tokens, scores)
            processed[row, nodes] = scores
    return processed

"""The draft tree: its shape as the user asks for it, and one proposed tree as the engine passes it round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NODES = 256
MAX_TOP_K = 16
MAX_DEPTH = 16


@dataclass(frozen=True)
class TreeConfig:
    """How large a tree the draft proposes each round.

    Attributes:
        depth: expansions after the first level, so a path holds at most ``depth + 1`` drafted tokens.
        top_k: children tried for each node, and nodes expanded on each level.
        total_tokens: nodes the target verifies, the root among them. A smaller pool of candidates is kept whole.

    Raises:
        ValueError: a size outside what the ops are built for.

    Source: EAGLE-2 (arXiv 2406.16858), section 4; the defaults are ViSpec's.
    """

    depth: int = 3
    top_k: int = 8
    total_tokens: int = 30

    def __post_init__(self) -> None:
        for name, low, high in (
            ("depth", 0, MAX_DEPTH),
            ("top_k", 1, MAX_TOP_K),
            ("total_tokens", 1, MAX_NODES),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"tree: {name} must be an integer, got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"tree: {name} must be in [{low}, {high}], got {value}")

    @property
    def candidates(self) -> int:
        """Number of scored candidates: top_k on the first level, top_k * top_k on each further one."""
        return self.top_k + self.depth * self.top_k * self.top_k

    @property
    def nodes(self) -> int:
        """Nodes of a proposed tree, the root among them."""
        return min(self.total_tokens, self.candidates + 1)

    @property
    def longest_path(self) -> int:
        """Nodes on the longest path, the root among them."""
        return min(self.depth + 2, self.nodes)


@dataclass
class DraftTree:
    """One proposed tree a row. Node 0 is the root: the last committed token, which the target has yet to read.

    Attributes (B rows, T nodes, W = ceil(T / 64) words):
        tokens: [B, T] int64 token ids.
        parents: [B, T] int64 node index of the parent, -1 for the root.
        depths: [B, T] int64 number of ancestors.
        ancestors: [B, T, W] int64; bit i % 64 of word i // 64 says that node i is an ancestor or the node itself.
        scores: [B, T] float32 cumulative draft log-probability, 0 for the root.
        longest_path: most nodes that a path can have, the root among them.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    scores: Tensor
    longest_path: int

    @classmethod
    def empty(cls, batch: int, nodes: int, longest_path: int, device: torch.device) -> DraftTree:
        """An uninitialised tree for `build_tree` to fill."""

        def integers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int64, device=device)

        return cls(
            tokens=integers(batch, nodes),
            parents=integers(batch, nodes),
            depths=integers(batch, nodes),
            ancestors=integers(batch, nodes, (nodes + 63) // 64),
            scores=torch.empty(batch, nodes, dtype=torch.float32, device=device),
            longest_path=longest_path,
        )

    @classmethod
    def root_only(cls, root_tokens: Tensor) -> DraftTree:
        """The tree of plain decoding: the root [B] alone."""
        batch, device = root_tokens.shape[0], root_tokens.device
        return cls(
            tokens=root_tokens[:, None].clone(),
            parents=torch.full((batch, 1), -1, dtype=torch.int64, device=device),
            depths=torch.zeros(batch, 1, dtype=torch.int64, device=device),
            ancestors=torch.ones(batch, 1, 1, dtype=torch.int64, device=device),
            scores=torch.zeros(batch, 1, dtype=torch.float32, device=device),
            longest_path=1,
        )

    def padded(self, nodes: int) -> DraftTree:
        """The same tree with copies of its root behind its own nodes, so many in all; W must stay as it is."""
        copies = nodes - self.size
        own_words = 1 << torch.arange(self.size, nodes, device=self.tokens.device)

        def behind(part: Tensor, value: Tensor) -> Tensor:
            return torch.cat([part, value.expand(len(part), copies, *part.shape[2:])], dim=1)

        return DraftTree(
            tokens=behind(self.tokens, self.tokens[:, :1]),
            parents=behind(self.parents, self.parents[:, :1]),
            depths=behind(self.depths, self.depths[:, :1]),
            ancestors=behind(self.ancestors, own_words[:, None]),
            scores=behind(self.scores, self.scores[:, :1]),
            longest_path=self.longest_path,
        )

    @property
    def size(self) -> int:
        """Number of nodes T."""
        return self.tokens.shape[1]

    def mask(self) -> Tensor:
        """Who sees whom among the nodes: [B, T, T] bool, row i true at its ancestors and itself."""
        return seen_slots(self.ancestors, self.size)

    def paths(self) -> list[list[list[int]]]:
        """Every root-to-leaf path of every row as node indices, in order of the leaves (for people and tests)."""
        rows = []
        for parents in self.parents.tolist():
            inner = set(parents)
            leaves = [node for node in range(len(parents)) if node not in inner]
            row = []
            for leaf in leaves:
                path = [leaf]
                while parents[path[-1]] >= 0:
                    path.append(parents[path[-1]])
                row.append(path[::-1])
            rows.append(row)
        return rows


def seen_slots(words: Tensor, slots: int) -> Tensor:
    """Who sees whom, [B, T, slots] bool, from words [B, T, ceil(slots / 64)]: bit i % 64 of word i // 64 for slot i."""
    bits = words[..., None] >> torch.arange(64, device=words.device) & 1
    return bits.flatten(2)[..., :slots].bool()


def chain_words(batch: int, nodes: int, device: torch.device) -> Tensor:
    """The words of a chain, [B, T, ceil(T / 64)] int64: node i sees nodes 0 to i."""
    seen = torch.arange(1, nodes + 1, device=device)[:, None]
    if nodes > 64:
        seen = (seen - torch.arange(0, nodes, 64, device=device)).clamp(0, 64)
    # A shift by 64 leaves 0, which less 1 is all bits.
    return ((1 << seen) - 1).expand(batch, -1, -1).contiguous()

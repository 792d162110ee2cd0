"""What the parts of a round must move and compute at least, and how long a given machine needs for that.

A part reads its weights and inputs once and writes its outputs once; what a kernel inside it hands to the next stays
on the chip. Parts follow one another, so their times add up, and each takes the longer of its bytes and its matrix
operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.engine.targets import Shape
from vispec.tree import MAX_NODES, TreeConfig

# In the order in which a round passes them.
PHASES = ("draft levels", "verify", "accept", "commit", "draft catch-up")
# Nodes of the verification passes that are looked at by themselves.
NODES = tuple(2**power for power in range(MAX_NODES.bit_length()))
QUERIES = 2  # of the published drafts' adaptors


class Work(NamedTuple):
    """One part: bytes to and from device memory, and floating-point operations of matrix products."""

    bytes_moved: int
    operations: int = 0


@dataclass(frozen=True)
class Machine:
    """A GPU's two ceilings, and where they come from."""

    name: str
    bytes_per_second: float
    operations_per_second: float

    def seconds(self, parts: Sequence[Work]) -> float:
        """The least time for these parts, one after another."""
        return sum(
            max(part.bytes_moved / self.bytes_per_second, part.operations / self.operations_per_second)
            for part in parts
        )


# NVIDIA's data sheet, SXM5, bfloat16 without sparsity.
H100_DATA_SHEET = Machine("data sheet", 3.35e12, 989e12)
# What copies and large products are expected to reach of it; bench_engine measures both in the run that it reports.
H100_IN_PRACTICE = Machine("in practice", 3.0e12, 790e12)


@dataclass(frozen=True)
class Setting:
    """What a round is run with.

    Attributes:
        context: tokens in the target's cache.
        draft_context: tokens in the draft's cache, where a picture is one row.
        weight_bytes: of one weight in the target's layers; its head and the caches have `element_bytes`.
        draft_weight_bytes: of one weight in the draft's layer and in the head as the draft reads it.
    """

    context: int
    draft_context: int
    batch: int = 1
    tree: TreeConfig = field(default_factory=TreeConfig)
    element_bytes: int = 2
    weight_bytes: int = 2
    draft_weight_bytes: int = 2


def target_pass(shape: Shape, setting: Setting, nodes: int) -> list[Work]:
    """One pass of the target over so many nodes a row; one node is a step of plain decoding."""
    rows, size = setting.batch * nodes, setting.element_bytes
    queries = shape.layers * rows * shape.heads * shape.head_width
    cache = setting.batch * shape.cache_elements(setting.context + nodes)
    return [
        Work(shape.layer_weights * setting.weight_bytes, 2 * rows * shape.layer_weights),
        # Scores and sums of values, every node against all slots.
        Work((cache + 2 * queries) * size, 4 * queries * (setting.context + nodes)),
        head_pass(shape, setting, nodes, setting.element_bytes),
    ]


def head_pass(shape: Shape, setting: Setting, nodes: int, weight_bytes: int) -> Work:
    """The output layer over so many nodes a row."""
    rows = setting.batch * nodes
    logits = rows * shape.vocabulary * setting.element_bytes
    return Work(shape.head_weights * weight_bytes + logits, 2 * rows * shape.head_weights)


def reading_logits(shape: Shape, setting: Setting, nodes: int) -> Work:
    """What chooses tokens from logits, which is not a matrix product."""
    return Work(setting.batch * nodes * shape.vocabulary * setting.element_bytes)


def draft_layer_pass(shape: Shape, setting: Setting, nodes: int, tail: int) -> list[Work]:
    """The draft's input map (multiplied out) and layer over so many rows, `tail` slots behind the committed ones."""
    rows, size = setting.batch * nodes, setting.element_bytes
    width = shape.heads * shape.head_width
    weights = 4 * shape.hidden * width + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden**2
    slots = setting.draft_context + tail
    return [
        Work(weights * setting.draft_weight_bytes, 2 * rows * weights),
        # Queries, keys and values all have the full width.
        Work((setting.batch * 2 * slots + 2 * rows) * width * size, 4 * rows * slots * width),
    ]


def adaptor_pass(shape: Shape, rows: int, element_bytes: int = 2) -> list[Work]:
    """The vision adaptor over a picture of so many rows: folded queries, then value and output projections."""
    folded = QUERIES * shape.heads
    projections = 2 * shape.hidden**2
    return [
        Work((rows + folded) * shape.hidden * element_bytes, 4 * folded * rows * shape.hidden),
        Work(projections * element_bytes, 2 * QUERIES * projections),
    ]


def round_phases(shape: Shape, setting: Setting) -> dict[str, list[Work]]:
    """The parts of each of `PHASES`."""
    tree = setting.tree
    size = setting.draft_weight_bytes
    levels = [head_pass(shape, setting, 1, size), reading_logits(shape, setting, 1)]
    for level in range(1, tree.depth + 1):
        levels += draft_layer_pass(shape, setting, tree.top_k, level * tree.top_k)
        levels += [head_pass(shape, setting, tree.top_k, size), reading_logits(shape, setting, tree.top_k)]
    # The root's keys and values lie where they belong; each accepted node's are read and written.
    moved = 2 * setting.batch * shape.tau * shape.cache_elements(1) * setting.element_bytes
    parts = (
        levels,
        target_pass(shape, setting, tree.nodes),
        [reading_logits(shape, setting, tree.nodes)],
        [Work(round(moved))],
        draft_layer_pass(shape, setting, tree.longest_path, tree.longest_path),
    )
    return dict(zip(PHASES, parts, strict=True))

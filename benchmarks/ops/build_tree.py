"""The final tree: the best 29 of 200 scored candidates behind the root."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Problem, eager_and_compiled, largest_error, same
from vispec import ops


def make(device: torch.device, generator: torch.Generator, *, levels: int, K: int, T: int) -> Problem:
    tokens, scores, parents = candidates(levels, K, generator)
    N, W = len(scores), (T + 63) // 64
    inputs = (
        torch.tensor([7], device=device),
        tokens[None].to(device),
        scores[None].to(device),
        parents[None].to(device),
    )

    def destinations() -> dict[str, Tensor]:
        shapes = {"tokens": (1, T), "parents": (1, T), "depths": (1, T), "ancestors": (1, T, W)}
        integers = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}
        return {**integers, "scores": torch.zeros(1, T, device=device)}

    written, written_by_plain = destinations(), destinations()
    expected = by_hand(7, tokens.tolist(), scores.tolist(), parents.tolist(), T)

    def error_of(found: dict[str, Tensor]) -> float:
        for name in ("tokens", "parents", "depths", "ancestors"):
            same(name, found[name][0].flatten(), torch.tensor(expected[name]))
        # Scores are copied, so nothing may be rounded.
        return largest_error(found["scores"][0], torch.tensor(expected["scores"], dtype=torch.float64, device=device))

    def plain(*inputs: Tensor) -> dict[str, Tensor]:
        ops.build_tree_reference(*inputs, **written_by_plain)
        return written_by_plain

    return Problem(
        run=lambda: ops.build_tree(*inputs, **written),
        outputs=list(written.values()),
        error=lambda: error_of(written),
        error_bound=0.0,
        bytes_moved=N * 20 + T * (28 + 8 * W),
        baselines=eager_and_compiled("PyTorch", plain, inputs, error_of),
    )


def candidates(levels: int, K: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, scores and parents as levels of K rows with K children leave them; no child outranks its parent."""
    device = generator.device
    scores = -3 * torch.rand(K, generator=generator, device=device)
    parents = torch.full((K,), -1, device=device)
    frontier = torch.arange(K, device=device)
    for _ in range(levels):
        first = len(scores)
        children = scores[frontier][:, None] - 3 * torch.rand(K, K, generator=generator, device=device)
        scores = torch.cat([scores, children.flatten()])
        parents = torch.cat([parents, frontier.repeat_interleave(K)])
        frontier = first + children.flatten().topk(K).indices
    tokens = torch.randint(1, 32000, (len(scores),), generator=generator, device=device)
    return tokens.cpu(), scores.cpu(), parents.cpu()


def by_hand(root: int, tokens: list[int], scores: list[float], parents: list[int], T: int) -> dict[str, list]:
    """The tree in plain Python."""
    kept = sorted(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: T - 1])
    node_of = {-1: 0} | {index: node for node, index in enumerate(kept, start=1)}
    tree_parents = [-1] + [node_of[parents[index]] for index in kept]
    lines = [[0]]
    for node in range(1, T):
        lines.append([*lines[tree_parents[node]], node])
    words = [
        sum(1 << node % 64 for node in line if node // 64 == word) for line in lines for word in range((T + 63) // 64)
    ]
    return {
        "tokens": [root] + [tokens[index] for index in kept],
        "parents": tree_parents,
        "depths": [len(line) - 1 for line in lines],
        # As the signed numbers that the tensor holds.
        "ancestors": [word - (1 << 64) if word >> 63 else word for word in words],
        "scores": [0.0] + [scores[index] for index in kept],
    }


CASES = [
    Case(
        "build_tree",
        "29 of 200",
        make,
        {"levels": 3, "K": 8, "T": 30},
        {"levels": 5, "K": 4, "T": 70},
        cold=False,
        target_microseconds=4,
    )
]

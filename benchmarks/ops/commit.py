"""The end of a round: 4 accepted rows moved in the keys and values of every layer, the state, the draft's features."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Problem, eager_and_compiled, same
from vispec import ops

# Node 0 is the root, which already lies in its place.
PATH = (0, 3, 9, 17, 26)
NODES = 30
LENGTH = 37
REMAINING = 100


def plain(
    tensors: list[Tensor], path: Tensor, emitted: Tensor, counts: Tensor, starts: Tensor, rows: ops.RowState, features
) -> tuple[Tensor, Tensor]:
    """An index_select and an index_copy_ for every tensor, with the slots on the device; then what is small."""
    source, target = starts + path[0], starts + torch.arange(path.shape[1], device=path.device)
    for tensor in tensors:
        tensor.index_copy_(2, target, tensor.index_select(2, source))
    for part, sign in ((rows.lengths, 1), (rows.positions, 1), (rows.remaining, -1)):
        part.add_(counts, alpha=sign)
    last = emitted.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    rows.roots.copy_(torch.where(counts > 0, last, rows.roots))
    nodes = path.clamp(min=0)[:, :, None].expand(-1, -1, features.shape[2])
    return features.gather(1, nodes), emitted.clamp(min=0)


def make(
    device: torch.device, generator: torch.Generator, *, layers: int, G: int, L: int, head: int, C: int
) -> Problem:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    def filled(value: int) -> Tensor:
        return torch.full((1,), value, device=device)

    D = len(PATH)
    tensors = [random(1, G, L, head) for _ in range(2 * layers)]
    before: list[Tensor] = []
    path, counts, starts = torch.tensor([PATH], device=device), filled(D), filled(LENGTH)
    emitted = torch.randint(0, 1000, (1, D), generator=generator, device=device)
    features = random(1, NODES, C)
    rows = ops.RowState(*(filled(0) for _ in range(4)))
    gather = ops.Gather(features, torch.empty(1, D, C, device=device, dtype=features.dtype), torch.empty_like(emitted))
    table = ops.pointer_table(tensors) if device.type == "cuda" else None

    def fresh() -> None:
        """What the tensors held at first: kept at the first check, restored at a later one."""
        if not before:
            before.extend(tensor.clone() for tensor in tensors)
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        for part, value in zip(rows, (LENGTH, LENGTH + 3, REMAINING, 0), strict=True):
            part.fill_(value)
        gather.picked.fill_(torch.nan)
        gather.tokens.fill_(-7)

    def error(picked: Tensor, tokens: Tensor) -> float:
        slots = [LENGTH + node for node in PATH]
        for index, (tensor, old) in enumerate(zip(tensors, before, strict=True)):
            expected = old.clone()
            expected[:, :, LENGTH : LENGTH + D] = old[:, :, slots]
            same(f"tensor {index}", tensor, expected)
        for name, value in zip(
            rows._fields, (LENGTH + D, LENGTH + 3 + D, REMAINING - D, int(emitted[0, -1])), strict=True
        ):
            same(name, getattr(rows, name), filled(value))
        same("picked", picked, features[:, list(PATH)])
        same("tokens", tokens, emitted)
        return 0.0

    arguments = (tensors, path, emitted, counts, starts)
    return Problem(
        run=lambda: ops.commit(*arguments, table=table, rows=rows, gather=gather),
        restore=fresh,
        outputs=[*tensors, *rows, gather.picked, gather.tokens],
        error=lambda: error(gather.picked, gather.tokens),
        error_bound=0.0,
        bytes_moved=2 * (len(tensors) * G * (D - 1) * head + D * C) * 2,
        baselines=eager_and_compiled("PyTorch", plain, (*arguments, rows, features), lambda answer: error(*answer)),
    )


def _case(name: str, layers: int, G: int, C: int, target_microseconds: float | None = None) -> Case:
    return Case(
        "commit",
        name,
        make,
        {"layers": layers, "G": G, "L": 320, "head": 128, "C": C},
        {"layers": 2, "G": 3, "L": 72, "head": 16, "C": 40},
        cold=True,
        target_microseconds=target_microseconds,
    )


CASES = [
    _case("4 tokens, LLaVA 13B", layers=40, G=40, C=5120, target_microseconds=4),
    _case("4 tokens, Qwen 7B", layers=28, G=4, C=3584),
]

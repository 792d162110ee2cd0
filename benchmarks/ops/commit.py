"""Compaction of the cache: 4 accepted rows moved in the keys and values of every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Problem, eager_and_compiled, same
from vispec import ops

# Node 0 is the root, which already lies in its place.
PATH = (0, 3, 9, 17, 26)
LENGTH = 37


def plain(tensors: list[Tensor], path: Tensor, lengths: Tensor) -> list[Tensor]:
    """An index_select and an index_copy_ for every tensor, with the slots on the device."""
    source, target = lengths + path[0], lengths + torch.arange(path.shape[1], device=path.device)
    for tensor in tensors:
        tensor.index_copy_(2, target, tensor.index_select(2, source))
    return tensors


def make(device: torch.device, generator: torch.Generator, *, layers: int, G: int, L: int, head: int) -> Problem:
    def random() -> Tensor:
        return torch.randn(1, G, L, head, generator=generator, device=device, dtype=torch.bfloat16)

    tensors = [random() for _ in range(2 * layers)]
    before: list[Tensor] = []
    path = torch.tensor([PATH], device=device)
    counts, lengths = torch.tensor([len(PATH)], device=device), torch.tensor([LENGTH], device=device)
    table = ops.pointer_table(tensors) if device.type == "cuda" else None

    def fresh() -> None:
        """What the tensors held at first: kept at the first check, restored at a later one."""
        if not before:
            before.extend(tensor.clone() for tensor in tensors)
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)

    def error() -> float:
        slots = [LENGTH + node for node in PATH]
        for index, (tensor, old) in enumerate(zip(tensors, before, strict=True)):
            expected = old.clone()
            expected[:, :, LENGTH : LENGTH + len(PATH)] = old[:, :, slots]
            same(f"tensor {index}", tensor, expected)
        return 0.0

    return Problem(
        run=lambda: ops.commit(tensors, path, counts, lengths, table=table),
        restore=fresh,
        outputs=tensors,
        error=error,
        error_bound=0.0,
        bytes_moved=2 * len(tensors) * G * (len(PATH) - 1) * head * 2,
        baselines=eager_and_compiled("PyTorch", plain, (tensors, path, lengths), lambda _: error()),
    )


def _case(name: str, layers: int, G: int, target_microseconds: float | None = None) -> Case:
    return Case(
        "commit",
        name,
        make,
        {"layers": layers, "G": G, "L": 320, "head": 128},
        {"layers": 2, "G": 3, "L": 72, "head": 16},
        cold=True,
        target_microseconds=target_microseconds,
    )


CASES = [
    _case("4 tokens, LLaVA 13B", layers=40, G=40, target_microseconds=4),
    _case("4 tokens, Qwen 7B", layers=28, G=4),
]

"""Rotation of 30 nodes' queries and keys, and their keys and values into the cache of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Problem, WrongAnswer, eager_and_compiled, largest_error
from vispec import ops

LENGTH = 37


def rotated(rows: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """The rotate-half form of transformers' apply_rotary_pos_emb."""
    first, second = rows.chunk(2, dim=-1)
    return rows * cosines[:, None] + torch.cat([-second, first], dim=-1) * sines[:, None]


def plain(
    queries: Tensor, tail: ops.Tail, keys: Tensor, values: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As transformers' layers write it, with the cache updated at slots on the device."""
    keys.index_copy_(2, slots, rotated(tail.keys, tail.cosines, tail.sines))
    values.index_copy_(2, slots, tail.values)
    return rotated(queries, tail.cosines, tail.sines), keys, values


def make(device: torch.device, generator: torch.Generator, *, T: int, L: int, H: int, G: int, head: int) -> Problem:
    def random(heads: int, rows: int) -> Tensor:
        """[1, heads, rows, head] as a view of a projection [1, rows, heads * head]."""
        values = torch.randn(1, rows, heads, head, generator=generator, device=device).bfloat16()
        return values.transpose(1, 2)

    queries = random(H, T)
    angles = 100 * torch.rand(1, T, head // 2, generator=generator, device=device).repeat(1, 1, 2)
    tail = ops.Tail(random(G, T), random(G, T), angles.cos().bfloat16(), angles.sin().bfloat16())
    before = tuple(random(G, L).contiguous() for _ in range(2))
    keys, values = (cache.clone() for cache in before)
    lengths = torch.tensor([LENGTH], device=device)
    slots = LENGTH + torch.arange(T, device=device)
    written = torch.zeros(1, H, T, head, dtype=torch.bfloat16, device=device)

    tables = (tail.cosines.double(), tail.sines.double())
    exact_queries = rotated(queries.double(), *tables)
    exact_keys = rotated(tail.keys.double(), *tables)

    def restore() -> None:
        for cache, old in zip((keys, values), before, strict=True):
            cache.copy_(old)
        written.fill_(torch.nan)

    def error_of(answer: tuple[Tensor, Tensor, Tensor]) -> float:
        new_queries, new_keys, new_values = answer
        others = torch.ones(L, dtype=torch.bool, device=device)
        others[slots] = False
        if not torch.equal(new_keys[:, :, others], before[0][:, :, others]):
            raise WrongAnswer("keys outside the tail were changed")
        if not torch.equal(new_values, before[1].index_copy(2, slots, tail.values)):
            raise WrongAnswer("the values are not those of the tail")
        return max(largest_error(new_queries, exact_queries), largest_error(new_keys[:, :, slots], exact_keys))

    own_error = error_of(plain(queries, tail, *(cache.clone() for cache in before), slots))
    return Problem(
        run=lambda: ops.rope_append(queries, tail, keys, values, lengths, output=written),
        outputs=[written, keys, values],
        error=lambda: error_of((written, keys, values)),
        error_bound=2 * own_error,
        bytes_moved=2 * (queries.nbytes + tail.keys.nbytes + tail.values.nbytes) + 2 * tail.cosines.nbytes,
        baselines=eager_and_compiled("PyTorch", plain, (queries, tail, keys, values, slots), error_of),
        restore=restore,
    )


def _case(name: str, H: int, G: int) -> Case:
    return Case(
        "rope_append",
        f"{name}, 30 nodes",
        make,
        {"T": 30, "L": 320, "H": H, "G": G, "head": 128},
        {"T": 5, "L": 60, "H": 4, "G": 2, "head": 64},
        cold=False,
    )


CASES = [_case("LLaVA 7B", 32, 32), _case("Qwen 7B", 28, 4)]

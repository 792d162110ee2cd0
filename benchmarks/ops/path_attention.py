"""Attention of 48 nodes with one fixed order of sums, as every pass of `exact="self"` asks for it."""

from __future__ import annotations

import torch

from benchmarks.ops.accept import tree
from benchmarks.ops.case import Baseline, Case, Problem, eager_and_compiled, largest_error
from benchmarks.ops.tree_attention import ancestor_words, exactly, plain
from vispec import ops


def make(device: torch.device, generator: torch.Generator, *, T: int, L: int, H: int, G: int, head: int) -> Problem:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    _, parents = tree(T, 8, 5, 32000, generator)
    tail, words = ancestor_words(parents)
    queries = random(1, H, T, head)
    # A cache with room beyond the tail, whose content must not be seen.
    keys, values = (random(1, G, L + T + 40, head) for _ in range(2))
    keys[:, :, L + T :], values[:, :, L + T :] = torch.nan, torch.nan
    lengths = torch.tensor([L], device=device)
    written, faster = (torch.zeros(1, H, T, head, dtype=torch.bfloat16, device=device) for _ in range(2))
    visible = torch.ones(T, L + T, dtype=torch.bool, device=device)
    visible[:, L:] = tail
    dense = (queries, keys[:, :, : L + T], values[:, :, : L + T], visible)
    exact = exactly(*dense)

    def error_of(answer: torch.Tensor) -> float:
        return largest_error(answer, exact)

    def any_order() -> torch.Tensor:
        ops.tree_attention(queries, keys, values, words[None], lengths, output=faster)
        return faster

    return Problem(
        run=lambda: ops.path_attention(queries, keys, values, words[None], lengths, output=written),
        outputs=[written],
        error=lambda: error_of(written),
        error_bound=2 * error_of(plain(*dense)),
        bytes_moved=2 * (2 * queries.numel() + 2 * dense[1].numel()) + words.nbytes,
        operations=4 * H * T * (L + T) * head,
        baselines=[
            Baseline("tree_attention", lambda: any_order, error_of),
            *eager_and_compiled("PyTorch", plain, dense, error_of),
        ],
    )


def _case(name: str, L: int, H: int, G: int) -> Case:
    sizes = {"T": ops.PATH_NODES, "L": L, "H": H, "G": G, "head": 128}
    small = {"T": 13, "L": 165, "H": 4, "G": 4 if H == G else 2, "head": 64}
    return Case("path_attention", f"{name}, T={ops.PATH_NODES}, L={L}", make, sizes, small, True)


CASES = [_case("LLaVA 7B", 2048, 32, 32), _case("Qwen 7B", 4096, 28, 4)]

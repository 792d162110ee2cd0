"""Inputs that the op tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from vispec.tree import DraftTree

INTEGER_POISON = -(1 << 62) + 12345
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def integers(*shape: int) -> Tensor:
    """An output to be written: anything left of it shows."""
    return torch.full(shape, INTEGER_POISON, dtype=torch.int64)


def floats(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def with_gaps(values: Tensor) -> Tensor:
    """The same [B, rows, V] values inside a larger buffer of NaN, with odd strides and offset."""
    B, rows, V = values.shape
    buffer = torch.full((B, rows + 1, V + 5), torch.nan, dtype=values.dtype)
    view = buffer[:, 1:, 3 : 3 + V]
    view.copy_(values)
    return view


def random_tree(B: int, T: int, V: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and parents [B, T]: a node follows its parent, siblings differ where V allows it."""
    tokens = torch.randint(0, V, (B, T), generator=generator)
    parents = torch.full((B, T), -1)
    for b in range(B):
        used: dict[int, set[int]] = {}
        for node in range(1, T):
            parent = int(torch.randint(0, node, (), generator=generator))
            parents[b, node] = parent
            taken = used.setdefault(parent, set())
            free = [token for token in range(V) if token not in taken] if V <= 64 else None
            token = int(tokens[b, node])
            if free and token in taken:
                token = free[int(torch.randint(0, len(free), (), generator=generator))]
            taken.add(token)
            tokens[b, node] = token
    return tokens, parents


def depths_of(parents: Tensor) -> Tensor:
    depths = torch.zeros_like(parents)
    for b in range(parents.shape[0]):
        for node in range(1, parents.shape[1]):
            depths[b, node] = depths[b, parents[b, node]] + 1
    return depths


def poisoned_rows(values: Tensor, *, gap: int) -> Tensor:
    """The same [M, C] values as rows of a larger buffer of NaN, `gap` elements before, between and after them."""
    M, C = values.shape
    buffer = torch.full((M * (C + gap) + gap,), torch.nan, dtype=values.dtype)
    view = buffer.as_strided((M, C), (C + gap, 1), gap)
    view.copy_(values)
    return view


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers apart, element by element, for tensors of one 16-bit dtype; NaN equals NaN."""

    def order(x: Tensor) -> Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return torch.where(a.isnan() & b.isnan(), 0, (order(a) - order(b)).abs())


def step_of(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(exact, info.eps), exponent)


def tree_of(B: int, T: int, V: int, seed: int = 0) -> DraftTree:
    """A random tree with its ancestor words."""
    tokens, parents = random_tree(B, T, V, torch.Generator().manual_seed(seed))
    tree = DraftTree.empty(B, T, T, torch.device("cpu"))
    tree.tokens, tree.parents, tree.depths = tokens, parents, depths_of(parents)
    tree.ancestors.zero_()
    for b in range(B):
        for node in range(T):
            above = node
            while above >= 0:
                bit = 1 << above % 64
                tree.ancestors[b, node, above // 64] |= bit - (1 << 64) if bit >> 63 else bit
                above = int(parents[b, above])
    return tree

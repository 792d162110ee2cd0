"""The vision adaptor over one image: fixed queries against its rows, with the output projections behind them.

"whole" is what a prefill computes: the attention and the two products with the value and output projections, whose
weights are most of the bytes. "attention alone" is the op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Problem, eager_and_compiled, largest_error
from vispec import ops

HEAD = 128


def projected(contexts: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """[Q, C] from contexts [heads * Q, C]: a head's part of the value projection, then the output projection."""
    heads = value.shape[0] // HEAD
    of_heads = contexts.view(heads, -1, contexts.shape[-1])
    return (of_heads @ value.view(heads, HEAD, -1).transpose(1, 2)).transpose(0, 1).flatten(1) @ out.T


def two_products(folded: Tensor, rows: Tensor) -> Tensor:
    """The folded form in PyTorch: scores, softmax, sums of rows."""
    return torch.softmax((folded @ rows.T).float(), dim=-1).to(rows.dtype) @ rows


def whole_two_products(folded: Tensor, rows: Tensor, value: Tensor, out: Tensor) -> Tensor:
    return projected(two_products(folded, rows), value, out)


def whole_naive(queries: Tensor, rows: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """The form that is trained: keys and values of every row."""
    heads = key.shape[0] // HEAD
    keys, values = ((rows @ weight.T).view(-1, heads, HEAD).transpose(0, 1) for weight in (key, value))
    weights = torch.softmax((queries @ keys.transpose(1, 2) * HEAD**-0.5).float(), dim=-1).to(rows.dtype)
    return (weights @ values).transpose(0, 1).flatten(1) @ out.T


def make(device: torch.device, generator: torch.Generator, *, N: int, C: int, Q: int, whole: bool) -> Problem:
    heads = C // HEAD

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).bfloat16()

    rows = random(N, C)
    key, value, out = (random(C, C, scale=C**-0.5) for _ in range(3))
    queries = random(heads, Q, HEAD, scale=3.0)
    exactly_folded = queries.double() @ key.double().view(heads, HEAD, C) * HEAD**-0.5
    folded = exactly_folded.flatten(0, 1).bfloat16()
    starts, lengths = torch.tensor([0], device=device), torch.tensor([N], device=device)
    contexts = torch.zeros(1, heads * Q, C, dtype=torch.bfloat16, device=device)
    projections = torch.zeros(Q, C, dtype=torch.bfloat16, device=device)

    def run() -> None:
        ops.adaptor(folded, rows, starts, lengths, output=contexts)
        if whole:
            projections.copy_(projected(contexts[0], value, out))

    # From the folded queries as they are stored: what the op is given.
    exact = torch.softmax(folded.double() @ rows.double().T, dim=-1) @ rows.double()
    form = two_products
    arguments: tuple[Tensor, ...] = (folded, rows)
    if whole:
        exact = projected(exact, value.double(), out.double())
        form, arguments = whole_two_products, (folded, rows, value, out)

    def error_of(answer: Tensor) -> float:
        return largest_error(answer, exact)

    own_error = error_of(form(*arguments))
    baselines = eager_and_compiled("two GEMMs", form, arguments, error_of)
    if whole:
        baselines += eager_and_compiled("keys and values", whole_naive, (queries, rows, key, value, out), error_of)
    weights_bytes = value.nbytes + out.nbytes + projections.nbytes if whole else contexts.nbytes
    return Problem(
        run=run,
        outputs=[projections if whole else contexts],
        error=lambda: error_of(projections if whole else contexts[0]),
        error_bound=2 * own_error,
        bytes_moved=rows.nbytes + folded.nbytes + weights_bytes,
        operations=4 * heads * Q * N * C,
        baselines=baselines,
    )


def _case(name: str, N: int, C: int, whole: bool, target_microseconds: float | None = None) -> Case:
    return Case(
        "adaptor",
        f"{name}, {'whole' if whole else 'attention alone'}",
        make,
        {"N": N, "C": C, "Q": 2, "whole": whole},
        {"N": 70, "C": 256, "Q": 2, "whole": whole},
        cold=True,
        target_microseconds=target_microseconds,
    )


CASES = [
    _case("LLaVA 7B, N=2880", 2880, 4096, whole=True, target_microseconds=45),
    _case("LLaVA 7B, N=2880", 2880, 4096, whole=False),
    _case("Qwen 3B, N=16384", 16384, 2048, whole=True, target_microseconds=40),
    _case("Qwen 3B, N=16384", 16384, 2048, whole=False),
]

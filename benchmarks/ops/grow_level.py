"""One level of the draft tree: 8 rows of logits, 64 children, the next 8 and what the draft reads of them."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Problem, WrongAnswer, eager_and_compiled, largest_error, same
from vispec import ops


def plain(
    logits: Tensor, frontier_scores: Tensor, ancestors: Tensor, hidden: Tensor, K: int, slots: int
) -> tuple[Tensor, ...]:
    """The level in a few calls of PyTorch; it leaves the order of ties open."""
    log_probabilities, tokens = torch.log_softmax(logits.float(), dim=-1).topk(K, dim=-1)
    scores = (frontier_scores[:, :, None] + log_probabilities).flatten(1)
    next_scores, children = scores.topk(K, dim=-1)
    rows = children // K
    picked = rows[:, :, None]
    seen = ancestors.gather(1, picked) | 1 << slots + torch.arange(K, device=logits.device)[:, None]
    next_hidden = hidden.gather(1, picked.expand(-1, -1, hidden.shape[2]))
    return scores, tokens.flatten(1), next_scores, rows, tokens.flatten(1).gather(1, children), seen, next_hidden


def make(device: torch.device, generator: torch.Generator, *, R: int, K: int, V: int, C: int) -> Problem:
    N, offset, slots = K + R * K, K, R
    logits = (3 * torch.randn(1, R, V, generator=generator, device=device)).bfloat16()
    frontier_scores = -4 * torch.rand(1, R, generator=generator, device=device)
    frontier = torch.arange(R, device=device)[None]
    candidates = {
        "candidate_tokens": torch.zeros(1, N, dtype=torch.int64, device=device),
        "candidate_scores": torch.zeros(1, N, device=device),
        "candidate_parents": torch.zeros(1, N, dtype=torch.int64, device=device),
    }
    chosen = {
        "next_frontier": torch.zeros(1, K, dtype=torch.int64, device=device),
        "next_rows": torch.zeros(1, K, dtype=torch.int64, device=device),
        "next_tokens": torch.zeros(1, K, dtype=torch.int64, device=device),
        "next_scores": torch.zeros(1, K, device=device),
    }

    ancestors = (1 << torch.arange(R, device=device))[None, :, None]
    hidden = torch.randn(1, R, C, generator=generator, device=device).bfloat16()
    carried = {
        "next_ancestors": torch.zeros(1, K, 1, dtype=torch.int64, device=device),
        "next_hidden": torch.zeros(1, K, C, dtype=torch.bfloat16, device=device),
    }
    arrivals = torch.zeros(1, dtype=torch.int32, device=device)

    def run() -> None:
        ops.grow_level(
            logits,
            frontier_scores,
            frontier,
            offset=offset,
            slots=slots,
            ancestors=ancestors,
            hidden=hidden,
            arrivals=arrivals,
            **candidates,
            **chosen,
            **carried,
        )

    def check_carried(rows: Tensor, next_ancestors: Tensor, next_hidden: Tensor) -> None:
        own = 1 << slots + torch.arange(K, device=device)
        same("next_ancestors", next_ancestors[0, :, 0], (1 << rows[0]) | own)
        same("next_hidden", next_hidden[0], hidden[0, rows[0]])

    # A stable sort of the logits themselves: ties go to the lower column, whatever a logarithm rounds to.
    exact_columns = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :, :K]
    exact_rows = torch.log_softmax(logits.double(), dim=-1).gather(-1, exact_columns)
    exact = (frontier_scores.double()[:, :, None] + exact_rows).flatten(1)
    own = torch.log_softmax(logits.float(), dim=-1).gather(-1, exact_columns)
    own_error = largest_error((frontier_scores[:, :, None] + own).flatten(1), exact)

    def error() -> float:
        scores = candidates["candidate_scores"][:, offset:]
        same("candidate_tokens", candidates["candidate_tokens"][:, offset:], exact_columns.flatten(1))
        same("candidate_parents", candidates["candidate_parents"][:, offset:], frontier.repeat_interleave(K, dim=1))
        # By the scores as they were written: two that differ by less than a rounding may come in either order.
        children = scores.sort(dim=-1, descending=True, stable=True).indices[:, :K]
        same("next_frontier", chosen["next_frontier"], children + offset)
        same("next_rows", chosen["next_rows"], children // K)
        same("next_tokens", chosen["next_tokens"], exact_columns.flatten(1).gather(1, children))
        same("next_scores", chosen["next_scores"], scores.gather(1, children))
        check_carried(children // K, **carried)
        same("arrivals", arrivals, torch.zeros_like(arrivals))
        return largest_error(scores, exact)

    def error_of_plain(answer: tuple[Tensor, ...]) -> float:
        scores, tokens, next_scores, next_rows, next_tokens, *rest = answer
        check_carried(next_rows, *rest)
        same("next_scores", next_scores, scores.topk(K, dim=-1).values)
        # Ties come in any order, so tokens are checked by their logits.
        if not torch.equal(logits.gather(-1, tokens.view(1, R, K)), logits.gather(-1, exact_columns)):
            raise WrongAnswer("the tokens are not the best ones")
        found = torch.log_softmax(logits[0].double(), dim=-1)[next_rows, next_tokens]
        return max(
            largest_error(scores, exact),
            largest_error(next_scores, frontier_scores.double().gather(1, next_rows) + found),
        )

    return Problem(
        run=run,
        outputs=[*candidates.values(), *chosen.values(), *carried.values()],
        error=error,
        # One rounding on top, so that an error of exactly 0 in PyTorch does not forbid any.
        error_bound=2 * own_error + float(exact.abs().max()) * torch.finfo(torch.float32).eps,
        # Of `hidden` as many rows as are written.
        bytes_moved=logits.nbytes + R * K * 20 + K * 28 + (R + K) * 8 + 2 * carried["next_hidden"].nbytes,
        baselines=eager_and_compiled(
            "PyTorch", plain, (logits, frontier_scores, ancestors, hidden, K, slots), error_of_plain
        ),
    )


def _case(name: str, V: int, C: int, target_microseconds: float | None = None) -> Case:
    small = {"R": 3, "K": 4, "V": 1000, "C": 72}
    sizes = {"R": 8, "K": 8, "V": V, "C": C}
    return Case("grow_level", name, make, sizes, small, cold=False, target_microseconds=target_microseconds)


CASES = [
    _case("8 rows, V=32064, C=4096", 32064, 4096),
    _case("8 rows, V=152064, C=3584", 152064, 3584, target_microseconds=6),
]

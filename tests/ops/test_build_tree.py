"""build_tree: which candidates stay, and everything derived from them."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import floats, integers
from vispec.ops import build_tree, build_tree_reference


def outputs(B: int, T: int) -> dict:
    W = (T + 63) // 64
    return {
        "tokens": integers(B, T),
        "parents": integers(B, T),
        "depths": integers(B, T),
        "ancestors": integers(B, T, W),
        "scores": floats(B, T),
    }


def candidates(B: int, N: int, generator, *, ties: bool = False):
    """A forest in which a parent comes before its children and scores no lower."""
    tokens = torch.randint(0, 1000, (B, N), generator=generator)
    scores, parents = torch.zeros(B, N), torch.full((B, N), -1)
    for b in range(B):
        for n in range(N):
            parent = int(torch.randint(-1, n, (), generator=generator)) if n else -1
            step = float(torch.rand((), generator=generator))
            step = float(step > 0.6) if ties else step
            parents[b, n] = parent
            scores[b, n] = (0.0 if parent < 0 else float(scores[b, parent])) - step
    return tokens, scores, parents


def check(backend, root_tokens, tokens, scores, parents, T):
    B = scores.shape[0]
    expected = outputs(B, T)
    build_tree_reference(root_tokens, tokens, scores, parents, **expected)
    got = backend.run(build_tree, root_tokens, tokens, scores, parents, **outputs(B, T))
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    return got


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("B", "N", "T"),
    [
        (1, 1, 1),
        (1, 1, 2),
        (2, 8, 9),
        (1, 200, 30),
        (3, 200, 60),
        (2, 63, 64),
        (2, 90, 65),
        (1, 300, 256),
        (2, 5, 1),
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_matches_reference(backend, generator, B, N, T, ties):
    tokens, scores, parents = candidates(B, N, generator, ties=ties)
    check(backend, torch.randint(0, 1000, (B,), generator=generator), tokens, scores, parents, T)


@pytest.mark.parametrize("ties", [False, True])
def test_against_plain_python(backend, generator, ties):
    """The definition, one candidate at a time."""
    N, T = 120, 70
    tokens, scores, parents = candidates(1, N, generator, ties=ties)
    got = check(backend, torch.tensor([77]), tokens, scores, parents, T)
    kept = sorted(sorted(range(N), key=lambda n: (-float(scores[0, n]), n))[: T - 1])
    node_of = {-1: 0, **{candidate: node for node, candidate in enumerate(kept, start=1)}}
    above = {0: []}
    for node, candidate in enumerate(kept, start=1):
        parent = node_of[int(parents[0, candidate])]
        above[node] = [*above[parent], parent]
        assert got["tokens"][0, node] == tokens[0, candidate]
        assert got["parents"][0, node] == parent
        assert got["depths"][0, node] == len(above[node])
        assert got["scores"][0, node] == scores[0, candidate]
    for node in range(T):
        bits = [(int(got["ancestors"][0, node, i // 64]) >> (i % 64)) & 1 for i in range(T)]
        assert [i for i in range(T) if bits[i]] == sorted([*above[node], node])


def test_unscored_candidates_come_last(backend):
    scores = torch.tensor([[-1.0, -torch.inf, -0.5, torch.nan, -torch.inf]])
    tokens = torch.arange(5)[None]
    got = check(backend, torch.tensor([9]), tokens, scores, torch.full((1, 5), -1), 5)
    assert got["tokens"].tolist() == [[9, 0, 1, 2, 3]]
    assert got["scores"].tolist() == [[0, -1, -torch.inf, -0.5, -torch.inf]]


@pytest.mark.parametrize("T", [1, 40, 131])
def test_stale_parents_and_scores_make_a_tree_all_the_same(backend, generator, T):
    """A parent that is not an earlier candidate, or is not kept, is the root."""
    B, N = 3, 140
    parents = torch.randint(-3, N + 3, (B, N), generator=generator)
    parents[0, ::7] = torch.arange(N)[::7]
    parents[1, ::5] = torch.tensor([-(1 << 63), (1 << 63) - 1]).repeat(14)
    tokens = torch.randint(-(1 << 62), 1 << 62, (B, N), generator=generator)
    scores = torch.randn(B, N, generator=generator)
    scores[2, ::3] = torch.nan
    got = check(backend, torch.arange(B), tokens, scores, parents, T)
    assert bool((got["parents"] < torch.arange(T)).all()) and bool((got["parents"][:, 1:] >= 0).all())


def test_chain(backend):
    N = 130
    scores = -torch.arange(N)[None].float()
    got = check(
        backend,
        torch.tensor([1]),
        torch.arange(N)[None],
        scores,
        torch.arange(-1, N - 1)[None],
        N + 1,
    )
    assert got["depths"].tolist() == [list(range(N + 1))]
    assert got["ancestors"][0, N].tolist() == [-1, -1, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 7}, r"T \(nodes\) must be from 1 to 6, got 7"),
        (
            {"scores": floats(2, 4)},
            r"scores must be float32 \[B, T\] = \[2, 3\], got float32 \[2, 4\]",
        ),
        (
            {"ancestors": integers(2, 3, 2)},
            r"ancestors must be int64 \[B, T, W\] = \[2, 3, 1\], got int64 \[2, 3, 2\]",
        ),
        ({"root_tokens": floats(2)}, r"root_tokens must be int64 \[B\] = \[2\], got float32 \[2\]"),
        (
            {"candidate_scores": floats(5)},
            r"candidate_scores must be float32 \[B, N\].* got float32 \[5\]",
        ),
    ],
)
def test_errors(change, message):
    change = dict(change)
    T = change.pop("T", 3)
    arguments = {
        "root_tokens": integers(2),
        "candidate_tokens": integers(2, 5),
        "candidate_scores": torch.zeros(2, 5),
        "candidate_parents": integers(2, 5),
        **outputs(2, T),
        **change,
    }
    with pytest.raises(ValueError, match=f"build_tree: {message}"):
        build_tree(**arguments)

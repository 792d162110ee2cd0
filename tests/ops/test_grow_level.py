"""grow_level: scores, selection, ties, and what may not be touched."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import DTYPES, floats, integers, with_gaps
from vispec.ops import grow_level, grow_level_reference, use_backend


def outputs(B: int, N: int, K: int) -> dict:
    return {
        "candidate_tokens": integers(B, N),
        "candidate_scores": floats(B, N),
        "candidate_parents": integers(B, N),
        "next_frontier": integers(B, K),
        "next_rows": integers(B, K),
        "next_tokens": integers(B, K),
        "next_scores": floats(B, K),
    }


def check(backend, logits, K, *, offset=0, slack=0, frontier_scores=None, frontier=None, head_tokens=None):
    """Run backend and reference; scores may differ by rounding, choices must follow from them."""
    B, R, V = logits.shape
    N = offset + R * K + slack
    frontier_scores = -torch.arange(B * R).view(B, R) / 3 if frontier_scores is None else frontier_scores
    frontier = torch.arange(-1, B * R - 1).view(B, R) if frontier is None else frontier
    arguments = {"offset": offset, "head_tokens": head_tokens}
    expected = outputs(B, N, K)
    grow_level_reference(logits, frontier_scores, frontier, **arguments, **expected)
    got = backend.run(grow_level, logits, frontier_scores, frontier, **arguments, **outputs(B, N, K))

    level = slice(offset, offset + R * K)
    for name in ("candidate_tokens", "candidate_parents"):
        assert torch.equal(got[name], expected[name]), name
    torch.testing.assert_close(
        got["candidate_scores"], expected["candidate_scores"], rtol=2e-6, atol=4e-6, equal_nan=True
    )
    children = got["candidate_scores"][:, level]
    # The next frontier is judged by the scores that the backend itself wrote: a difference in the
    # last place between two backends may order two children either way.
    order = torch.sort(children, dim=1, descending=True, stable=True).indices[:, :K]
    assert torch.equal(got["next_frontier"], order + offset)
    assert torch.equal(got["next_rows"], order // K)
    assert torch.equal(got["next_tokens"], got["candidate_tokens"][:, level].gather(1, order))
    assert torch.equal(got["next_scores"], children.gather(1, order))
    # A child never outranks its parent.
    assert bool((children <= frontier_scores.repeat_interleave(K, dim=1)).all())
    return got


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "R", "V", "K"),
    [
        (1, 1, 1, 1),
        (1, 1, 5, 5),
        (2, 3, 17, 4),
        (1, 8, 1000, 8),
        (3, 1, 513, 16),
        (2, 2, 4099, 3),
        (1, 5, 64, 64),
    ],
)
def test_matches_reference(backend, generator, dtype, B, R, V, K):
    logits = (torch.randn(B, R, V, generator=generator) * 4).to(dtype)
    check(backend, logits, K, offset=3, slack=2)
    check(backend, with_gaps(logits), K)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [32064, 151936])
def test_large_vocabulary(backend, generator, dtype, V):
    logits = (torch.randn(1, 2, V, generator=generator) * 3).to(dtype)
    check(backend, logits, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_that_of_torch(backend, generator, dtype):
    """Against float64: at most twice the error of torch's own float32 log-softmax."""
    logits = (torch.randn(2, 4, 30011, generator=generator) * 6).to(dtype)
    K = 8
    got = check(backend, logits, K, frontier_scores=torch.zeros(2, 4))
    exact = logits.double().log_softmax(-1)
    plain = logits.float().log_softmax(-1)
    columns = got["candidate_tokens"].view(2, 4, K)
    error = (got["candidate_scores"].view(2, 4, K) - exact.gather(2, columns)).abs().max()
    bound = (plain.gather(2, columns) - exact.gather(2, columns)).abs().max()
    assert float(error) <= 2 * float(bound) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lower_index(backend, generator, dtype):
    logits = torch.randint(-2, 2, (2, 4, 777), generator=generator).to(dtype)
    check(backend, logits, 9, frontier_scores=torch.zeros(2, 4))
    flat = check(backend, torch.zeros(1, 3, 100, dtype=dtype), 5, frontier_scores=torch.zeros(1, 3))
    assert flat["candidate_tokens"].tolist() == [[0, 1, 2, 3, 4] * 3]
    assert flat["next_frontier"].tolist() == [[0, 1, 2, 3, 4]]
    zeros = torch.tensor([[[-0.0, 0.0, -0.0, 0.0]]], dtype=dtype)
    assert check(backend, zeros, 4)["candidate_tokens"].tolist() == [[0, 1, 2, 3]]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
def test_unusable_logits(backend, generator, dtype):
    logits = torch.randn(1, 6, 700, generator=generator).to(dtype)
    logits[0, 0, ::2] = torch.nan
    logits[0, 1, 1:] = -torch.inf
    logits[0, 2] = -torch.inf
    logits[0, 3] = torch.nan
    logits[0, 4, 650:] = torch.inf
    logits[0, 5] = torch.finfo(dtype).max
    got = check(backend, logits, 7)
    scores = got["candidate_scores"].view(6, 7)
    assert not scores.isnan().any()
    assert bool((scores[2] == -torch.inf).all()) and bool((scores[3] == -torch.inf).all())
    assert got["candidate_tokens"].view(6, 7)[4].tolist() == list(range(650, 657))


def test_minus_infinity_in_the_frontier(backend, generator):
    logits = torch.randn(1, 2, 40, generator=generator)
    scores = torch.tensor([[-torch.inf, -1.0]])
    got = check(backend, logits, 3, frontier_scores=scores)
    assert got["next_rows"].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_head(backend, generator, dtype):
    logits = torch.randn(2, 3, 129, generator=generator).to(dtype)
    head_tokens = torch.randperm(100_000, generator=generator)[:129]
    check(backend, logits, 4, head_tokens=head_tokens)


def test_every_float16_is_read_exactly(backend):
    """All finite float16 values, subnormal ones included, come out in order."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[values.isfinite()]
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))]
    for start in range(0, len(values) - 64, 8192):
        check(backend, values[start : start + 64][None, None], 64)


def valid() -> dict:
    return {
        "logits": torch.zeros(2, 3, 10),
        "frontier_scores": torch.zeros(2, 3),
        "frontier": torch.zeros(2, 3, dtype=torch.int64),
        "offset": 0,
        **outputs(2, 12, 4),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.zeros(2, 3, 10, dtype=torch.float64)},
            r"logits must be float32, float16 or bfloat16",
        ),
        (
            {"logits": torch.zeros(2, 3, 20)[:, :, ::2]},
            r"the last dimension of logits must be contiguous",
        ),
        ({"logits": torch.zeros(0, 3, 10)}, r"logits must not be empty, got float32 \[0, 3, 10\]"),
        (
            {"frontier": torch.zeros(2, 3)},
            r"frontier must be int64 \[B, R\] = \[2, 3\], got float32 \[2, 3\]",
        ),
        (
            {"next_rows": integers(2, 5)},
            r"next_rows must be int64 \[B, K\] = \[2, 4\], got int64 \[2, 5\]",
        ),
        ({"next_rows": integers(4, 2).t()}, r"next_rows must be contiguous, got strides \(1, 2\)"),
        ({"candidate_scores": integers(2, 12)}, r"candidate_scores must be float32"),
        ({"offset": 1}, r"offset must be from 0 to 0, got 1"),
        ({"offset": -1}, r"offset must be from 0 to 0, got -1"),
        (
            {"head_tokens": integers(9)},
            r"head_tokens must be int64 \[V\] = \[10\], got int64 \[9\]",
        ),
        (outputs(2, 33, 11), r"top_k must be from 1 to 10, got 11"),
    ],
)
def test_errors(change, message):
    arguments = {**valid(), **change}
    with pytest.raises(ValueError, match=f"grow_level: {message}"):
        grow_level(**arguments)


def test_unknown_backend():
    with pytest.raises(ValueError, match="must be one of reference, native, emulated, got 'fast'"):
        with use_backend("fast"):
            pass

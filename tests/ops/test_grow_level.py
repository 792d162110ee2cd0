"""grow_level: scores, selection, ties, and what may not be touched."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import DTYPES, floats, integers, with_gaps
from tests.ops.conftest import available
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
        "arrivals": torch.zeros(B, dtype=torch.int32),
    }


def check(backend, logits, K, *, offset=0, slack=0, frontier_scores=None, frontier=None, head_tokens=None, **more):
    """Run backend and reference; scores may differ by rounding, choices must follow from them."""
    B, R, V = logits.shape
    N = offset + R * K + slack
    frontier_scores = -torch.arange(B * R).view(B, R) / 3 if frontier_scores is None else frontier_scores
    frontier = torch.arange(-1, B * R - 1).view(B, R) if frontier is None else frontier
    arguments = {"offset": offset, "head_tokens": head_tokens}
    expected = outputs(B, N, K)
    grow_level_reference(logits, frontier_scores, frontier, **arguments, **expected)
    got = backend.run(grow_level, logits, frontier_scores, frontier, **arguments, **outputs(B, N, K), **more)

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
    assert not got["arrivals"].any()
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


def test_a_stale_frontier(backend, generator):
    """Scores that are no numbers count as -inf, and what a row is called is copied as it is."""
    logits = torch.randn(2, 3, 40, generator=generator)
    scores = torch.tensor([[torch.nan, -1.0, torch.nan], [torch.nan] * 3])
    frontier = torch.tensor([[-(1 << 63), (1 << 63) - 1, 7], [-5, 1 << 40, 0]])
    places = outputs(2, 12, 4)
    got = backend.run(grow_level, logits, scores, frontier, offset=0, **places)
    assert got["next_rows"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert torch.equal(got["candidate_parents"], frontier.repeat_interleave(4, dim=1))
    kept = got["candidate_scores"].view(2, 3, 4)
    assert bool((kept[scores.isnan()] == -torch.inf).all()) and bool(kept[0, 1].isfinite().all())
    assert bool((got["next_scores"][1] == -torch.inf).all())


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


def carried(B, R, K, *, slots, C, generator, dtype=torch.float32, gap=0) -> dict:
    """Inputs and poisoned destinations of what the next level reads; rows of `hidden` with `gap` NaN between them."""
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (B, R, (slots + 63) // 64), generator=generator)
    if slots % 64:
        words[:, :, -1] &= (1 << slots % 64) - 1
    buffer = torch.full((B, R + 1, C + gap), torch.nan, dtype=dtype)
    hidden = buffer[:, 1:, gap:]
    hidden.copy_(torch.randn(B, R, C, generator=generator))
    return {
        "slots": slots,
        "ancestors": words if slots else None,
        "next_ancestors": integers(B, K, (slots + K + 63) // 64),
        "hidden": hidden,
        "next_hidden": torch.full((B, K, C), torch.nan, dtype=dtype),
    }


def expect_carried(got: dict, more: dict) -> None:
    """What was written must follow from the rows that the backend itself chose; slot by slot, in Python."""
    B, K = got["next_rows"].shape
    for b in range(B):
        for k, row in enumerate(got["next_rows"][b].tolist()):
            assert torch.equal(got["next_hidden"][b, k], more["hidden"][b, row])
            above = (
                [] if more["ancestors"] is None else [word % (1 << 64) for word in more["ancestors"][b, row].tolist()]
            )
            seen = sum(word << 64 * w for w, word in enumerate(above)) | 1 << more["slots"] + k
            found = [word % (1 << 64) for word in got["next_ancestors"][b, k].tolist()]
            assert sum(word << 64 * w for w, word in enumerate(found)) == seen


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [0, 3, 8])
@pytest.mark.parametrize(
    ("B", "R", "K", "slots", "C"),
    [
        (2, 1, 4, 0, 8),  # the root's children
        (1, 1, 1, 0, 1),
        (2, 3, 8, 56, 40),  # up to the last bit of a word
        (1, 8, 8, 57, 24),  # over a word's edge
        (2, 4, 4, 64, 7),
        (1, 2, 64, 63, 5),  # two words more than the rows', less one bit
        (1, 3, 4, 130, 6),
        (3, 5, 16, 240, 33),  # as many slots as tree_attention takes
        (1, 8, 8, 8, 1112),  # more vectors than threads hold at once
    ],
)
def test_what_the_next_level_reads(backend, generator, dtype, gap, B, R, K, slots, C):
    more = carried(B, R, K, slots=slots, C=C, generator=generator, dtype=dtype, gap=gap)
    logits = torch.randn(B, R, 500, generator=generator)
    got = check(backend, logits, K, offset=3, slack=1, frontier_scores=torch.zeros(B, R), **more)
    expect_carried(got, more)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("batch_stride", "row_stride", "start", "C"),
    [(48, 24, 0, 16), (49, 24, 0, 16), (48, 19, 0, 16), (48, 24, 1, 16), (48, 24, 0, 15)],
)
def test_each_thing_that_forbids_vectors(backend, generator, batch_stride, row_stride, start, C):
    buffer = torch.full((2 * batch_stride + 1,), torch.nan).half()
    hidden = buffer.as_strided((2, 2, C), (batch_stride, row_stride, 1), start)
    hidden.copy_(torch.randn(2, 2, C, generator=generator))
    more = {"hidden": hidden, "next_hidden": torch.full((2, 4, C), torch.nan).half()}
    got = check(backend, torch.randn(2, 2, 30, generator=generator), 4, **more)
    for b, rows in enumerate(got["next_rows"]):
        assert torch.equal(got["next_hidden"][b], hidden[b, rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_copied_bit_for_bit(backend, generator, dtype):
    """Every number of 16 bits, subnormal ones, infinities and -0 among them."""
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    hidden = (bits * 65537 if dtype is torch.float32 else bits).to(integer).view(dtype)
    hidden = hidden[~hidden.isnan()].view(1, 2, -1)
    more = {"hidden": hidden, "next_hidden": torch.zeros(1, 4, hidden.shape[2], dtype=dtype)}
    got = check(backend, torch.randn(1, 2, 30, generator=generator), 4, **more)
    for k, row in enumerate(got["next_rows"][0].tolist()):
        assert torch.equal(got["next_hidden"][0, k].view(integer), hidden[0, row].view(integer))


def test_each_of_what_the_next_level_reads_alone(backend, generator):
    """Destinations that are left out are not missed, and inputs without one are not looked at."""
    logits, wrong = torch.randn(2, 3, 50, generator=generator), integers(1)
    whole = carried(2, 3, 4, slots=70, C=6, generator=generator)
    expected = check(backend, logits, 4, **whole)
    alone = {name: whole[name] for name in ("slots", "ancestors", "next_ancestors")}
    got = check(backend, logits, 4, **alone, hidden=wrong)
    assert torch.equal(got["next_ancestors"], expected["next_ancestors"])
    got = check(
        backend, logits, 4, slots=900, ancestors=wrong, hidden=whole["hidden"], next_hidden=whole["next_hidden"]
    )
    assert torch.equal(got["next_hidden"], expected["next_hidden"])


def test_ancestors_are_not_read_before_the_first_slot(backend, generator):
    more = carried(2, 1, 4, slots=0, C=6, generator=generator) | {"ancestors": integers(1)}
    got = check(backend, torch.randn(2, 1, 50, generator=generator), 4, **more)
    assert got["next_ancestors"].tolist() == [[[1], [2], [4], [8]]] * 2


def test_counters_serve_level_after_level(backend, generator):
    """One tensor of counters through levels of other sizes, as in the rounds of a generation: never cleared between."""
    arrivals = torch.zeros(3, dtype=torch.int32, device=backend.device)
    sizes = [(3, 1, 9000, 8), (3, 8, 9000, 8), (1, 5, 40, 3), (2, 2, 20_000, 16), (3, 8, 9000, 8), (3, 1, 17, 2)]
    with use_backend(None if backend.name == "cuda" else backend.name):
        for B, R, V, K in sizes * 2:
            logits = torch.randn(B, R, V, generator=generator).to(backend.device)
            scores = torch.zeros(B, R, device=backend.device)
            frontier = torch.arange(R, device=backend.device).repeat(B, 1)
            places = {name: place.to(backend.device) for name, place in outputs(B, R * K, K).items()}
            grow_level(logits, scores, frontier, offset=0, **places | {"arrivals": arrivals[:B]})
            expected = outputs(B, R * K, K)
            grow_level_reference(logits.cpu(), scores.cpu(), frontier.cpu(), offset=0, **expected)
            assert torch.equal(places["candidate_tokens"].cpu(), expected["candidate_tokens"])
            children = places["candidate_scores"].sort(dim=1, descending=True, stable=True).indices[:, :K]
            assert torch.equal(places["next_frontier"], children)
            assert arrivals.tolist() == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("R", [1, 8])
def test_a_graph_replays_with_other_inputs(R):
    """One launch, no clearing between replays, and what it finds in its inputs at each."""
    cuda, B, V, K, C = available("cuda"), 2, 40_000, 8, 128
    generator = torch.Generator().manual_seed(R)
    more = carried(B, R, K, slots=64, C=C, generator=generator, dtype=torch.bfloat16)
    arguments = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in more.items()}
    arguments |= {name: place.cuda() for name, place in outputs(B, R * K, K).items()}
    logits, scores = torch.zeros(B, R, V, device="cuda"), torch.zeros(B, R, device="cuda")
    frontier = torch.arange(R, device="cuda").repeat(B, 1)
    graph = torch.cuda.CUDAGraph()
    grow_level(logits, scores, frontier, offset=0, **arguments)
    with torch.cuda.graph(graph):
        grow_level(logits, scores, frontier, offset=0, **arguments)
    for _ in range(20):
        fresh = torch.randn(B, R, V, generator=generator)
        logits.copy_(fresh)
        arguments["hidden"].copy_(torch.randn(B, R, C, generator=generator))
        graph.replay()
        got = {name: value.cpu() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        expected = check(cuda, fresh, K, frontier_scores=torch.zeros(B, R), frontier=frontier.cpu())
        for name in expected.keys() - {"positional"}:
            assert torch.equal(got[name], expected[name]), name
        expect_carried(got, more | {"hidden": got["hidden"]})


def valid() -> dict:
    return {
        "logits": torch.zeros(2, 3, 10),
        "frontier_scores": torch.zeros(2, 3),
        "frontier": torch.zeros(2, 3, dtype=torch.int64),
        "offset": 0,
        **outputs(2, 12, 4),
        **carried(2, 3, 4, slots=62, C=5, generator=torch.Generator()),
    }


def test_valid_arguments_are_valid():
    grow_level(**valid())


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
        ({"arrivals": integers(2)}, r"arrivals must be int32 \[B\] = \[2\], got int64 \[2\]"),
        ({"arrivals": torch.zeros(1, dtype=torch.int32)}, r"arrivals must be int32 \[B\] = \[2\], got int32 \[1\]"),
        ({"slots": 253}, r"slots must be from 0 to 252, got 253"),
        ({"slots": -1}, r"slots must be from 0 to 252, got -1"),
        ({"ancestors": None}, r"ancestors must be int64 \[B, R, W\] = \[2, 3, 1\], got NoneType None"),
        ({"ancestors": integers(2, 3, 2)}, r"ancestors must be int64 \[B, R, W\] = \[2, 3, 1\], got int64"),
        ({"next_ancestors": integers(2, 4, 1)}, r"next_ancestors must be int64 \[B, K, W\] = \[2, 4, 2\], got int64"),
        ({"hidden": None}, r"hidden must be float32, float16 or bfloat16 \[B, R, C\], got NoneType None"),
        (
            {"hidden": integers(2, 3, 5)},
            r"hidden must be float32, float16 or bfloat16 \[B, R, C\], got int64 \[2, 3, 5\]",
        ),
        ({"hidden": floats(2, 2, 5)}, r"hidden must be float32 \[B, R, C\] = \[2, 3, 5\], got float32 \[2, 2, 5\]"),
        ({"hidden": floats(2, 3, 10)[:, :, ::2]}, r"the last dimension of hidden must be contiguous, got strides"),
        ({"hidden": floats(2, 3, 5).half()}, r"next_hidden must be float16 \[B, K, C\] = \[2, 4, 5\], got float32"),
        ({"next_hidden": floats(2, 5, 4).mT}, r"next_hidden must be contiguous, got strides"),
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

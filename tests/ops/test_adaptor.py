"""adaptor: softmax-weighted rows of every span, and nothing of the rows around them."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import DTYPES, INTEGER_POISON, floats
from tests.ops.conftest import available
from vispec.ops import adaptor, attend, use_backend

HALVES = [torch.float16, torch.bfloat16]


def lines(count: int, C: int, dtype: torch.dtype, generator: torch.Generator, *, scale: float = 1.0) -> torch.Tensor:
    """[count, C] random numbers inside a larger buffer of NaN, with a row stride that no size explains."""
    buffer = torch.full((count + 3, C + 24), torch.nan, dtype=dtype)
    view = buffer[2 : 2 + count, 8 : 8 + C]
    view.copy_(torch.randn(count, C, generator=generator) * scale)
    return view


def problem(spans, C, R, dtype, generator, *, N=None, scale=None):
    """Queries, rows with NaN outside every span, starts and lengths."""
    N = max(start + length for start, length in spans) + 3 if N is None else N
    queries = lines(R, C, dtype, generator, scale=3 * C**-0.5 if scale is None else scale)
    rows = lines(N, C, dtype, generator)
    inside = torch.zeros(N, dtype=torch.bool)
    for start, length in spans:
        inside[start : start + length] = True
    rows[~inside] = torch.nan
    starts, lengths = (torch.tensor(column) for column in zip(*spans, strict=True))
    return queries, rows, starts, lengths


def run(backend, queries, rows, starts, lengths) -> torch.Tensor:
    output = floats(len(starts), *queries.shape).to(rows.dtype)
    return backend.run(adaptor, queries, rows, starts, lengths, output=output)["output"]


def check(backend, spans, C, R, dtype, generator, **more) -> None:
    """Against float64: at most twice the error of PyTorch's own way at the same dtype, span by span."""
    queries, rows, starts, lengths = problem(spans, C, R, dtype, generator, **more)
    got = run(backend, queries, rows, starts, lengths)
    assert torch.equal(run(backend, queries, rows, starts, lengths), got)
    for actual, (start, length) in zip(got, spans, strict=True):
        own = rows[start : start + length]
        exact = attend(queries.double(), own.double()) if length else torch.zeros(R, C)
        error = (actual.double() - exact).abs().max()
        assert error <= 2 * (attend(queries, own).double() - exact).abs().max(), (start, length, float(error))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.sanitize)]
)
@pytest.mark.parametrize(
    ("spans", "C", "R"),
    [
        ([(0, 1)], 64, 2),
        ([(0, 3), (2, 40)], 8, 1),
        ([(5, 63)], 64, 8),
        ([(1, 64), (80, 0), (70, 65)], 72, 18),
        ([(3, 576), (0, 1)], 64, 64),
        ([(7, 33), (40, 1), (50, 129), (2, 5), (200, 64)], 128, 80),
        ([(9, 576)], 320, 6),  # two blocks of columns, the second not full
        ([(11, 100), (120, 31)], 1032, 8),  # two slices, and a last stage of 8 columns
        ([(0, 40), (0, 40), (10, 25), (39, 1), (0, 90)], 64, 100),  # overlapping; two blocks of queries
    ],
)
def test_spans_of_all_lengths(backend, generator, dtype, spans, C, R):
    check(backend, spans, C, R, dtype, generator)


@pytest.mark.parametrize("dtype", HALVES)
def test_more_spans_than_lanes_and_runs_of_every_worker(backend, generator, dtype):
    """70 spans in a row, short ones first, some without rows: shares end in the middle of spans and between them."""
    lengths = [i * i % 67 for i in range(70)]
    spans, start = [], 2
    for length in lengths:
        spans.append((start, length))
        start += length + 1
    check(backend, spans, 64, 4, dtype, generator)


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_beyond_one_chunk(backend, generator, dtype):
    """4200 rows of 8 KiB are read in two chunks that meet at row 2112."""
    spans = [(2040, 150), (2112, 30), (2000, 112), (4195, 5), (100, 0), (2111, 1)]
    check(backend, spans, 4096, 2, dtype, generator, N=4200)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores_do_not_overflow(backend, generator, dtype):
    """The largest score of a span alone decides, whatever runs and spans around it hold."""
    N, C = 900, 64
    rows = lines(N, C, dtype, generator)
    rows[:, 0] = torch.arange(N) % 2 * 2 - 1.0
    rows[5, 0], rows[600, 0], rows[899, 0] = 2, -4, 8
    queries = torch.zeros(2, C, dtype=dtype)
    queries[:, 0] = torch.tensor([1.0, -1.0]) * (3e3 if dtype is torch.float16 else 1e30)
    starts, lengths = torch.tensor([0, 3, 595, 5]), torch.tensor([900, 4, 200, 596])
    got = run(backend, queries, rows, starts, lengths)
    for place, best in {(0, 0): 899, (0, 1): 600, (1, 0): 5, (2, 1): 600, (3, 0): 5, (3, 1): 600}.items():
        assert torch.equal(got[place], rows[best])
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2, 64, 577])
def test_equal_scores_give_the_mean(backend, generator, dtype, length):
    rows = lines(length, 64, dtype, generator)
    rows[:, 0] = 1
    queries = torch.zeros(5, 64, dtype=dtype)
    queries[:, 0] = torch.tensor([0.0, 3.0, -7.0, 200.0, -900.0])
    got = run(backend, queries, rows, torch.tensor([0]), torch.tensor([length]))
    plain = attend(queries, rows).double()
    mean = rows.double().mean(0)
    assert (got[0].double() - mean).abs().max() <= 2 * (plain - mean).abs().max().clamp(min=1e-7)


def test_stale_starts_and_lengths_stay_inside(backend, generator):
    """What a graph's warm-up may leave there: cut to the rows, and nothing else read or written."""
    rows, queries = lines(50, 64, torch.bfloat16, generator), lines(4, 64, torch.bfloat16, generator)
    far = 1 << 62
    starts = torch.tensor([-5, far, INTEGER_POISON, 40, -far, 50, 0])
    lengths = torch.tensor([20, far, far, far, INTEGER_POISON, 1, 50])
    cut = [(0, 20), (0, 0), (0, 50), (40, 10), (0, 0), (0, 0), (0, 50)]
    got = run(backend, queries, rows, starts, lengths)
    clean = run(backend, queries, rows, *(torch.tensor(column) for column in zip(*cut, strict=True)))
    assert torch.equal(got, clean) and clean.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_at_all(backend, dtype):
    queries, rows = torch.ones(3, 16, dtype=dtype), torch.ones(0, 16, dtype=dtype)
    got = run(backend, queries, rows, torch.tensor([0, 4]), torch.tensor([0, 9]))
    assert got.shape == (2, 3, 16) and not got.any()


def test_a_row_that_is_not_a_number_shows_in_its_own_spans_only(backend, generator):
    queries, rows, starts, lengths = problem([(0, 200), (200, 30)], 64, 2, torch.bfloat16, generator)
    rows[77, 3] = torch.nan
    got = run(backend, queries, rows, starts, lengths)
    assert got[0].isnan().all() and got[1].isfinite().all()


def good() -> dict:
    return {
        "queries": torch.ones(4, 32),
        "rows": torch.ones(9, 32),
        "starts": torch.zeros(2, dtype=torch.int64),
        "lengths": torch.zeros(2, dtype=torch.int64),
        "output": torch.zeros(2, 4, 32),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.ones(9, 32, dtype=torch.float64)}, r"rows must be float32, .*got float64 \[9, 32\]"),
        ({"rows": torch.ones(9)}, r"rows must be .* \[N, C\], got float32 \[9\]"),
        ({"queries": torch.ones(4, 40)}, r"queries must be float32 \[R, C\] = \[\*, 32\], got float32 \[4, 40\]"),
        ({"queries": torch.ones(4, 32).half()}, "queries must be float32 .*got float16"),
        ({"queries": torch.ones(0, 32)}, r"R \(queries\) must be from 1 to 65535, got 0"),
        ({"starts": torch.zeros(2)}, r"starts must be int64 \[P\] = \[2\], got float32"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths must be int64 \[P\] = \[2\]"),
        ({"output": torch.zeros(2, 4, 32).half()}, r"output must be float32 \[P, R, C\] = \[2, 4, 32\], got float16"),
        ({"output": torch.zeros(2, 4, 64)[:, :, ::2]}, "output must be contiguous"),
        ({"starts": torch.zeros(0, dtype=torch.int64)}, r"P \(spans\) must be from 1 to 65535, got 0"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = good() | change
    with pytest.raises(ValueError, match=f"adaptor: .*{message}"):
        adaptor(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.ones(4, 36), "rows": torch.ones(9, 36), "output": torch.ones(2, 4, 36)},
         r"C \(hidden units\) must be a multiple of 8, got 36"),
        ({"rows": torch.ones(32, 9).T}, r"rows must have strides \(a multiple of 8, 1\), got \(1, 9\)"),
        ({"rows": torch.ones(9, 36)[:, :32]}, r"rows must have strides \(a multiple of 8, 1\), got \(36, 1\)"),
        ({"queries": torch.ones(4, 40)[:, 1:33]}, "queries must start at a multiple of 16 bytes, got 0x"),
    ],
)  # fmt: skip
def test_what_vectors_cannot_read(change, message):
    """Refused by the kernels; the reference, which other devices use, takes them."""
    available("emulated")
    halves = {name: halved(value) for name, value in (good() | change).items()}
    with use_backend("emulated"), pytest.raises(ValueError, match=f"adaptor: {message}"):
        adaptor(**halves)
    with use_backend("reference"):
        adaptor(**halves)


def halved(value: torch.Tensor) -> torch.Tensor:
    """The same view in bfloat16; integers as they are."""
    if not value.is_floating_point():
        return value
    storage = torch.ones(value.untyped_storage().nbytes() // 4, dtype=torch.bfloat16)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


def test_the_message_cases_start_from_good_arguments():
    adaptor(**good())

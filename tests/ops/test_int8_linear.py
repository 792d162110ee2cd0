"""int8_linear: every weight and column in its place, the rounding, strides, and what may not be touched."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.cases import DTYPES, poisoned_rows, step_of
from vispec.ops import int8_linear, int8_linear_reference, int8_weight

# Rows by outputs by columns: blocks of 8, 16 and 32 rows and what lies beyond, outputs that fill no block, columns
# that fill no step, runs of several steps.
SIZES = [
    (0, 8, 16),
    (3, 0, 16),
    (1, 1, 16),
    (5, 15, 48),
    (7, 33, 80),
    (8, 32, 512),
    (9, 31, 1040),
    (16, 40, 64),
    (17, 65, 576),
    (65, 35, 592),
    (2, 7, 4096),
]


def run(backend, rows, weight, scales, bias=None, *, gap=0) -> torch.Tensor:
    """The output of one call whose rows lie `gap` elements apart; everything between them must stay."""
    (M, _), N = rows.shape, weight.shape[0]
    poison = -7.0

    def call(rows, weight, scales, *, bias, buffer):
        output = buffer.as_strided((M, N), (N + gap, 1), gap)
        int8_linear(rows, weight, scales, output=output, bias=bias)

    inputs = [poisoned_rows(rows, gap=gap) if gap else rows, weight, before_nan(scales)]
    bias = None if bias is None else before_nan(bias)
    buffer = torch.full(((M + 4) * (N + gap) + gap,), poison, dtype=rows.dtype)
    got = backend.run(call, *inputs, bias=bias, buffer=buffer)
    written = got["buffer"].as_strided((M, N), (N + gap, 1), gap)
    result = written.clone()
    written.fill_(poison)
    assert bool((got["buffer"] == poison).all()), "written outside the rows"
    for before, after in zip(inputs, got["positional"], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    return result


def before_nan(values: torch.Tensor) -> torch.Tensor:
    """The same values at the start of a buffer of NaN."""
    return torch.cat([values, values.new_full((40,), torch.nan)])[: len(values)]


def expected(rows, weight, scales, bias=None) -> torch.Tensor:
    output = rows.new_full((rows.shape[0], weight.shape[0]), torch.nan)
    int8_linear_reference(rows, weight, scales, output=output, bias=bias)
    return output


def exactly(rows, weight, scales, bias=None) -> torch.Tensor:
    products = rows.double() @ weight.double().T * scales.double()
    return products if bias is None else products + bias.double()


def any_int8(N: int, C: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-128, 128, (N, C), generator=generator).to(torch.int8)


@pytest.mark.parametrize("gap", [0, 3, 8])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.sanitize)]
)
@pytest.mark.parametrize(("M", "N", "C"), SIZES)
def test_bit_for_bit_where_the_sum_is_exact(backend, generator, dtype, gap, M, N, C):
    """Small integers times any int8: whatever the order, one sum, and scales that move its exponent alone."""
    rows = torch.randint(-8, 9, (M, C), generator=generator).to(dtype)
    weight = any_int8(N, C, generator)
    scales = torch.ldexp(torch.ones(N), torch.randint(-9, -5, (N,), generator=generator))
    bias = torch.randint(-99, 100, (N,), generator=generator).to(dtype)
    for added in (None, bias):
        got = run(backend, rows, weight, scales, added, gap=gap)
        assert torch.equal(got, expected(rows, weight, scales, added))
        assert torch.equal(got, exactly(rows, weight, scales, added).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [8, 16, 48])
def test_every_weight_in_every_column(backend, dtype, M):
    """Rows with a single one pick the columns out: all values of int8, each exact."""
    N, C = 256, 144
    weight = (torch.arange(N).unsqueeze(1) + 37 * torch.arange(C)).to(torch.uint8).view(torch.int8)
    ones = torch.eye(C, dtype=dtype)
    for first in range(0, C, M):
        got = run(backend, ones[first : first + M], weight, torch.ones(N))
        assert torch.equal(got, weight.T[first : first + M].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 8, 13, 20])
def test_error_is_that_of_torch(backend, generator, dtype, M):
    """Of the same weight, against float64; in 16 bits hardly more than one rounding at the end."""
    rows = torch.randn(M, 2064, generator=generator).to(dtype)
    weight, scales = int8_weight(torch.randn(37, 2064, generator=generator))
    bias = torch.randn(37, generator=generator).to(dtype)
    exact = exactly(rows, weight, scales, bias)
    got, want = (
        answer.double() for answer in (run(backend, rows, weight, scales, bias), expected(rows, weight, scales, bias))
    )
    assert float((got - exact).abs().max()) <= 2 * float((want - exact).abs().max())
    magnitudes = exactly(rows.abs(), weight.abs(), scales, bias.abs())
    last_place = step_of(exact, dtype) / 2 if dtype is not torch.float32 else 0
    assert bool(((got - exact).abs() <= last_place + 1e-6 * magnitudes).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_stays_alone(backend, generator, dtype):
    rows = torch.randn(11, 80, generator=generator).to(dtype)
    weight = any_int8(21, 80, generator)
    weight[:, 3] = (torch.arange(21) % 3 - 1).to(torch.int8)  # inf times 0 is NaN
    scales = torch.rand(21, generator=generator)
    alone = run(backend, rows, weight, scales)
    for value in (torch.nan, torch.inf, -torch.inf):
        rows[4, 3] = value
        got = run(backend, rows, weight, scales)
        want = expected(rows, weight, scales)[4]
        torch.testing.assert_close(got[4], want, rtol=0, atol=0, equal_nan=True)
        assert not got[4].isfinite().any()
        others = torch.arange(11) != 4
        assert torch.equal(got[others], alone[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_zero_and_beyond_the_dtype(backend, generator, dtype):
    rows, weight = torch.randint(1, 5, (9, 48), generator=generator).to(dtype), torch.full((5, 48), 127).to(torch.int8)
    bias = torch.randint(-9, 10, (5,), generator=generator).to(dtype)
    scales = torch.tensor([0.0, 1e36, -1e36, 1e-44, 1.0])
    got = run(backend, rows, weight, scales, bias)
    assert torch.equal(got[:, 0], bias[:1].expand(9))
    assert torch.equal(got, expected(rows, weight, scales, bias))
    assert bool(got[:, 4].isfinite().all())
    assert bool((got[:, 1] == torch.inf).all() and (got[:, 2] == -torch.inf).all())


def test_rounded_weights_are_near(backend, generator):
    """What the two are for: a linear layer, off by the weights' rounding alone."""
    rows, weight = torch.randn(8, 512, generator=generator), torch.randn(64, 512, generator=generator)
    exact = rows.double() @ weight.double().T
    error = (run(backend, rows, *int8_weight(weight)).double() - exact).square().mean().sqrt()
    assert 0.002 < error / exact.square().mean().sqrt() < 0.01


class Largest(TorchDispatchMode):
    """The largest float32 tensor that is made in the block; and that none is rounded with a NaN, which as int8 is any
    number."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        if isinstance(made, torch.Tensor) and made.dtype is torch.float32:
            assert function is not torch.ops.aten.round_.default or not made.isnan().any()
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("most", [1, 80, 200, 100_000])
def test_a_block_of_the_weight_at_a_time(generator, monkeypatch, most):
    """The same answer, and never more of the weight in float32 than one block."""
    rows, weight = torch.randint(-8, 9, (3, 80), generator=generator).float(), torch.randn(53, 80, generator=generator)
    weight[20] = 0
    rounded, scales = int8_weight(weight)
    whole = expected(rows, rounded, scales)
    monkeypatch.setattr(import_module("vispec.ops.int8_linear"), "BLOCK_ELEMENTS", most)
    assert torch.equal(int8_weight(weight)[0], rounded) and torch.equal(int8_weight(weight)[1], scales)
    with Largest() as largest:
        got = expected(rows, rounded, scales)
    torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-6)
    assert largest.elements <= max(most, 240)  # 240: the rows themselves
    with Largest() as largest:
        int8_weight(weight.bfloat16())
    assert largest.elements <= max(most, 80)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_rounded_to_the_nearest_step(generator, dtype):
    weight = torch.randn(40, 96, generator=generator).to(dtype)
    weight[7] = 0
    weight[8], weight[8, 5] = 0, torch.finfo(dtype).smallest_normal / 8  # a step of few bits, or none
    weight[9], weight[9, 5] = 0, -torch.finfo(dtype).max
    rounded, scales = int8_weight(weight)
    assert (rounded.dtype, scales.dtype, rounded.shape, scales.shape) == (torch.int8, torch.float32, (40, 96), (40,))
    assert scales[7] == 0 and not rounded[7].any()
    assert bool(scales.isfinite().all()) and int(rounded.min()) >= -127
    assert rounded[9, 5] == -127 and rounded[9].count_nonzero() == 1
    usual = torch.arange(40) != 8
    largest = weight.float().abs().amax(dim=1)
    assert torch.equal(scales, largest / 127)
    assert torch.equal(rounded[usual].int().abs().amax(dim=1), torch.where(largest > 0, 127, 0).int()[usual])
    off = (weight.double() - rounded.double() * scales.double().unsqueeze(1)).abs()
    assert bool((off <= scales.double().unsqueeze(1) * (0.5 + 1e-5) + 1e-44).all())


def test_steps_of_one_bit():
    """190 times the least float32 has a step of once that, as have 0 and all between."""
    weight = torch.tensor([[190.0, -190.0, 60.0, 0.0]]) * 2.0**-74 * 2.0**-75
    rounded, scales = int8_weight(weight)
    assert scales.item() == 2.0**-149 and rounded.tolist() == [[127, -127, 60, 0]]
    assert int8_weight(weight / 190)[0].count_nonzero() == 0  # a step of 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite(monkeypatch, value):
    monkeypatch.setattr(import_module("vispec.ops.int8_linear"), "BLOCK_ELEMENTS", 6)
    weight = torch.ones(5, 3)
    weight[3, 1] = value
    with pytest.raises(ValueError, match="int8_weight: weight must be finite, got (nan|inf) in row 3"):
        int8_weight(weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4), r"weight must be float32, .* \[N, C\], got float32 \[4\]"),
        (torch.zeros(4, 2, dtype=torch.int8), r"weight must be float32, .* \[N, C\], got int8 \[4, 2\]"),
        (torch.zeros(4, 0), r"C \(hidden units\) must be from 1 to \d+, got 0"),
    ],
)
def test_errors_of_int8_weight(weight, message):
    with pytest.raises(ValueError, match=f"int8_weight: {message}"):
        int8_weight(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(32)}, r"rows must be float32, .* \[M, C\], got float32 \[32\]"),
        ({"rows": torch.zeros(32, 2).t()}, r"the last dimension of rows must be contiguous, got strides \(1, 2\)"),
        ({"rows": torch.zeros(2, 40)}, r"C \(hidden units\) must be a multiple of 16, got 40"),
        ({"rows": torch.zeros(2, 0)}, r"C \(hidden units\) must be from 16 to \d+, got 0"),
        ({"weight": torch.zeros(6, 32)}, r"weight must be int8 \[N, C\], got float32 \[6, 32\]"),
        ({"weight": torch.zeros(6, 16, dtype=torch.int8)}, r"weight must be int8 \[N, C\], got int8 \[6, 16\]"),
        ({"weight": torch.zeros(32, 6, dtype=torch.int8).t()}, r"weight must be contiguous, got strides \(1, 6\)"),
        ({"scales": torch.zeros(5)}, r"scales must be float32 \[N\] = \[6\], got float32 \[5\]"),
        ({"scales": torch.zeros(6).half()}, r"scales must be float32 \[N\] = \[6\], got float16 \[6\]"),
        ({"bias": torch.zeros(6).half()}, r"bias must be float32 \[N\] = \[6\], got float16 \[6\]"),
        ({"output": torch.zeros(2, 5)}, r"output must be float32 \[M, N\] = \[2, 6\], got float32 \[2, 5\]"),
        ({"output": torch.zeros(2, 6).half()}, r"output must be float32 \[M, N\] = \[2, 6\], got float16 \[2, 6\]"),
        ({"output": torch.zeros(6, 2).t()}, r"the last dimension of output must be contiguous, got strides \(1, 2\)"),
    ],
)
def test_errors(change, message):
    weight = torch.zeros(6, 32, dtype=torch.int8)
    arguments = {"rows": torch.zeros(2, 32), "weight": weight, "scales": torch.zeros(6), "output": torch.zeros(2, 6)}
    with pytest.raises(ValueError, match=f"int8_linear: {message}"):
        int8_linear(**(arguments | change))

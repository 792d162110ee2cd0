"""rms_norm: the roundings of the models, the order of the sum, and what may not be touched."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from tests.ops.cases import DTYPES, poisoned_rows, step_of, steps_apart
from vispec.ops import rms_norm, rms_norm_reference

# Rows by hidden units: a warp a row, several vectors a thread, a block a row, ends that fill no vector.
SIZES = [
    (1, 8),
    (8, 64),
    (30, 80),
    (60, 576),
    (1, 2048),
    (8, 3584),
    (30, 4096),
    (60, 5120),
    (3, 1),
    (5, 7),
    (2, 1025),
]
GAP = 3  # elements between rows: no row but the first of a buffer starts at a multiple of 16 bytes


def run(backend, hidden, weight, *, residual=None, gap=0, epsilon=1e-6, parity=True) -> dict:
    """Output and residual of one call whose rows lie `gap` elements apart; everything between them must stay."""
    M, C = hidden.shape
    poison = -7.0

    def call(hidden, weight, *, buffer, residual):
        output = buffer.as_strided((M, C), (C + gap, 1), gap)
        rms_norm(hidden, weight, output=output, residual=residual, epsilon=epsilon, parity=parity)

    if gap:
        hidden = poisoned_rows(hidden, gap=gap)
        weight = torch.cat([weight.new_full((1,), torch.nan), weight])[1:]
        residual = None if residual is None else poisoned_rows(residual, gap=gap)
    buffer = torch.full(((M + 4) * (C + gap) + gap,), poison, dtype=hidden.dtype)
    got = backend.run(call, hidden, weight, buffer=buffer, residual=residual)
    rows = got["buffer"].as_strided((M, C), (C + gap, 1), gap)
    result = {"output": rows.clone(), "residual": got.get("residual")}
    rows.fill_(poison)
    assert bool((got["buffer"] == poison).all()), "written outside the rows"
    torch.testing.assert_close(got["positional"][0], hidden, rtol=0, atol=0, equal_nan=True)
    return result


def expected(hidden, weight, *, residual=None, epsilon=1e-6, parity=True) -> dict:
    output = torch.full_like(hidden, torch.nan)
    residual = None if residual is None else residual.clone()
    rms_norm_reference(hidden, weight, output=output, residual=residual, epsilon=epsilon, parity=parity)
    return {"output": output, "residual": residual}


def equal(got: dict, want: dict) -> None:
    for name, value in want.items():
        if value is not None:
            torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True)


def exactly(hidden, weight, epsilon=1e-6) -> torch.Tensor:
    values = hidden.double()
    return values / (values.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", [LlamaRMSNorm, Qwen2RMSNorm])
@pytest.mark.parametrize(("M", "C"), SIZES)
def test_reference_is_the_models_own_norm(generator, dtype, module, M, C):
    """Bit for bit, after the addition that the decoder layer does before it."""
    hidden, residual = (torch.randn(M, C, generator=generator).to(dtype) * scale for scale in (1, 3))
    norm = module(C, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(C, generator=generator))
        want = {"output": norm(hidden), "residual": None}
        equal(expected(hidden, norm.weight, epsilon=1e-5), want)
        both = residual + hidden
        want = {"output": norm(both), "residual": both}
        equal(expected(hidden, norm.weight, residual=residual, epsilon=1e-5), want)


@pytest.mark.parametrize("gap", [0, GAP])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "C"), SIZES)
def test_bit_for_bit_where_the_sum_is_exact(backend, generator, dtype, gap, M, C):
    """Small integers: their squares add up without rounding, in any order; everything else has one answer."""
    hidden, residual = (torch.randint(-6, 7, (M, C), generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(C, generator=generator).to(dtype)
    for parity in (True, False):
        for before in (None, residual):
            arguments = {"residual": before, "parity": parity, "epsilon": 1e-5}
            equal(run(backend, hidden, weight, gap=gap, **arguments), expected(hidden, weight, **arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("M", "C"), [(30, 80), (60, 576), (8, 3584), (30, 4096)])
def test_the_sums_order_moves_next_to_nothing(backend, generator, dtype, M, C):
    """A float32 sum in another order may turn a rounding to 16 bits: once, so that the normalised value moves one
    step, and its product with the weight two at most."""
    hidden, residual = (torch.randn(M, C, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(C, generator=generator).to(dtype)
    for case in ({}, {"residual": residual}, {"parity": False}):
        got, want = run(backend, hidden, weight, **case), expected(hidden, weight, **case)
        steps = steps_apart(got["output"], want["output"])
        assert int(steps.max()) <= 2
        assert float((steps > 0).float().mean()) < 1e-3
        if "residual" in case:
            assert torch.equal(got["residual"], want["residual"])
    plain = torch.ones_like(weight)
    steps = steps_apart(run(backend, hidden, plain)["output"], expected(hidden, plain)["output"])
    assert int(steps.max()) <= 1 and float((steps > 0).float().mean()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "C"), [(8, 64), (30, 576), (4, 5120)])
def test_error_is_that_of_torch(backend, generator, dtype, M, C):
    """Against float64, in steps of the dtype: one rounding without parity, two of torch's own with it."""
    hidden = (torch.randn(M, C, generator=generator) * 3).to(dtype)
    weight = torch.randn(C, generator=generator).to(dtype)
    exact = exactly(hidden, weight)

    def error(output) -> float:
        return float(((output.double() - exact).abs() / step_of(exact, dtype)).max())

    bound = error(expected(hidden, weight)["output"])
    with_parity = error(run(backend, hidden, weight)["output"])
    without = error(run(backend, hidden, weight, parity=False)["output"])
    assert with_parity <= 2 * bound
    assert without <= (2 * bound if dtype is torch.float32 else 0.505)
    if dtype is not torch.float32:
        assert with_parity > without  # else the two forms are one


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [64, 4096])
def test_unusable_rows_stay_alone(backend, generator, dtype, C):
    clean = torch.randint(-6, 7, (6, C), generator=generator).to(dtype)
    dirty = clean.clone()
    dirty[1, C - 1] = torch.nan
    dirty[3, 0], dirty[3, C // 2] = torch.inf, -torch.inf
    dirty[4] = torch.finfo(dtype).max
    weight = torch.randn(C, generator=generator).to(dtype)
    got = run(backend, dirty, weight)["output"]
    for row in (0, 2, 5):
        assert torch.equal(got[row], expected(clean[row : row + 1], weight)["output"][0])
    assert bool(got[1].isnan().all())
    torch.testing.assert_close(got[3], expected(dirty, weight)["output"][3], rtol=0, atol=0, equal_nan=True)
    # The sum of squares of bfloat16's and float32's largest is inf, hence the row 0.
    torch.testing.assert_close(got[4], expected(dirty, weight)["output"][4], rtol=2e-3, atol=0)
    # residual + hidden overflows in the dtype, not before.
    residual = torch.full_like(dirty, torch.finfo(dtype).max)
    equal(run(backend, dirty, weight, residual=residual), expected(dirty, weight, residual=residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [24, 80, 5120])
def test_output_may_be_the_input(backend, generator, dtype, C):
    hidden = torch.randint(-6, 7, (9, C), generator=generator).to(dtype)
    weight = torch.randn(C, generator=generator).to(dtype)

    def in_place(hidden, weight):
        rms_norm(hidden, weight, output=hidden, epsilon=1e-6)

    got = backend.run(in_place, hidden, weight)["positional"][0]
    assert torch.equal(got, expected(hidden, weight)["output"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_and_the_widest_row(backend, generator, dtype):
    run(backend, torch.zeros(0, 64, dtype=dtype), torch.ones(64, dtype=dtype))
    C = 65536 // dtype.itemsize
    hidden = torch.randint(-3, 4, (1, C), generator=generator).to(dtype)
    weight = torch.randn(C, generator=generator).to(dtype)
    equal(run(backend, hidden, weight), expected(hidden, weight))


def valid() -> dict:
    return {
        "hidden": torch.zeros(2, 6),
        "weight": torch.zeros(6),
        "output": torch.zeros(2, 6),
        "epsilon": 1e-6,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 6)}, r"hidden must be .* \[M, C\], got float32 \[2, 3, 6\]"),
        ({"hidden": torch.zeros(2, 6).double()}, r"hidden must be float32, .* got float64 \[2, 6\]"),
        ({"hidden": torch.zeros(2, 12)[:, ::2]}, r"the last dimension of hidden must be contiguous"),
        ({"weight": torch.zeros(5)}, r"weight must be float32 \[C\] = \[6\], got float32 \[5\]"),
        ({"weight": torch.zeros(6).half()}, r"weight must be float32 \[C\] = \[6\], got float16 \[6\]"),
        ({"output": torch.zeros(3, 6)}, r"output must be \[M, C\] = float32 \[2, 6\], got float32 \[3, 6\]"),
        ({"output": torch.zeros(2, 6).half()}, r"output must be \[M, C\] = float32 \[2, 6\], got float16"),
        ({"residual": torch.zeros(6)}, r"residual must be .* \[M, C\], got float32 \[6\]"),
        (
            {"hidden": torch.zeros(1, 16385), "output": torch.zeros(1, 16385), "weight": torch.zeros(16385)},
            r"C \(hidden units\) must be from 1 to 16384, got 16385",
        ),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=f"rms_norm: {message}"):
        rms_norm(**{**valid(), **change})

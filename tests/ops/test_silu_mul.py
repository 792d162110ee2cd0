"""silu_mul: the roundings of the models, strides, and values at the ends of the range."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from tests.ops.cases import DTYPES, poisoned_rows, step_of, steps_apart
from vispec.ops import silu_mul, silu_mul_reference

SIZES = [(1, 1), (1, 8), (8, 64), (3, 7), (30, 577), (60, 1536), (2, 11008), (1, 18944)]


def run(backend, gate, up, *, gap=0, parity=True) -> torch.Tensor:
    """The output of one call whose rows lie `gap` elements apart; everything between them must stay."""
    M, C = gate.shape
    poison = -7.0

    def call(gate, up, *, buffer):
        silu_mul(gate, up, output=buffer.as_strided((M, C), (C + gap, 1), gap), parity=parity)

    if gap:
        gate, up = poisoned_rows(gate, gap=gap), poisoned_rows(up, gap=2 * gap)
    buffer = torch.full(((M + 4) * (C + gap) + gap,), poison, dtype=gate.dtype)
    got = backend.run(call, gate, up, buffer=buffer)
    rows = got["buffer"].as_strided((M, C), (C + gap, 1), gap)
    result = rows.clone()
    rows.fill_(poison)
    assert bool((got["buffer"] == poison).all()), "written outside the rows"
    for before, after in zip((gate, up), got["positional"], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    return result


def expected(gate, up, *, parity=True) -> torch.Tensor:
    output = torch.full_like(gate, torch.nan)
    silu_mul_reference(gate, up, output=output, parity=parity)
    return output


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_models_own_activation(generator, dtype):
    gate, up = (torch.randn(30, 577, generator=generator).to(dtype) * 4 for _ in range(2))
    assert torch.equal(expected(gate, up), ACT2FN["silu"](gate) * up)


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "C"), SIZES)
def test_matches_reference(backend, generator, dtype, gap, M, C):
    """Exponentials of two libraries differ in the last place of float32, which rarely turns a rounding to 16 bits;
    the product can double that step."""
    gate, up = (torch.randn(M, C, generator=generator).to(dtype) * 4 for _ in range(2))
    for parity in (True, False):
        got, want = run(backend, gate, up, gap=gap, parity=parity), expected(gate, up, parity=parity)
        if dtype is torch.float32:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        else:
            steps = steps_apart(got, want)
            assert int(steps.max()) <= 2
            assert int((steps > 0).sum()) <= 1 + steps.numel() // 1000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parity", [True, False])
def test_every_gate(backend, dtype, parity):
    """All 65536 bit patterns, inf and NaN included, against the exact value: silu rounded once, the product once."""
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    up = torch.full_like(gate, 1.5)
    got, want = run(backend, gate, up, parity=parity), expected(gate, up, parity=parity)
    assert torch.equal(got.isnan(), want.isnan())
    assert int(steps_apart(got, want).max()) <= 2
    assert float((steps_apart(got, want) > 0).float().mean()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_that_of_torch(backend, generator, dtype):
    gate, up = (torch.randn(30, 1000, generator=generator).to(dtype) * 3 for _ in range(2))
    exact = torch.nn.functional.silu(gate.double()) * up.double()

    def error(output) -> float:
        return float(((output.double() - exact).abs() / step_of(exact, dtype)).max())

    bound = error(expected(gate, up))
    with_parity, without = error(run(backend, gate, up)), error(run(backend, gate, up, parity=False))
    assert with_parity <= 2 * bound
    assert without <= (2 * bound if dtype is torch.float32 else 0.505)
    if dtype is not torch.float32:
        assert with_parity > without  # else the two forms are one


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_one_product(backend, generator, dtype):
    """gate and up side by side in the rows of one tensor, the output in place of the gate."""
    M, C = 5, 24
    fused = torch.randn(M, 2 * C, generator=generator).to(dtype)

    def call(fused):
        silu_mul(fused[:, :C], fused[:, C:], output=fused[:, :C])

    got = backend.run(call, fused)["positional"][0]
    assert torch.equal(got[:, C:], fused[:, C:])
    torch.testing.assert_close(got[:, :C], expected(fused[:, :C], fused[:, C:]), rtol=2e-2, atol=1e-6)
    assert not torch.equal(got[:, :C], fused[:, :C])


def test_nothing_to_do(backend):
    for shape in ((0, 8), (3, 0)):
        run(backend, torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(6)}, r"gate must be float32, .* \[M, I\], got float32 \[6\]"),
        ({"up": torch.zeros(2, 5)}, r"up must be \[M, I\] = float32 \[2, 6\], got float32 \[2, 5\]"),
        ({"up": torch.zeros(6, 2).t()}, r"the last dimension of up must be contiguous, got strides \(1, 2\)"),
        ({"output": torch.zeros(2, 6).half()}, r"output must be \[M, I\] = float32 \[2, 6\], got float16 \[2, 6\]"),
    ],
)
def test_errors(change, message):
    arguments = {"gate": torch.zeros(2, 6), "up": torch.zeros(2, 6), "output": torch.zeros(2, 6), **change}
    with pytest.raises(ValueError, match=f"silu_mul: {message}"):
        silu_mul(**arguments)

"""rope_append: the bits of Hugging Face's rotary embedding, the slots it writes and those it leaves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.ops.cases import DTYPES
from vispec.ops import Tail, rope_append


def tables(B: int, T: int, R: int, generator) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, R] of positions that say nothing about slots."""
    positions = torch.randint(0, 5000, (B, T), generator=generator)
    angles = positions[..., None] * 10000.0 ** -(torch.arange(0, R, 2) / R)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def make(dtype, B, H, G, T, L, D, R, generator, *, biases=True, gap=0) -> dict:
    """Arguments whose projections are views of one [B, T, (H + 2G) * D + gap] result; the rest is NaN."""

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 3).to(dtype)

    rows = torch.nn.functional.pad(draw(B, T, (H + 2 * G) * D), (0, gap), value=torch.nan)
    projected = rows[..., : (H + 2 * G) * D].unflatten(2, (-1, D)).transpose(1, 2)
    queries, new_keys, new_values = projected.split([H, G, G], dim=1)
    cosines, sines = (table.to(dtype) for table in tables(B, T, R, generator))
    bias = (draw(H * D), draw(G * D), draw(G * D)) if biases else (None, None, None)
    caches = torch.full((2, B, G, L + T, D + gap), torch.nan, dtype=dtype)[..., :L, :D]
    return {
        "queries": queries,
        "tail": Tail(new_keys, new_values, cosines, sines, *bias),
        "keys": caches[0],
        "values": caches[1],
        "output": torch.full((B, T, H, D + gap), torch.nan, dtype=dtype)[..., :D].transpose(1, 2),
    }


def check(backend, arguments: dict, lengths: list[int], offset: int = 0) -> None:
    """Against Hugging Face's own function, to the bit; slots of no new token, and all between and behind the caches'
    own, keep what they held."""
    queries, tail, keys, values = (arguments[name] for name in ("queries", "tail", "keys", "values"))
    (T, D), L, R = queries.shape[2:], keys.shape[2], tail.cosines.shape[2]

    def biased(rows: Tensor, bias: Tensor | None) -> Tensor:
        return rows if bias is None else rows + bias.view(-1, 1, D)

    own, new = biased(queries, tail.query_bias), biased(tail.keys, tail.key_bias)
    turned = apply_rotary_pos_emb(own[..., :R], new[..., :R], tail.cosines, tail.sines)
    expected = torch.cat([turned[0], own[..., R:]], dim=-1)
    new_keys = torch.cat([turned[1], new[..., R:]], dim=-1)
    new_values = biased(tail.values, tail.value_bias)
    memory = torch.full((keys.untyped_storage().nbytes() // keys.itemsize,), torch.nan, dtype=keys.dtype)

    def caches(memory: Tensor) -> list[Tensor]:
        return [memory.as_strided(cache.shape, cache.stride(), cache.storage_offset()) for cache in (keys, values)]

    def call(queries: Tensor, tail: Tail, lengths: Tensor, *, memory: Tensor, output: Tensor) -> None:
        rope_append(queries, tail, *caches(memory), lengths, output=output, offset=offset)

    back = backend.run(call, queries, tail, torch.tensor(lengths), memory=memory, output=arguments["output"])
    cached_keys, cached_values = caches(memory)
    for b, length in enumerate(lengths):
        for t in range(T):
            slot = min(max(length, 0), L) + offset + t
            if slot < L:
                cached_keys[b, :, slot], cached_values[b, :, slot] = new_keys[b, :, t], new_values[b, :, t]
    for got, want in ((back["output"], expected), (back["memory"], memory)):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "D", "R"),
    [(1, 4, 4, 30, 64, 64), (2, 7, 1, 1, 128, 128), (1, 8, 2, 5, 80, 80), (3, 2, 1, 9, 96, 48), (1, 1, 1, 3, 256, 256)],
)
def test_the_bits_of_hugging_face(backend, generator, dtype, biases, B, H, G, T, D, R):
    arguments = make(dtype, B, H, G, T, 64, D, R, generator, biases=biases, gap=16)
    check(backend, arguments, [11, 0, 40][:B])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "R", "gap"), [(80, 20, 0), (64, 2, 8), (5, 4, 0), (64, 64, 1), (2, 2, 3)])
def test_rows_that_no_wide_access_fits(backend, generator, dtype, D, R, gap):
    """A quarter of the columns, odd widths, odd strides."""
    check(backend, make(dtype, 2, 3, 1, 4, 12, D, R, generator, gap=gap), [3, 0])


@pytest.mark.parametrize("name", ["cosines", "query_bias", "keys"])
def test_one_misaligned_address(backend, generator, name):
    arguments = make(torch.float16, 1, 2, 2, 3, 9, 64, 64, generator)
    tail = arguments["tail"]
    moved = {}
    for part in ("keys", "values") if name == "keys" else (name,):
        tensor = getattr(tail, part).contiguous()
        moved[part] = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)
    arguments["tail"] = tail._replace(**moved)
    check(backend, arguments, [2])


def spaced(tensor: Tensor, dim: int) -> Tensor:
    """The same values in a larger buffer of NaN, where the stride of `dim` is odd and the others multiples of 8."""
    strides, needed = [1], tensor.shape[-1]
    for place in range(tensor.dim() - 2, -1, -1):
        strides.insert(0, (needed + 7) // 8 * 8 + (place == dim))
        needed += strides[0] * (tensor.shape[place] - 1)
    return torch.full((needed,), torch.nan, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["queries", "output", "caches", "tail"])
def test_one_odd_stride(backend, generator, name, dim):
    arguments = make(torch.float16, 2, 2, 2, 3, 9, 64, 64, generator)
    if name == "caches":
        arguments["keys"], arguments["values"] = spaced(torch.stack([arguments["keys"], arguments["values"]]), dim + 1)
    elif name == "tail":
        rows = {part: spaced(getattr(arguments["tail"], part), dim) for part in ("keys", "values")}
        arguments["tail"] = arguments["tail"]._replace(**rows)
    else:
        arguments[name] = spaced(arguments[name], dim)
    check(backend, arguments, [2, 5])


@pytest.mark.parametrize(
    ("lengths", "offset"),
    [([0, 20], 0), ([17, 18], 0), ([3, 9], 8), ([2, 20], 19), ([-4, -(1 << 63)], 0), ([21, (1 << 63) - 1], 2)],
)
def test_slots_beyond_the_cache_are_not_written(backend, generator, lengths, offset):
    """20 slots and 4 tokens; stale lengths are taken as the nearest possible."""
    check(backend, make(torch.bfloat16, 2, 2, 1, 4, 20, 64, 64, generator), lengths, offset)


def test_extreme_numbers(backend, generator):
    """Overflow to infinity, NaN, signed zeros and subnormal numbers come out as PyTorch's."""
    arguments = make(torch.float16, 1, 1, 1, 4, 8, 64, 64, generator, biases=False)
    special = torch.tensor([65504.0, -65504.0, torch.inf, torch.nan, 0.0, -0.0, 6e-8, -6e-8], dtype=torch.float16)
    arguments["queries"].copy_(special.repeat(8)[torch.randperm(64, generator=generator)])
    arguments["tail"].keys.copy_(special.repeat(8))
    arguments["tail"].cosines.mul_(2)
    check(backend, arguments, [1])


def valid() -> dict:
    arguments = make(torch.float16, 2, 4, 2, 3, 16, 64, 64, torch.Generator().manual_seed(0))
    return arguments | {"lengths": torch.tensor([1, 2])}


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "tail", "message"),
    [
        ({"queries": half(2, 4, 64)}, {}, r"queries must be float32, float16 or bfloat16 \[B, H, T, D\], got"),
        ({"queries": half(2, 0, 3, 64)}, {}, "sizes must be positive"),
        ({"output": half(2, 3, 4, 64)}, {}, r"output must be float16 \[B, H, T, D\] = \[2, 4, 3, 64\], got"),
        ({"keys": half(2, 2, 16, 64).float()}, {}, r"keys must be float16 \[B, G, L, D\]"),
        ({"values": half(2, 2, 17, 64)}, {}, r"values must be float16 \[B, G, L, D\] = \[2, 2, 16, 64\]"),
        ({"values": half(2, 2, 16, 80)[..., :64]}, {}, "keys and values must have equal strides"),
        ({"lengths": torch.tensor([1])}, {}, r"lengths must be int64 \[B\] = \[2\], got int64 \[1\]"),
        ({"offset": -1}, {}, "offset must be from 0 to 16, got -1"),
        ({"output": half(2, 4, 3, 128)[..., ::2]}, {}, "last dimension of output must be contiguous"),
        ({"tail": (1, 2)}, {}, "tail must be a Tail, got tuple"),
        ({}, {"keys": half(2, 2, 4, 64)}, r"tail.keys must be float16 \[B, G, T, D\] = \[2, 2, 3, 64\], got"),
        ({}, {"values": half(2, 2, 3, 64)}, "tail.keys and tail.values must have equal strides"),
        ({}, {"sines": half(2, 3, 32)}, r"tail.sines must be float16 \[B, T, R\] = \[2, 3, 64\], got"),
        ({}, {"cosines": half(2, 3, 63), "sines": half(2, 3, 63)}, "even number of columns from 2 to 64, got 63"),
        ({}, {"cosines": half(2, 3, 66), "sines": half(2, 3, 66)}, "even number of columns from 2 to 64, got 66"),
        ({}, {"query_bias": half(128)}, r"tail.query_bias must be float16 \[heads \* D\] = \[256\], got"),
        ({}, {"value_bias": half(128).float()}, r"tail.value_bias must be float16"),
    ],
)
def test_errors(change, tail, message):
    arguments = valid()
    arguments["tail"] = arguments["tail"]._replace(**tail)
    with pytest.raises(ValueError, match=f"rope_append: .*{message}"):
        rope_append(**arguments | change)

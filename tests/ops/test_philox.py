"""The random numbers of a draw: known answers, uniformity, and the weights."""

from __future__ import annotations

import math

import pytest
import torch

from vispec.ops.draw import WEIGHT_BITS, draw_uniform, philox4x32, token_weights

# Known answers that the Random123 library publishes for philox4x32, 10 rounds: counter, key,
# result.
ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == expected


def test_uniform_is_in_range_and_uniform():
    u = draw_uniform(torch.tensor([1234]), torch.arange(200_000))
    assert 0 <= float(u.min()) and float(u.max()) < 1
    counts = torch.histc(u, 100, 0, 1)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_square < 99 + 5 * math.sqrt(2 * 99)
    # 48 bits, not the 24 of a float32.
    assert float((u * 2**24).frac().abs().max()) > 0.9


def test_all_64_bits_of_seed_and_position_count():
    base = draw_uniform(torch.tensor([5]), torch.tensor([7]))
    for bit in (0, 31, 32, 62, 63):
        flip = torch.tensor([1]) << bit
        assert draw_uniform(torch.tensor([5]) ^ flip, torch.tensor([7])) != base
        assert draw_uniform(torch.tensor([5]), torch.tensor([7]) ^ flip) != base


def test_weights_are_the_exponential():
    x = torch.cat([torch.tensor([0.0, -1e-8, -1e-3]), -torch.rand(100_000) * 20])
    weights = token_weights(x).double() / 2**WEIGHT_BITS
    error = (weights / x.double().exp() - 1).abs()
    # float32's own softmax is no better: 2^-23 is one unit in its last place.
    assert float(error[x > -10].max()) < 2.0**-22
    assert int(token_weights(torch.tensor([0.0]))) == 1 << WEIGHT_BITS
    assert token_weights(torch.tensor([-32.0, -1000.0, -torch.inf])).tolist() == [0, 0, 0]


def test_weights_never_rise_with_distance():
    x = torch.linspace(0, -35, 1_000_001)
    weights = token_weights(x)
    ascending = weights[:-1] - weights[1:]
    # A rounded polynomial may step back by a few units in the last place where its range changes.
    assert int(ascending.min()) > -(1 << (WEIGHT_BITS - 22))

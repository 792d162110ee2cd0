"""The law of verification: emitted tokens follow the target's distribution, whatever the tree."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.ops.cases import depths_of, random_tree
from tests.ops.test_accept import outputs, sampling_of
from vispec.ops import accept
from vispec.ops.draw import WEIGHT_BITS, keep_weights, pick, token_weights


def kept(scores: torch.Tensor, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """Weights after the filters, for logits [rows, V]."""
    scaled = scores / torch.tensor(temperature)
    weights = token_weights(scaled - scaled.amax(-1, keepdim=True))
    return keep_weights(scaled, weights, torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p))


def warped(scores: torch.Tensor, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """What transformers' own warpers leave, in the order in which `generate` applies them."""
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(None, scores).softmax(-1)


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.55, "min_p": 0.11},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_filters_are_those_of_transformers(generator, settings):
    scores = torch.randn(300, 64, generator=generator) * 2
    weights = kept(scores, **settings)
    theirs = warped(scores, **settings)
    assert torch.equal(weights > 0, theirs > 0)
    ours = weights.double() / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.get("top_p", 1) == 1])
def test_ties_are_those_of_transformers(generator, settings):
    scores = torch.randint(-2, 3, (300, 37), generator=generator).float()
    assert torch.equal(kept(scores, **settings) > 0, warped(scores, **settings) > 0)


@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.55, 0.77, 0.93])
@pytest.mark.parametrize("top_k", [0, 11])
def test_top_p_ties_are_those_of_transformers(generator, top_p, top_k):
    """Of the tokens tied at the threshold as many stay as in transformers, and those with the
    higher indices.

    transformers leaves which of them open: torch.sort without `stable` may order ties any way; the
        higher indices
    stay where the sort is stable. It also sums in float32: rows in which float64 puts the threshold
    within 1e-5 of a partial sum are left out.
    """
    scores = torch.randint(-2, 3, (400, 37), generator=generator).float()
    filtered = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    ascending, order = filtered.sort(dim=-1, stable=True)
    sums = ascending.double().softmax(-1).cumsum(-1)
    clear = (sums - (1 - top_p)).abs().amin(-1) > 1e-5
    assert int(clear.sum()) > 200
    ours = kept(scores, top_k=top_k, top_p=top_p) > 0
    theirs = warped(scores, top_k=top_k, top_p=top_p) > 0
    for value in range(-2, 3):
        tied = scores == value
        assert torch.equal((ours & tied).sum(-1)[clear], (theirs & tied).sum(-1)[clear])
    stays = (sums > 1 - top_p) & (ascending > -torch.inf)
    stays[:, -1] = True
    assert torch.equal(ours[clear], torch.zeros_like(ours).scatter(-1, order, stays)[clear])


def test_grid_of_uniforms_gives_the_distribution(generator):
    """Every token gets the share of an even grid that its probability asks for."""
    points = 4096
    uniforms = (torch.arange(points).double() + 0.5) / points
    for settings in SETTINGS:
        weights = kept(torch.randn(8, 11, generator=generator) * 2, **settings)
        for row in weights:
            drawn = pick(row.expand(points, -1), uniforms[:, None])
            share = torch.bincount(drawn, minlength=11).double() / points
            wanted = row.double() / row.sum()
            assert float((share - wanted).abs().max()) <= 1.01 / points
            assert not bool((share[row == 0] > 0).any())


def test_impossible_tokens_are_never_drawn():
    one = 1 << WEIGHT_BITS
    edges = torch.tensor([[0.0], [0.5], [1 - 2.0**-48]], dtype=torch.float64)
    assert pick(torch.tensor([0, 0, one, 0]), edges).tolist() == [2, 2, 2]
    assert pick(torch.tensor([0, one, 0, one, 0]), edges).tolist() == [1, 3, 3]
    # The largest sum that fits: rounding it to a double must not push the target out of reach.
    largest = torch.full((1, (1 << 19) - 1), one)
    assert pick(largest, edges[2:]).item() == (1 << 19) - 2
    assert pick(torch.tensor([0, 1, 0]), edges).tolist() == [1, 1, 1]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 3}])
def test_law_of_paths(backend, generator, settings):
    """Chi-square over all outcomes of three steps, against the product of the target's
    conditionals.

    The target's next-token law depends on the previous token only; the trees differ from row to
    row. Where a walk stops early, plain draws at the following positions complete it, as later
    rounds would.
    """
    V, steps = 4, 3
    rounds, B = (2, 100) if backend.name == "emulated" else (4, 1000)
    table = torch.randn(V, V, generator=generator) * 1.2
    law = warped(table, **settings).double()
    expected, observed = {}, {}
    for word in itertools.product(range(V), repeat=steps):
        probability, previous = 1.0, 0
        for token in word:
            probability *= float(law[previous, token])
            previous = token
        expected[word] = probability
    for turn in range(rounds):
        T = 1 + 3 * turn
        tokens, parents = (part.repeat(B // 20, 1) for part in random_tree(20, T, V, generator))
        tokens[:, 0] = 0
        sampling = sampling_of(B, **settings, seed=turn * B + 1)
        emitted = run(backend, table[tokens], tokens, parents, torch.full((B,), 100), sampling)
        while any(len(row) < steps for row in emitted):
            last = torch.tensor([[row[-1]] for row in emitted])
            lengths = torch.tensor([100 + len(row) for row in emitted])
            more = run(backend, table[last], last, torch.full((B, 1), -1), lengths, sampling)
            emitted = [row + new for row, new in zip(emitted, more, strict=True)]
        for row in emitted:
            observed[tuple(row[:steps])] = observed.get(tuple(row[:steps]), 0) + 1
    total = rounds * B
    assert all(expected[word] > 0 for word in observed)
    cells = [(observed.get(word, 0), total * p) for word, p in expected.items() if p > 0]
    # The chi-square law needs a few expected counts in every cell: rare outcomes share one.
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    cells += [(sum(cell[0] for cell in rare), sum(cell[1] for cell in rare))] if rare else []
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    assert freedom > 5
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


def run(backend, logits, tokens, parents, lengths, sampling) -> list[list[int]]:
    B = tokens.shape[0]
    D = int(depths_of(parents).max()) + 1
    got = backend.run(
        accept,
        logits,
        tokens,
        parents,
        lengths,
        end_tokens=torch.zeros(0, dtype=torch.int64),
        remaining=torch.full((B,), 1000),
        sampling=sampling,
        **outputs(B, D),
    )
    return [row[: int(n)].tolist() for row, n in zip(got["emitted"], got["counts"], strict=True)]

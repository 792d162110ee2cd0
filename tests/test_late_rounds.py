"""Rounds whose state lives on the device alone, read one round late: the same tokens as rounds the host waits for."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import pytest
import torch

import vispec
from tests import tiny
from tests.replay import DeviceReplayDraft, ReplayDraft
from vispec.decode import graph
from vispec.decode.graph import LateEngine
from vispec.decode.kept import KeptRounds
from vispec.decode.replay import LateReader

OPTIONS = {"greedy": {}, "sampled": {"do_sample": True, "top_k": 20, "seed": 3}}


def ragged(family: tiny.Family, rows: int = 3) -> dict:
    pictures = family.name in tiny.VISION_FAMILIES
    prompts = [family.prompt(row % 2 if pictures else 0, seed=10 + row, text=5 + 3 * row) for row in range(rows)]
    return family.batch(prompts, "left")


def true_draft(family: tiny.Family, batch: dict, miss_every: int = 4, **options) -> DeviceReplayDraft:
    answers = vispec.fast_generate(family.model, None, batch, max_new_tokens=48, **options)
    return DeviceReplayDraft(answers[:, batch["input_ids"].shape[1] :], tiny.VOCABULARY, miss_every)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_late_rounds_give_the_same_tokens(name, option):
    family = tiny.build(name)
    batch, options = ragged(family), {"max_new_tokens": 40, **OPTIONS[option]}
    expected = vispec.fast_generate(family.model, None, batch, **options)
    own = vispec.ViSpecDraft.for_target(family.model)
    for draft in (None, own, true_draft(family, batch, **OPTIONS[option])):
        assert torch.equal(vispec.fast_generate(family.model, draft, batch, graphs=True, **options), expected)


def test_long_paths_are_accepted_in_late_rounds():
    family = tiny.build("llava")
    batch = ragged(family)
    result = vispec.fast_generate(
        family.model,
        true_draft(family, batch),
        batch,
        # The same tree every round: "auto" goes by times, which say nothing on a busy machine.
        tree=vispec.TreeConfig(),
        graphs=True,
        max_new_tokens=40,
        return_dict_in_generate=True,
    )
    assert result.stats.tau > 1.5
    assert result.stats.new_tokens == 3 * 40


def test_a_stopping_criterion_ends_a_row_though_its_next_round_runs():
    family = tiny.build("llama")
    batch = ragged(family)
    plain = vispec.fast_generate(family.model, None, batch, max_new_tokens=40)
    start = batch["input_ids"].shape[1]
    stop = int(plain[1, start + 6])

    def criterion(tokens, scores):
        return torch.tensor([int(tokens[0, -1]) == stop])

    options = {"max_new_tokens": 40, "stopping_criteria": [criterion]}
    expected = vispec.fast_generate(family.model, None, batch, **options)
    draft = true_draft(family, batch, miss_every=9)
    assert torch.equal(vispec.fast_generate(family.model, draft, batch, graphs=True, **options), expected)
    assert not torch.equal(expected[1], plain[1][: expected.shape[1]])


def test_the_cache_grows_under_late_rounds(monkeypatch):
    monkeypatch.setattr(graph, "TOKENS_AHEAD", 8)
    family = tiny.build("llava")
    batch = ragged(family)
    expected = vispec.fast_generate(family.model, None, batch, max_new_tokens=40)
    resets = []
    reset = KeptRounds.reset
    monkeypatch.setattr(KeptRounds, "reset", lambda self: (resets.append(1), reset(self))[1])
    draft = true_draft(family, batch)
    assert torch.equal(vispec.fast_generate(family.model, draft, batch, graphs=True, max_new_tokens=40), expected)
    assert len(resets) > 1  # first room, and grown


HOST_READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique")


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_late_round_reads_nothing_back_and_sends_nothing(name, sampled, monkeypatch):
    """What would hold up a GPU, or break a capture: values read by the host, tensors made from host values."""
    family = tiny.build(name)
    run = LateEngine._round

    def forbidden(what):
        def fail(*args, **kwargs):
            raise AssertionError(f"a round must not call {what}")

        return fail

    def guarded(self, shape):
        with ExitStack() as stack:
            for method in HOST_READS:
                stack.enter_context(mock.patch.object(torch.Tensor, method, forbidden(f"Tensor.{method}")))
            for function in ("tensor", "as_tensor", "from_numpy", "nonzero", "unique"):
                stack.enter_context(mock.patch.object(torch, function, forbidden(f"torch.{function}")))
            return run(self, shape)

    options = OPTIONS["sampled" if sampled else "greedy"]
    vispec.fast_generate(family.model, None, ragged(family), max_new_tokens=2)
    monkeypatch.setattr(LateEngine, "_round", guarded)
    for draft in (None, vispec.ViSpecDraft.for_target(family.model)):
        vispec.fast_generate(family.model, draft, ragged(family), graphs=True, max_new_tokens=12, **options)


def test_what_needs_the_host_in_every_round_is_refused_by_name():
    family = tiny.build("llama")
    inputs = family.prompt(0, seed=1)
    replay = ReplayDraft({tuple(inputs["input_ids"][0].tolist()): [1] * 4}, tiny.VOCABULARY, hit_rate=1.0)
    cases = [
        ({"repetition_penalty": 1.3}, None, "logits processors"),
        ({"on_round": print}, None, "on_round"),
        ({}, replay, "ReplayDraft"),
    ]
    for options, draft, named in cases:
        with pytest.raises(ValueError, match=named):
            vispec.fast_generate(family.model, draft, inputs, graphs=True, max_new_tokens=4, **options)


def test_results_come_one_round_late_and_in_order():
    reader = LateReader()
    seen = []
    for number in range(5):
        reader.push(torch.full((2, 3), number))
        seen.append(reader.due())
    assert seen[0] is None
    assert [due.rows[0][0] for due in seen[1:]] == [0, 1, 2, 3]

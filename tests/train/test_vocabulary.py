"""Drafts that propose only the tokens that their target's answers hold most."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

import vispec
from tests.tiny import VOCABULARY
from tests.train.test_fit import config_of, taus
from vispec.train import fit
from vispec.train.checkpoint import frequent_tokens
from vispec.train.data import read_dataset

SIZE = 40


def wanted_tokens(world, size: int) -> list[int]:
    """The vocabulary by plain counting: more often first, then the lower id; sorted by id."""
    counts = Counter(token for sample in read_dataset(world.answers)[0] for token in sample.answer)
    return sorted(sorted(range(VOCABULARY), key=lambda token: (-counts[token], token))[:size])


def test_ties_go_to_the_lower_ids():
    counts = torch.tensor([0, 5, 3, 5, 3, 3, 0, 9])
    assert frequent_tokens(counts, 4).tolist() == [1, 2, 3, 7]
    assert frequent_tokens(counts, 7).tolist() == [0, 1, 2, 3, 4, 5, 7]
    # A thousand equal counts: an unstable sort would show.
    assert frequent_tokens(torch.ones(1000, dtype=torch.int64), 300).tolist() == list(range(300))


def test_a_reduced_vocabulary_is_learned_and_kept(world, tmp_path):
    settings = {"epochs": 60, "max_steps": None, "batch_size": 10, "micro_batch_size": 10, "learning_rate": 3e-3}
    config = config_of(world, tmp_path / "out", head_size=SIZE, **settings)
    report = fit(world.model, world.processor, config)
    assert report.draft.head_tokens.tolist() == wanted_tokens(world, SIZE)
    assert report.losses[-1] < 0.7 * report.losses[0]
    draft = vispec.load_draft(tmp_path / "out", target=world.model)
    assert torch.equal(draft.head_tokens, report.draft.head_tokens)
    assert taus(world, draft) > 0.5
    counts = Counter(token for sample in read_dataset(world.answers)[0] for token in sample.answer)
    held = sum(counts[token] for token in wanted_tokens(world, SIZE)) / counts.total()
    saved = json.loads((tmp_path / "out" / "training.json").read_text())["vocabulary"]
    assert saved == {"tokens": SIZE, "share_of_answers": pytest.approx(held)} and 0.3 < held < 1
    # Some of the answers' tokens lie outside, and generation still writes them.
    inputs = world.family.prompt(1, seed=3)
    expected = world.model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(vispec.fast_generate(world.model, draft, inputs, max_new_tokens=24), expected)


def test_a_starting_drafts_own_vocabulary_is_kept(world, tmp_path):
    first = config_of(world, tmp_path / "one", stage=1, num_queries=0, max_steps=2)
    draft = fit(world.model, world.processor, first).draft
    draft.head_tokens = torch.arange(5, 5 + SIZE)
    draft.save_pretrained(tmp_path / "one")
    config = config_of(world, tmp_path / "two", draft=str(tmp_path / "one"), max_steps=2)
    second = fit(world.model, world.processor, config).draft
    assert second.head_tokens.tolist() == list(range(5, 5 + SIZE)) and second.imadpt is not None
    with pytest.raises(ValueError, match=rf"head_size must be {SIZE} as in .*one, got 20"):
        fit(world.model, world.processor, replace(config, out=str(tmp_path / "three"), head_size=20))


def test_bad_vocabularies(world, tmp_path):
    with pytest.raises(ValueError, match="head_size must be at least 16, got 15"):
        config_of(world, tmp_path / "a", head_size=15)
    with pytest.raises(ValueError, match=f"head_size must be at most {VOCABULARY}, got 1000"):
        fit(world.model, world.processor, config_of(world, tmp_path / "a", head_size=1000))
    with pytest.raises(ValueError, match="export must be false with a reduced vocabulary"):
        fit(world.model, world.processor, config_of(world, tmp_path / "a", head_size=SIZE, export=True))


def test_answers_that_changed_under_a_run(world, tmp_path):
    data = shutil.copytree(world.answers, tmp_path / "answers")
    config = config_of(world, tmp_path / "out", data=str(data), head_size=SIZE, max_steps=2, max_target_loss=99.0)
    fit(world.model, world.processor, config)
    shard = sorted(data.glob("shard-*.jsonl"))[0]
    lines = [json.loads(line) for line in shard.read_text().splitlines()]
    lines[0]["answer"] = [3] * 20 + list(range(VOCABULARY - SIZE, VOCABULARY)) * 5
    shard.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="data must be as it was when .* was written"):
        fit(world.model, world.processor, config, resume=True)

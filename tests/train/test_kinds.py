"""The drafts of comparisons and ablations, trained by the same command."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vispec
from tests.test_kinds import random_medusa
from tests.train.test_fit import config_of, log_of, taus
from tests.train.test_rows import ANSWERS, samples
from vispec.drafts import MedusaDraft
from vispec.targets import load_target
from vispec.train import fit
from vispec.train.checkpoint import balance
from vispec.train.data import read_dataset
from vispec.train.inputs import merge_inputs, sample_inputs
from vispec.train.rows import medusa_passes, read_target
from vispec.train.sources import ImageStore

KINDS = {
    "eagle": {"num_queries": 0},
    "text eagle": {"num_queries": 0, "picture_rows": False},
    "no global feature": {"global_feature": False},
    "five queries": {"num_queries": 5},
    "no self-rollout": {"mtp_steps": 0},
    "medusa": {"kind": "medusa", "head_size": 40, "cross_entropy_weight": 3.0, "distance_weight": 0.0},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_learns(world, tmp_path, name):
    settings = {"epochs": 40, "max_steps": None, "batch_size": 10, "micro_batch_size": 5, "learning_rate": 4e-3}
    config = config_of(world, tmp_path / "out", rollout="chains", feature_cache_gb=0.01, **settings, **KINDS[name])
    report = fit(world.model, world.processor, config)
    assert report.losses[-1] < 0.8 * report.losses[0]
    draft = vispec.load_draft(tmp_path / "out", target=world.model)
    assert type(draft) is type(report.draft)
    for key, value in KINDS[name].items():
        if hasattr(draft.config, key):
            assert getattr(draft.config, key) == value
    assert taus(world, draft) > 0.3
    # It goes on from itself, and from nothing of another shape.
    more = {**settings, **KINDS[name], "epochs": 1}
    again = config_of(world, tmp_path / "again", rollout="chains", draft=config.out, **more)
    assert fit(world.model, world.processor, again).losses[0] < report.losses[0]
    other = {"kind": "vispec" if name == "medusa" else "medusa"}
    with pytest.raises(ValueError, match="kind must be"):
        fit(world.model, world.processor, replace(again, out=str(tmp_path / "b"), head_size=None, **other))


@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl"))
def test_medusas_rows_are_what_a_generation_reads(name):
    """Head k at a row is head k of a session that has committed the answer as far as k rows before."""
    family, prompts, whole, supervised = samples(name)
    target, draft = load_target(family.model), random_medusa(family.model, heads=3)
    readings = read_target(target, merge_inputs(whole))
    said = medusa_passes(draft, readings, supervised, passes=3)
    for one, rows in zip(readings, supervised, strict=True):
        # As it comes out of the cache where a picture stands right before the answer.
        one.features[: rows.start] = float("nan")
    draft.requires_grad_(True)
    medusa_passes(draft, readings, supervised, passes=3).predicted.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in draft.parameters())
    place = 0
    for row, count in enumerate(ANSWERS):
        tokens = whole[row]["input_ids"][:, -count:]
        with torch.inference_mode():
            prompt = target.prefill(prompts[row])
            session = draft.start(target, prompt, tokens[:, 0])
            for root in range(count):
                for head in range(3):
                    if root + head < count:
                        assert said.counted[head, place + root + head]
                        expected = draft(session._last[0], head)
                        actual = said.predicted[head, place + root + head]
                        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
                    assert not said.counted[head, place : place + head].any()
                start = readings[row].length - count
                feature = readings[row].features[start + root]
                torch.testing.assert_close(said.wanted[place + root], feature)
                session.commit(feature[None, None], tokens[:, root, None], torch.tensor([1]), [1])
        place += count


def test_heads_resume_and_refuse_other_numbers(world, tmp_path):
    config = config_of(world, tmp_path / "one", kind="medusa", max_steps=2)
    report = fit(world.model, world.processor, config)
    assert isinstance(report.draft, MedusaDraft) and report.draft.config.num_heads == 4
    assert len(fit(world.model, world.processor, config, resume=True).losses) == 0
    assert [row["step"] for row in log_of(tmp_path / "one")] == ["1", "2"]
    again = config_of(world, tmp_path / "two", kind="medusa", mtp_steps=4, draft=config.out)
    with pytest.raises(ValueError, match="heads must be 4 as in .*, got 5"):
        fit(world.model, world.processor, again)
    with pytest.raises(ValueError, match="export must be false for heads"):
        config_of(world, tmp_path / "x", kind="medusa", export=True)
    with pytest.raises(ValueError, match="kind must be one of vispec, medusa, got 'hydra'"):
        config_of(world, tmp_path / "x", kind="hydra")
    with pytest.raises(ValueError, match="picture_rows must be true with an adaptor, got 2 queries"):
        config_of(world, tmp_path / "x", picture_rows=False)


def test_a_starting_draft_of_another_shape(world, tmp_path):
    config = config_of(world, tmp_path / "one", max_steps=1, num_queries=0, picture_rows=False)
    fit(world.model, world.processor, config)
    for changes, message in (
        ({"picture_rows": True}, "picture_rows must be False as in .*, got True"),
        ({"global_feature": False}, "global_feature must be True as in .*, got False"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(world.model, world.processor, replace(config, out=str(tmp_path / "b"), draft=config.out, **changes))
    # An adaptor may be added to what never saw a picture.
    both = replace(config, out=str(tmp_path / "c"), draft=config.out, num_queries=2, picture_rows=True)
    assert fit(world.model, world.processor, both).draft.config.num_queries == 2


def test_a_balanced_start(world, tmp_path):
    """Both inputs come in at half the features' size, and the run begins from there."""
    width = 64
    draft = vispec.ViSpecDraft.for_target(world.model)
    before = draft.layers[0].mlp.down_proj.weight.clone()
    balance(draft, feature_size=5.0, embedding_size=0.25, seed=3)
    rows = torch.randn(2, 500, width, generator=torch.Generator().manual_seed(0))
    embeddings, features = rows[0] * 0.25, rows[1] * 5.0
    with torch.no_grad():
        own = draft.combine(embeddings, 0 * features, 0 * features)
        kept = draft.combine(0 * embeddings, features, 0 * features)
    assert float(own.square().mean().sqrt()) == pytest.approx(2.5, rel=0.05)
    torch.testing.assert_close(kept, 0.5 * features)
    torch.testing.assert_close(draft.layers[0].mlp.down_proj.weight, 5 * before)
    config = config_of(world, tmp_path / "out", balanced=True, max_steps=1, learning_rate=1e-9)
    fc = fit(world.model, world.processor, config).draft.fc.weight
    torch.testing.assert_close(fc[:, width:], 0.5 * torch.eye(width))
    table = world.model.get_input_embeddings().weight.detach().square().mean().sqrt()
    samples, _ = read_dataset(world.answers)
    found = []
    for sample in samples[:4]:
        inputs = sample_inputs(world.processor, ImageStore(world.root), sample)
        (reading,) = read_target(load_target(world.model), inputs)
        found.append(reading.features[len(sample.prompt) :])
    size = torch.cat(found).square().mean().sqrt()
    assert float(fc[:, :width].square().mean().sqrt()) == pytest.approx(float(0.5 * size / table) / 8, rel=0.05)
    for more in ({"draft": "somewhere"}, {"kind": "medusa"}):
        with pytest.raises(ValueError, match="balanced must be false for heads and with a draft to start from"):
            config_of(world, tmp_path / "x", balanced=True, **more)

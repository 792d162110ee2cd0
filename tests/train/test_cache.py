"""The feature cache: the same numbers bit for bit, within its limit, and harmless when it is broken."""

from __future__ import annotations

import errno
import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests import tiny
from tests.train.conftest import make_model
from tests.train.test_fit import DEMO_LIKE, config_of, log_of
from vispec.targets import load_target
from vispec.train import FitConfig, fit
from vispec.train import feed as feed_module
from vispec.train.cache import FeatureCache, fingerprint
from vispec.train.data import read_dataset
from vispec.train.feed import Feed


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("queries", (0, 2))
def test_a_reading_comes_back_bit_for_bit(world, tmp_path, dtype, queries):
    model = make_model().model.to(dtype)
    target = load_target(model)
    config = FitConfig(str(world.answers), "unused", max_length=30)
    cache = FeatureCache(tmp_path / "cache", 10**7, target, inside_pictures=not queries, longest=30)
    plain, cached = Feed(target, world.processor, config), Feed(target, world.processor, config, cache)
    samples = plain.samples
    assert {len(sample.images) for sample in samples} == {0, 1, 2}
    for _ in range(2):
        for sample, one, other in zip(samples, plain.read(samples)[0], cached.read(samples)[0], strict=True):
            assert one.spans == other.spans and one.length == other.length <= 30
            assert torch.equal(one.embeddings, other.embeddings) and other.embeddings.dtype == dtype
            stored = cache.get(sample)
            known = torch.ones(one.length, dtype=torch.bool)
            for span in one.spans if queries else ():
                known[span.start : span.start + span.length - 1] = False
            assert torch.equal(one.features[known], stored.features[known]) and stored.features.dtype == dtype
            assert stored.features[~known].isnan().all() and stored.spans == one.spans
            assert torch.equal(stored.embeddings, one.embeddings)
    assert len(files(tmp_path / "cache")) == len(samples)


def test_the_second_epoch_asks_the_target_nothing(world, tmp_path, monkeypatch):
    asked = []
    read = feed_module.read_target
    monkeypatch.setattr(feed_module, "read_target", lambda *arguments: asked.append(1) or read(*arguments))
    config = config_of(world, tmp_path / "out", max_steps=None, epochs=3, feature_cache_gb=0.01)
    fit(world.model, world.processor, config)
    assert len(asked) == 10
    # A later run over the same target finds them.
    config = replace(config, out=str(tmp_path / "next"), feature_cache=str(tmp_path / "out" / "features"), mtp_steps=0)
    fit(world.model, world.processor, config)
    assert len(asked) == 10
    # A draft that reads inside pictures needs other files.
    fit(world.model, world.processor, replace(config, out=str(tmp_path / "eagle"), num_queries=0))
    assert len(asked) == 20


@pytest.mark.parametrize("more", ({}, DEMO_LIKE, {"num_queries": 0, "rollout": "chains"}))
def test_training_is_the_same_bit_for_bit(world, tmp_path, more):
    """Without a cache, with one, and with one that has room for some of the samples only."""
    more = {**more, "max_steps": 6, "micro_batch_size": 3}
    drafts = {}
    for name, size in (("none", 0.0), ("whole", 0.01), ("part", 0.00006)):
        config = config_of(world, tmp_path / name, **{**more, "feature_cache_gb": size})
        fit(world.model, world.processor, config)
        drafts[name] = (tmp_path / name / "model.safetensors").read_bytes()
        assert log_of(tmp_path / name) == log_of(tmp_path / "none")
    assert drafts["none"] == drafts["whole"] == drafts["part"]
    assert not (tmp_path / "none" / "features").exists()
    kept = files(tmp_path / "part" / "features")
    assert 0 < len(kept) < 10 == len(files(tmp_path / "whole" / "features")) and sum(kept.values()) <= 60_000


def test_what_decides_a_file(world, tmp_path):
    target = load_target(world.model)
    sample = read_dataset(world.answers)[0][0]

    def name(target=target, sample=sample, inside_pictures=False, longest=99):
        folder = tmp_path / "cache"
        return FeatureCache(folder, 1, target, inside_pictures=inside_pictures, longest=longest).path(sample)

    others = [
        name(target=load_target(make_model(seed=1).model)),
        name(target=load_target(make_model().model.bfloat16())),
        name(inside_pictures=True),
        name(longest=98),
        name(sample=replace(sample, answer=sample.answer[:-1])),
        name(sample=replace(sample, images=("other.png",))),
        name(sample=replace(sample, text=sample.text + " ")),
    ]
    assert len({name(), *others}) == 8 and name() == name(target=load_target(make_model().model))
    changed = tiny.build("llava")
    before = fingerprint(load_target(changed.model))
    with torch.no_grad():
        next(changed.model.parameters()).flatten()[0] += 1
    assert fingerprint(load_target(changed.model)) != before


def test_a_broken_file_is_written_again(world, tmp_path):
    target = load_target(world.model)
    cache = FeatureCache(tmp_path, 10**7, target, inside_pictures=False, longest=99)
    feed = Feed(target, world.processor, FitConfig(str(world.answers), "unused", max_length=99), cache)
    sample = feed.samples[0]
    (before,) = feed.read([sample])[0]
    path = cache.path(sample)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (after,) = feed.read([sample])[0]
    assert torch.equal(before.features, after.features) and path.read_bytes() == whole


def test_a_full_disk_ends_storing_and_nothing_else(world, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, data):
        if "features" in str(path):
            write(path, data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    text = io.StringIO()
    config = config_of(world, tmp_path / "full", feature_cache_gb=0.01)
    fit(world.model, world.processor, config, console=Console(file=text, width=300))
    assert text.getvalue().count("disk is full: no more features are kept in") == 1
    assert not files(tmp_path / "full" / "features")
    monkeypatch.undo()
    fit(world.model, world.processor, config_of(world, tmp_path / "plain"))
    assert log_of(tmp_path / "full") == log_of(tmp_path / "plain")


def test_processes_share_what_is_free(world, tmp_path):
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "old.safetensors").write_bytes(b"x" * 400)
    target = load_target(world.model)
    cache = FeatureCache(tmp_path, 1000, target, inside_pictures=False, longest=9, shares=3)
    assert cache.free_bytes == 200
    assert FeatureCache(tmp_path, 300, target, inside_pictures=False, longest=9).free_bytes == 0

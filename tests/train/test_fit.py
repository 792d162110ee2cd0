"""Training as a whole: it learns, it goes on where it stopped, several processes are one, and it refuses nonsense."""

from __future__ import annotations

import csv
import errno
import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import vispec
from tests import tiny
from tests.saved import make_processor, make_tokenizer
from tests.train.conftest import COLLECT, EXTENSION, NEW_TOKENS, make_model
from vispec.targets import load_target
from vispec.train import FitConfig, collect, evaluate, fit, open_source, read_config
from vispec.train.checkpoint import export_published, starting_draft
from vispec.train.data import MANIFEST, read_manifest
from vispec.train.feed import Feed
from vispec.train.losses import STAGES, LossWeights, summed_loss
from vispec.train.rows import supervised_rows, whole_passes

# What the demo's draft is trained with: every option that the published runs do not have.
DEMO_LIKE = {
    "head_size": 40,
    "rollout": "chains",
    "mtp_steps": 3,
    "mtp_warmup": 0.7,
    "cross_entropy_weight": 1.0,
    "distance_weight": 0.0,
    "ranking_weight": 0.0,
    "feature_weight": 0.1,
    "feature_cache_gb": 0.01,
}
# Columns that differ from run to run whatever is done.
CLOCK = ("seconds", "target_share")


def config_of(world, out: Path, **more) -> FitConfig:
    settings = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "max_steps": 6, "log_every": 1}
    return FitConfig(**{"data": str(world.answers), "out": str(out), **settings, **more})


def log_of(out: Path) -> list[dict[str, str]]:
    with open(out / "log.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in CLOCK} for row in csv.DictReader(file)]


def taus(world, draft) -> dict[str, float]:
    found = evaluate(
        world.model,
        world.processor,
        draft,
        open_source(world.requests),
        extension=EXTENSION,
        max_new_tokens=NEW_TOKENS,
        temperatures=(0.0,),
    )
    return found["temperatures"]["0"]["tau"]


def test_loss_falls_and_tau_rises(world, tmp_path):
    """Ten samples, some of text and some of two pictures, are learned by heart."""
    torch.manual_seed(0)
    before = taus(world, vispec.ViSpecDraft.for_target(world.model))
    settings = {"epochs": 90, "max_steps": None, "batch_size": 10, "micro_batch_size": 10, "learning_rate": 3e-3}
    weights = {name: value.clone() for name, value in world.model.state_dict().items()}
    report = fit(world.model, world.processor, config_of(world, tmp_path / "out", **settings))
    after = taus(world, vispec.load_draft(tmp_path / "out", target=world.model))
    assert before < 0.3 and after > 1.2, (before, after)
    assert report.losses[-1] < 0.65 * report.losses[0] and report.steps == len(report.losses) == 90
    for name, value in world.model.state_dict().items():
        assert torch.equal(value, weights[name]), f"the target's {name} has changed"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in world.model.parameters())


def test_stage_one_feeds_stage_two(world, tmp_path):
    """Text's loss falls without the picture weights; the second stage starts from there and trains them too."""
    first = config_of(world, tmp_path / "one", stage=1, epochs=30, max_steps=None, learning_rate=3e-3)
    report = fit(world.model, world.processor, first)
    assert report.losses[-1] < 0.7 * report.losses[0]
    one = load_file(tmp_path / "one" / "model.safetensors")
    width = world.model.config.text_config.hidden_size
    assert torch.equal(one["img_fc.weight"], torch.eye(width, 2 * width)), "stage 1 leaves [I | 0] as it is"
    second = fit(world.model, world.processor, config_of(world, tmp_path / "two", draft=str(tmp_path / "one")))
    fresh = fit(world.model, world.processor, config_of(world, tmp_path / "fresh"))
    assert second.losses[0] < fresh.losses[0]
    two = load_file(tmp_path / "two" / "model.safetensors")
    assert all(not torch.equal(two[name], one[name]) for name in ("img_fc.weight", "imadpt.q", "fc.weight"))


def test_a_text_only_target(tmp_path):
    """A causal language model and a draft without adaptor, which gets one when the second stage asks for it."""
    model, tokenizer = tiny.build("llama").model, make_tokenizer()
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"w{number} w4"}) + "\n" for number in range(10, 14)))
    collect(model, tokenizer, open_source(source), tmp_path / "answers", COLLECT)
    config = FitConfig(str(tmp_path / "answers"), str(tmp_path / "one"), stage=1, num_queries=0, learning_rate=3e-3)
    config = replace(config, batch_size=4, epochs=20)
    report = fit(model, tokenizer, config)
    assert report.losses[-1] < 0.8 * report.losses[0] and report.draft.imadpt is None
    config = replace(config, out=str(tmp_path / "two"), draft=config.out, stage=2, num_queries=2, max_steps=1)
    assert fit(model, tokenizer, config).draft.config.num_queries == 2


@pytest.mark.parametrize("more", ({}, DEMO_LIKE), ids=("published", "demo"))
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(world, tmp_path, monkeypatch, more):
    module = importlib.import_module("vispec.train.fit")
    config = config_of(world, tmp_path / "unbroken", checkpoint_every=2, max_steps=7, **more)
    unbroken = fit(world.model, world.processor, config)
    save = module.save_checkpoint

    def dying(out, number, *rest):
        if number == 6:
            raise KeyboardInterrupt
        return save(out, number, *rest)

    monkeypatch.setattr(module, "save_checkpoint", dying)
    config = replace(config, out=str(tmp_path / "broken"))
    with pytest.raises(KeyboardInterrupt):
        fit(world.model, world.processor, config)
    monkeypatch.undo()
    assert len(log_of(tmp_path / "broken")) == 6, "two steps behind the newest checkpoint were logged"
    torch.manual_seed(999)
    resumed = fit(world.model, world.processor, config, resume=True)
    assert resumed.losses == unbroken.losses[4:] and len(resumed.losses) == 3
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "unbroken")
    for name in ("model.safetensors", "checkpoints/step-00000007/model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    moments = [
        torch.load(tmp_path / out / "checkpoints/step-00000007/optimizer.pt")["state"] for out in ("broken", "unbroken")
    ]
    assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])
    rates = [float(row["learning_rate"]) for row in log_of(tmp_path / "unbroken")]
    # An epoch of warm-up is three steps of four samples; then it falls to nothing in four.
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    kept = sorted(path.name for path in (tmp_path / "unbroken" / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000007"]
    # A checkpoint is a draft like another; the last one is the result, before it was rounded to the target's dtype.
    drafts = [vispec.load_draft(tmp_path / "unbroken" / name, world.model) for name in ("", f"checkpoints/{kept[1]}")]
    states = [draft.state_dict() for draft in drafts]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_two_processes_give_the_loss_of_one(world, tmp_path):
    pytest.importorskip("accelerate")
    folder = tmp_path / "model"
    world.model.save_pretrained(folder)
    make_processor(chat=True).save_pretrained(folder)
    config = config_of(world, tmp_path / "two", batch_size=5, max_steps=4)
    (tmp_path / "config.json").write_text(json.dumps(config.as_dict()))
    # On a CPU `accelerate launch` starts one process whatever it is told; torch's own launcher starts two.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "vispec.train", "fit", "--model", str(folder), "--device", "cpu"]
    command += ["--config", str(tmp_path / "config.json")]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, "cwd": root}
    launched = subprocess.Popen(command, start_new_session=True, **settings)
    try:
        printed, errors = launched.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        # The launcher's own children, too.
        os.killpg(launched.pid, signal.SIGKILL)
        raise
    assert launched.returncode == 0, errors[-2000:]
    assert printed.count('"steps": 4') == 1, "one process reports"
    assert json.loads((tmp_path / "two" / "training.json").read_text())["processes"] == 2
    fit(world.model, world.processor, replace(config, out=str(tmp_path / "one")))
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 4
    for left, right in zip(one, two, strict=True):
        assert left["rows"] == right["rows"] and left["tokens"] == right["tokens"]
        assert left["cross_entropy"] == right["cross_entropy"] == "", "stage 2 computes none"
        for name in ("loss", "feature", "distance", "ranking", "gradient_norm"):
            assert float(left[name]) == pytest.approx(float(right[name]), rel=1e-4), name
    drafts = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, value in drafts[0].items():
        torch.testing.assert_close(value, drafts[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ("llava", "qwen2_5_vl"))
def test_the_published_layout_goes_out_and_comes_back(tmp_path, family):
    model = tiny.build(family).model
    draft = vispec.ViSpecDraft.for_target(model, num_queries=3)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter)
    target = load_target(model)
    export_published(draft, target, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["model_type"] == model.config.model_type and settings["architectures"] == [type(model).__name__]
    assert settings["num_hidden_layers"] == 1 and "num_queries" not in settings
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], model.get_input_embeddings().weight)
    back = vispec.load_draft(tmp_path, target=model)
    assert back.config == draft.config
    for name, value in draft.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_what_a_run_leaves_behind(world, tmp_path):
    out = tmp_path / "out"
    config = config_of(world, out, max_steps=3, export=True, num_queries=3)
    text = io.StringIO()
    fit(world.model, world.processor, config, console=Console(file=text, width=120))
    assert text.getvalue().count("loss") == 3
    assert read_config(out / "training.json", {}) == config
    saved = json.loads((out / "training.json").read_text())
    assert saved["steps"] == 3 and saved["dataset"]["samples"] == 10
    own, published = (vispec.load_draft(path, target=world.model) for path in (out, out / "published"))
    assert own.config == published.config and own.config.num_queries == 3
    live = io.StringIO()
    config = replace(config, out=str(tmp_path / "live"), max_steps=2)
    fit(world.model, world.processor, config, console=Console(file=live, force_terminal=True, width=200))
    assert "gradient norm" in live.getvalue()


def test_options_that_change_only_the_work(world, tmp_path):
    """Micro-batches, checkpointing and chunks change memory, not the loss; bf16 changes it a little."""
    plain = fit(world.model, world.processor, config_of(world, tmp_path / "plain", max_steps=2))
    for number, more in enumerate(
        ({"micro_batch_size": 4}, {"gradient_checkpointing": True}, {"loss_chunk": 3}, {"export": True})
    ):
        other = fit(world.model, world.processor, config_of(world, tmp_path / f"{number}", max_steps=2, **more))
        assert other.losses == pytest.approx(plain.losses, rel=1e-4), more
    for name, low, high in (("bf16", 1e-7, 0.02), ("noise", 1e-7, 0.1), ("mtp_steps", 0.3, 0.7)):
        more = {name: {"bf16": True, "noise": False, "mtp_steps": 0}[name]}
        other = fit(world.model, world.processor, config_of(world, tmp_path / name, max_steps=2, **more))
        assert low < abs(other.losses[0] - plain.losses[0]) / plain.losses[0] < high, name


def test_the_optimizer_is_the_published_one(world, tmp_path):
    seen = []

    def look(optimizer, *_):
        (group,) = optimizer.param_groups
        largest = max(float(parameter.grad.abs().max()) for parameter in group["params"])
        seen.append((type(optimizer), group["betas"], largest))

    handle = register_optimizer_step_pre_hook(look)
    try:
        fit(world.model, world.processor, config_of(world, tmp_path / "a", max_steps=1))
        fit(world.model, world.processor, config_of(world, tmp_path / "b", max_steps=1, clip_value=0.01))
    finally:
        handle.remove()
    assert [one[:2] for one in seen] == [(torch.optim.AdamW, (0.9, 0.95))] * 2
    assert seen[0][2] > 0.01 == pytest.approx(seen[1][2])


def test_a_step_follows_the_mean_over_all_supervised_rows(world, tmp_path):
    """The gradient of micro-batches, before AdamW sees it, against one batch and one backward pass."""
    config = config_of(world, tmp_path / "out", max_steps=1, batch_size=10, micro_batch_size=3, clip_value=1e-3)
    target = load_target(world.model)
    feed = Feed(target, world.processor, config)
    draft = starting_draft(config, target, feed.token_counts).requires_grad_(True)
    readings, samples, _ = feed.read(feed.chosen(1))
    rows = [supervised_rows(sample) for sample in samples]
    noises = feed.noises(samples, [one.length for one in readings], 1)
    said = whole_passes(draft, readings, rows, passes=2, noises=noises)
    wanted = said.wanted
    loss, _ = summed_loss(STAGES[2], said.predicted, wanted, target.head)
    (loss / len(wanted)).backward()
    gradients = [parameter.grad for parameter in draft.parameters()]
    seen = []

    def look(optimizer, *_):
        seen.extend(parameter.grad.clone() for parameter in optimizer.param_groups[0]["params"])

    handle = register_optimizer_step_pre_hook(look)
    try:
        report = fit(world.model, world.processor, config)
    finally:
        handle.remove()
    assert report.losses[0] == pytest.approx(float(loss.detach()) / len(wanted), rel=1e-5)
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    assert float(log_of(tmp_path / "out")[0]["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
    for actual, expected in zip(seen, gradients, strict=True):
        torch.testing.assert_close(actual, expected.clamp(-1e-3, 1e-3), rtol=1e-3, atol=1e-6)


def test_tensorboard_is_written_where_it_is_installed(world, tmp_path, monkeypatch):
    """The package itself is optional: a stand-in notes what would be drawn."""
    drawn = []

    class Writer:
        def __init__(self, folder, purge_step):
            drawn.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            drawn.append((name, value, step))

        def close(self):
            drawn.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    report = fit(world.model, world.processor, config_of(world, tmp_path / "out", max_steps=2))
    assert drawn[0] == (str(tmp_path / "out" / "tensorboard"), 1) and drawn[-1] == "closed"
    assert [entry for entry in drawn[1:-1] if entry[0] == "loss"] == [
        ("loss", report.losses[0], 1),
        ("loss", report.losses[1], 2),
    ]


def test_nothing_supervised(world, tmp_path):
    with pytest.raises(ValueError, match="nothing is supervised: none of 10 samples .*'nothing to supervise': 10"):
        fit(world.model, world.processor, config_of(world, tmp_path / "out", max_length=3))


def test_missing_pictures_are_skipped_and_listed(world, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in world.root.glob("*.png"):
        shutil.copy(path, images)
    (images / "0.png").unlink()
    (images / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    text = io.StringIO()
    config = config_of(world, tmp_path / "out", image_root=str(images), batch_size=10, max_steps=2)
    report = fit(world.model, world.processor, config, console=Console(file=text, width=200))
    assert report.skipped == {"image missing": 2, "image unreadable": 2}
    assert text.getvalue().count("skipped (image missing)") == 2 and "0.png" in text.getvalue()
    assert text.getvalue().count("skipped (image unreadable)") == 2
    assert [row["skipped"] for row in log_of(tmp_path / "out")] == ["2", "2"]


def test_a_step_without_a_usable_sample_is_an_error(world, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in world.root.glob("*.png"):
        (images / path.name).write_bytes(b"broken")
    config = config_of(world, tmp_path / "out", image_root=str(images), batch_size=1, max_steps=10)
    with pytest.raises(ValueError, match=r"step \d+ supervises nothing: all of its samples were skipped"):
        fit(world.model, world.processor, config)


def test_data_sets_are_taken_together(world, tmp_path):
    """Two halves of the answers, their pictures in two places, against the whole."""
    halves = []
    for number, rows in enumerate((range(0, 5), range(5, 10))):
        root = tmp_path / f"half{number}"
        root.mkdir()
        for path in world.root.glob("*.png"):
            shutil.copy(path, root)
        lines = world.requests.read_text().splitlines()
        (root / "rows.jsonl").write_text("".join(lines[row] + "\n" for row in rows))
        collect(world.model, world.processor, open_source(root / "rows.jsonl"), root / "answers", COLLECT)
        halves.append(str(root / "answers"))
    config = config_of(world, tmp_path / "halves", data=halves, feature_cache_gb=0.01)
    fit(world.model, world.processor, config)
    fit(world.model, world.processor, config_of(world, tmp_path / "whole"))
    assert log_of(tmp_path / "halves") == log_of(tmp_path / "whole")
    saved = json.loads((tmp_path / "halves" / "training.json").read_text())
    assert saved["dataset"]["samples"] == 10 and saved["config"]["data"] == halves
    assert len(fit(world.model, world.processor, config, resume=True).losses) == 0
    (tmp_path / "half1" / "7.png").unlink()
    report = fit(world.model, world.processor, replace(config, out=str(tmp_path / "gone"), feature_cache_gb=0.0))
    assert sum(report.skipped.values()) == report.skipped["image missing"] > 0


def test_another_target_is_noticed(world, tmp_path):
    other = make_model(seed=1)
    with pytest.raises(ValueError, match=r"loss on its own answers must be at most 2\.51 nats a token, got \d+\.\d+"):
        fit(other.model, world.processor, config_of(world, tmp_path / "a"))
    family = tiny.build("llama")
    with pytest.raises(ValueError, match="model must be the one that wrote the answers"):
        fit(family.model, world.processor, config_of(world, tmp_path / "b"))


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path, monkeypatch):
    module = importlib.import_module("vispec.train.fit")
    passes, calls = module.PASSES["whole"], []

    def spoiled(*arguments, **options):
        said = passes(*arguments, **options)
        calls.append(1)
        return replace(said, predicted=said.predicted * math.nan) if len(calls) == 3 else said

    monkeypatch.setitem(module.PASSES, "whole", spoiled)
    config = config_of(world, tmp_path / "out", micro_batch_size=4, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=r"got nan and nan in step 3 \(learning rate .*request"):
        fit(world.model, world.processor, config)
    newest = sorted((tmp_path / "out" / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000002"
    assert all(value.isfinite().all() for value in load_file(newest / "model.safetensors").values())


def test_folders_in_use_and_runs_of_other_settings(world, tmp_path):
    config = config_of(world, tmp_path / "out", max_steps=1)
    with pytest.raises(FileNotFoundError, match="a checkpoint to resume from"):
        fit(world.model, world.processor, config, resume=True)
    fit(world.model, world.processor, config)
    with pytest.raises(ValueError, match="out must be a new folder"):
        fit(world.model, world.processor, config)
    with pytest.raises(ValueError, match=r"learning_rate must be 0\.001 as in .*, got 0\.5"):
        fit(world.model, world.processor, replace(config, learning_rate=0.5), resume=True)
    with pytest.raises(ValueError, match="num_queries must be 2 as in"):
        fit(world.model, world.processor, config_of(world, tmp_path / "b", draft=config.out, num_queries=5))


def test_an_older_data_set(world, tmp_path):
    shutil.copytree(world.answers, tmp_path / "old")
    manifest = {**read_manifest(world.answers), "format_version": 0}
    (tmp_path / "old" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="format_version must be 1, got 0"):
        fit(world.model, world.processor, config_of(world, tmp_path / "out", data=str(tmp_path / "old")))


def test_a_full_disk_leaves_the_earlier_checkpoint(world, tmp_path, monkeypatch):
    module = importlib.import_module("vispec.drafts.files")
    save, calls = module.save_file, []

    def full(tensors, path, **more):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, **more)

    monkeypatch.setattr(module, "save_file", full)
    config = config_of(world, tmp_path / "out", checkpoint_every=1, max_steps=3)
    with pytest.raises(OSError, match=r"disk is full, .*step-00000002 was not written; earlier checkpoints are whole"):
        fit(world.model, world.processor, config)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001"]
    assert len(fit(world.model, world.processor, config, resume=True).losses) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 3}, "stage must be 1 or 2, got 3"),
        ({"epoch": 1}, "unknown setting epoch; known: data, out, stage"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": "x"}, "batch_size must be int, got 'x'"),
        ({"noise": 1}, "noise must be bool, got 1"),
        ({"epochs": True}, "epochs must be int, got True"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"data": []}, r"data must be one folder or several, got \[\]"),
        ({"data": 3}, "data must be one folder or several, got 3"),
        ({"rollout": "deep"}, "rollout must be one of whole, chains, got 'deep'"),
        ({"mtp_warmup": 1.5}, "mtp_warmup must be at most 1, got 1.5"),
        ({"feature_weight": -1.0}, "feature_weight must be at least 0, got -1.0"),
        ({"distance_weight": 0.0, "ranking_weight": 0.0}, "at least one loss weight must be above 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        read_config(None, {"data": "d", "out": "o", **settings})


def test_passes_rise_evenly_and_weights_replace_the_stages_own():
    config = FitConfig("d", "o", mtp_steps=3, mtp_warmup=0.75)
    assert [config.passes_of(number, 8) for number in range(1, 9)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [FitConfig("d", "o", mtp_steps=3).passes_of(number, 8) for number in (1, 8)] == [4, 4]
    assert FitConfig("d", "o", mtp_steps=0, mtp_warmup=1.0).passes_of(1, 8) == 1
    weights = FitConfig("d", "o", stage=1, ranking_weight=0.0, distance_weight=2.0).loss_weights
    assert weights == LossWeights(feature=1.0, cross_entropy=0.1, distance=2.0, ranking=0.0)


def test_config_files(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "config.yaml"
    path.write_text("data: answers\nout: somewhere\nlearning_rate: 3e-5\nepochs: 2\n")
    path.write_text(path.read_text().replace("data: answers", "data: [answers]"))
    found = read_config(path, {"out": "elsewhere"})
    assert found == FitConfig(data="answers", out="elsewhere", learning_rate=3e-5, epochs=2)
    assert (FitConfig("d", "o").peak_learning_rate, FitConfig("d", "o").passes) == (3e-6, 2)
    assert (FitConfig("d", "o", stage=1).peak_learning_rate, FitConfig("d", "o", stage=1).passes) == (3e-5, 1)
    path.write_text("- a\n")
    with pytest.raises(ValueError, match="names and values, got list"):
        read_config(path, {})
    path.write_text("a: [\n")
    with pytest.raises(ValueError, match="must be YAML"):
        read_config(path, {})
    with pytest.raises(ValueError, match="data and out must be given"):
        read_config(None, {})


def test_the_collected_settings_are_in_the_manifest(world):
    settings = read_manifest(world.answers)["settings"]
    assert settings["extension"] == EXTENSION and settings["max_new_tokens"] == COLLECT.max_new_tokens
    assert settings["target"]["architecture"] == "LlavaForConditionalGeneration"

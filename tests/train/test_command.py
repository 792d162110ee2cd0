"""`vispec train` from pictures on disk to a measured draft, and its errors as one line."""

from __future__ import annotations

import argparse
import json

import pytest

from tests.saved import make_processor
from vispec.train.__main__ import main
from vispec.train.command import add_commands


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    world.model.save_pretrained(root / "model")
    make_processor(chat=True).save_pretrained(root / "model")
    pictures = root / "pictures"
    pictures.mkdir()
    for index in range(4):
        (pictures / f"{index}.png").write_bytes((world.root / f"{index}.png").read_bytes())
    (pictures / "broken.png").write_bytes(b"no picture")
    return root


def test_from_a_folder_of_pictures_to_figures(folder, capsys):
    model = ["--model", str(folder / "model"), "--device", "cpu"]
    source = ["--source", str(folder / "pictures"), "--extension", "w7"]
    answers, draft, figures = (str(folder / name) for name in ("answers", "draft", "figures.json"))
    assert main(["collect", *model, *source, "--out", answers, "--max-new-tokens", "12"]) == 0
    captured = capsys.readouterr()
    totals = json.loads(captured.out)
    assert totals["samples"] == 4 and totals["skipped"] == {"image unreadable": 1}
    assert "skipped (image unreadable): broken.png" in captured.err
    fit = ["fit", *model, "--data", answers, "--out", draft, "--batch-size", "4", "--no-noise"]
    assert main([*fit, "--max-steps", "3", "--learning-rate", "1e-3"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    saved = json.loads((folder / "draft" / "training.json").read_text())["config"]
    assert saved["noise"] is False and saved["learning_rate"] == 1e-3
    assert (
        main(["eval", *model, *source, "--draft", draft, "--out", figures, "--max-new-tokens", "8", "--limit", "2"])
        == 0
    )
    found = json.loads((folder / "figures.json").read_text())
    assert found["prompts"] == 2 - len(found["skipped"]) and set(found["temperatures"]) == {"0", "1"}


def test_errors_are_one_line(folder, capsys):
    model = ["--model", str(folder / "model"), "--device", "cpu", "--quiet"]
    for command, message in (
        (["collect", *model, "--source", str(folder / "absent"), "--out", "x"], "source must be a JSONL file"),
        (["fit", *model, "--out", "x"], "data must be given"),
        (["fit", *model, "--data", str(folder), "--out", "x"], "must hold dataset.json"),
        (["fit", *model, "--config", str(folder / "absent.json")], "absent.json"),
    ):
        assert main(command) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1, captured.err
    with pytest.raises(FileNotFoundError):
        main(["fit", *model, "--data", str(folder), "--out", "x", "--traceback"])


def test_the_commands_hang_under_train():
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    for name, more in (
        ("collect", ["--source", "s", "--out", "o"]),
        ("fit", []),
        ("eval", ["--source", "s", "--draft", "d"]),
    ):
        found = parser.parse_args(["train", name, "--model", "m", *more])
        assert callable(found.run) and found.traceback is False

"""The example's settings and commands are ones that `vispec train` takes."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vispec.train import open_source, read_config
from vispec.train.command import add_commands

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "smollava"


def commands() -> list[list[str]]:
    """The `vispec train` commands of the example's script."""
    text = (EXAMPLE / "make.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    asked = next(line for line in text.splitlines() if line.startswith("asked=")).removeprefix("asked=").strip('"')
    lines = [line.replace("$asked", asked).replace("$resume", "--resume") for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("vispec train ")]


def test_the_commands_parse():
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    found = [parser.parse_args(command) for command in commands()]
    assert [one.train_command for one in found] == ["collect", "collect", "fit", "eval"]
    assert found[0].temperatures == [0, 1] and found[1].read and found[2].data == ["$out/answers", "$out/read"]
    assert subprocess.run(["sh", "-n", str(EXAMPLE / "make.sh")], check=False).returncode == 0


def test_the_config_is_a_config():
    pytest.importorskip("yaml")
    config = read_config(EXAMPLE / "draft.yaml", {"data": ["a", "b"], "out": "o"})
    assert config.passes == 4 and config.loss_weights.cross_entropy == 1.0 and config.head_size == 8192


def test_requests_are_written_as_the_commands_read_them(tmp_path, monkeypatch):
    """Drawn scenes alone, which need no pictures on disk."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("write_requests", "conversations", "pictures", "scenes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import write_requests

    monkeypatch.setattr(write_requests, "SETS", ())
    pictures = write_requests.Pictures(tmp_path, tmp_path, aside=False)
    assert min(pictures.by_kind["scenes"]) == 100 and not set(pictures.by_kind["scenes"]) & set(range(100))
    name, text = pictures.write("scenes", 100)
    chance = random.Random(0)
    row = {"id": name, "kind": "scenes", "image": name, "prompt": write_requests.question(chance), "answer": text}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    request = open_source(tmp_path / "rows.jsonl", image_root=tmp_path / "pictures")[0]
    assert request.answer == text and (tmp_path / "pictures" / request.images[0]).is_file()


@pytest.mark.parametrize(
    ("credit", "shown"),
    [
        ("Credit: “Camp” by A. Person/flickr, CC BY 2.0", True),
        ("Credit: modification of work by B, Public Domain", True),
        ("Credit: C/Wikimedia Commons, CC BY-SA 4.0", False),
        ("Credit: D/flickr, CC BY-NC-ND 2.0", False),
        ("Credit: E. All rights reserved", False),
        ("", False),
        (None, False),
    ],
)
def test_a_page_shows_only_pictures_that_ask_for_nothing_but_their_credit(monkeypatch, credit, shown):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("sample_answers", "pictures", "scenes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import sample_answers

    assert sample_answers.free(credit) is shown

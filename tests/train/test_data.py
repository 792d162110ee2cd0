"""The data set on disk: whole after every kill, read back as written, and clear about what it cannot read."""

from __future__ import annotations

import errno
import json
import os

import pytest

from vispec.train import data
from vispec.train.data import (
    DatasetWriter,
    Sample,
    Skip,
    dataset_totals,
    pack_runs,
    read_dataset,
    read_manifest,
    unpack_runs,
)

SETTINGS = {"extension": "more", "seed": 0}


def sample(index: int, ended: bool = True) -> Sample:
    # A line separator of Unicode inside the text must not end a line of JSON.
    prompt = (1, *[150] * 9, 7, 7, index)
    return Sample(index, f"s{index}", ("a.png",), "a\u2028b\n", prompt, (4, 5, 2), ended, "photo")


def write_all(folder, kill=None) -> None:
    """Ten requests in shards of four, going on from wherever the folder stands."""
    writer = DatasetWriter(folder, SETTINGS)
    while writer.next_index < 10:
        first = writer.next_index
        stop = min(first + 4, 10)
        kept = [sample(index, index % 2 == 0) for index in range(first, stop) if index != 5]
        skips = [Skip(5, "s5", "image missing", "x.png")] if first <= 5 < stop else []
        writer.append(kept, skips, stop)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read(tmp_path):
    write_all(tmp_path)
    samples, skips = read_dataset(tmp_path)
    assert samples == [sample(index, index % 2 == 0) for index in range(10) if index != 5]
    assert skips == [Skip(5, "s5", "image missing", "x.png")]
    totals = dataset_totals(read_manifest(tmp_path))
    assert totals == {"samples": 9, "answer_tokens": 27, "cut_answers": 4, "skipped": {"image missing": 1}}


@pytest.mark.parametrize("call", range(8))
def test_a_run_killed_at_any_write_goes_on_without_loss_or_duplicates(tmp_path, monkeypatch, call):
    """Four manifests and three shards are renamed into place; the run dies before one of the renamings."""
    write_all(tmp_path / "unbroken")
    calls, replace = [], os.replace

    def dying(source, target):
        calls.append(target)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(data.os, "replace", dying)
    if call < 7:
        with pytest.raises(KeyboardInterrupt):
            write_all(tmp_path / "killed")
    write_all(tmp_path / "killed")
    assert len(calls) > 7 or call == 7
    left = contents(tmp_path / "killed")
    left = {name: text for name, text in left.items() if not name.endswith(".part")}
    assert left == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("tokens", ([], [1], [5] * 4, [5] * 5, [1, 2, 2, 3, *[9] * 700, 3, *[9] * 6]))
def test_runs_are_packed_and_unpacked(tokens):
    packed = pack_runs(tokens)
    assert unpack_runs(packed) == tuple(tokens)
    assert len(packed) <= min(len(tokens), 12)


def test_other_settings_need_another_folder(tmp_path):
    write_all(tmp_path)
    with pytest.raises(ValueError, match=r"extension must be 'more' as in .*, got 'less': choose another folder"):
        DatasetWriter(tmp_path, {**SETTINGS, "extension": "less"})


@pytest.mark.parametrize("version", (0, 2, None))
def test_another_format_version_is_a_clear_error(tmp_path, version):
    write_all(tmp_path)
    manifest = {**read_manifest(tmp_path), "format_version": version}
    (tmp_path / data.MANIFEST).write_text(json.dumps(manifest))
    for call in (lambda: read_dataset(tmp_path), lambda: DatasetWriter(tmp_path, SETTINGS)):
        with pytest.raises(ValueError, match=f"format_version must be 1, got {version!r} in .*: collect it again"):
            call()


def test_broken_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold dataset\.json"):
        read_dataset(tmp_path)
    write_all(tmp_path)
    shard = tmp_path / "shard-00001.jsonl"
    text = shard.read_text()
    shard.write_text(text[:-30])
    with pytest.raises(ValueError, match=r"shard-00001\.jsonl"):
        read_dataset(tmp_path)
    shard.write_text(text.replace('"prompt"', '"prompts"'))
    with pytest.raises(ValueError, match="line 1 must be a sample or a skip"):
        read_dataset(tmp_path)
    shard.write_text(text[: text.index("\n") + 1])
    with pytest.raises(ValueError, match="must hold 4 lines, got 1"):
        read_dataset(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold shard-00001\.jsonl"):
        read_dataset(tmp_path)
    (tmp_path / data.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        read_manifest(tmp_path)


def test_a_full_disk_says_so_and_leaves_what_was_whole(tmp_path, monkeypatch):
    writer = DatasetWriter(tmp_path, SETTINGS)
    writer.append([sample(0)], [], 1)
    before = contents(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data.os, "fsync", full)
    with pytest.raises(OSError, match=r"disk is full, .*shard-00001\.jsonl was not written.*same command again"):
        writer.append([sample(1)], [], 2)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    writer.append([sample(1)], [], 2)
    assert [one.index for one in read_dataset(tmp_path)[0]] == [0, 1]


def test_a_shard_holds_each_request_once(tmp_path):
    writer = DatasetWriter(tmp_path, SETTINGS)
    for samples, stop in (([sample(1)], 2), ([sample(0), sample(0)], 1), ([sample(0)], 2)):
        with pytest.raises(ValueError, match="once each"):
            writer.append(samples, [], stop)
    assert writer.next_index == 0

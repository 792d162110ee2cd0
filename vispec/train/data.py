"""The data set that drafts are trained on: token ids and picture references in shards, never features.

A folder holds `dataset.json`, the manifest, and `shard-00000.jsonl` and so on, one JSON object a line. A shard is
written under another name, flushed to disk and renamed; then the manifest that lists it is, in the same way. The
manifest is the only truth: what it does not list was never written, so a killed run goes on without loss or
duplicates. docs/training.md describes every field.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
# A run of equal tokens longer than this is stored as [token, count]: pictures are hundreds of placeholders.
LONGEST_PLAIN_RUN = 4


@dataclass(frozen=True)
class Sample:
    """One answer of the target.

    Attributes:
        index: place of its request in the source.
        name, kind: the source's own words for it.
        images: picture references, in order.
        text: the prompt as it went into the processor, chat template applied.
        prompt: token ids as they came out, placeholders expanded.
        answer: token ids that the target wrote, the end token included where it came.
        ended: whether it ended by itself; False: cut at the limit.
    """

    index: int
    name: str
    images: tuple[str, ...]
    text: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    ended: bool
    kind: str | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Skip:
    """A request that brought no sample, and why."""

    index: int
    name: str
    skipped: str
    detail: str


def pack_runs(tokens: Sequence[int]) -> list[int | list[int]]:
    """Token ids with each long run of one token as [token, count]."""
    packed: list[int | list[int]] = []
    start = 0
    for place in range(1, len(tokens) + 1):
        if place == len(tokens) or tokens[place] != tokens[start]:
            count = place - start
            packed += [[tokens[start], count]] if count > LONGEST_PLAIN_RUN else tokens[start:place]
            start = place
    return packed


def unpack_runs(packed: Sequence[int | list[int]]) -> tuple[int, ...]:
    """Undoes `pack_runs`."""
    tokens: list[int] = []
    for entry in packed:
        tokens += [entry[0]] * entry[1] if isinstance(entry, list) else [entry]
    return tuple(tokens)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that either the old or the whole new one is there, also after a power cut.

    Raises: OSError; a full disk with what to do about it.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"dataset: disk is full, {path} was not written; what came before is whole: free space and run"
            raise OSError(error.errno, f"{message} the same command again") from error
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads and checks a data set's manifest.

    Raises: FileNotFoundError; ValueError for broken JSON and for another format version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"dataset: {folder} must hold {MANIFEST}: not a data set of `vispec train collect`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"dataset: {path} must be JSON: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"dataset: format_version must be {FORMAT_VERSION}, got {version!r} in {path}: "
            "collect it again, or use the version of vispec that wrote it"
        )
    return manifest


class DatasetWriter:
    """Adds shards to a data set, a new one or one that an earlier run left unfinished.

    Args:
        folder: made where it does not exist.
        settings: what decides the answers; it must be the same in every run.

    Raises: ValueError where the folder's data set was collected with other settings.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST).is_file():
            self.manifest = {"format_version": FORMAT_VERSION, "settings": settings, "next_index": 0, "shards": []}
            self._write_manifest()
            return
        self.manifest = read_manifest(self.folder)
        known = self.manifest["settings"]
        for name in sorted(set(known) | set(settings)):
            if known.get(name) != settings.get(name):
                raise ValueError(
                    f"dataset: {name} must be {known.get(name)!r} as in {self.folder}, got {settings.get(name)!r}: "
                    "choose another folder"
                )

    @property
    def next_index(self) -> int:
        """The first request of the source that has not been dealt with."""
        return self.manifest["next_index"]

    def append(self, samples: Sequence[Sample], skips: Sequence[Skip], next_index: int) -> None:
        """Adds one shard: everything of the requests [self.next_index, next_index).

        Raises: ValueError where an index lies elsewhere or comes twice; OSError.
        """
        entries = sorted([*samples, *skips], key=lambda entry: entry.index)
        if [entry.index for entry in entries] != list(range(self.next_index, next_index)):
            raise ValueError(f"dataset: a shard must hold requests {self.next_index} to {next_index - 1} once each")
        lines = []
        for entry in entries:
            values = asdict(entry)
            if isinstance(entry, Sample):
                values["prompt"] = pack_runs(entry.prompt)
            lines.append(json.dumps(values, ensure_ascii=False) + "\n")
        name = f"shard-{len(self.manifest['shards']):05d}.jsonl"
        write_atomically(self.folder / name, "".join(lines))
        summary = {
            "name": name,
            "first_index": self.next_index,
            "next_index": next_index,
            "samples": len(samples),
            "answer_tokens": sum(len(sample.answer) for sample in samples),
            "cut_answers": sum(not sample.ended for sample in samples),
            "skipped": dict(Counter(skip.skipped for skip in skips)),
        }
        self.manifest = {
            **self.manifest,
            "next_index": next_index,
            "shards": [*self.manifest["shards"], summary],
        }
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_atomically(self.folder / MANIFEST, json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n")


def dataset_totals(*manifests: dict[str, Any]) -> dict[str, Any]:
    """Sums over the shards of manifests: samples, answer_tokens, cut_answers, and skips by reason."""
    shards = [shard for manifest in manifests for shard in manifest["shards"]]
    skipped: Counter[str] = Counter()
    for shard in shards:
        skipped.update(shard["skipped"])
    totals = {name: sum(shard[name] for shard in shards) for name in ("samples", "answer_tokens", "cut_answers")}
    return {**totals, "skipped": dict(skipped)}


def read_dataset(folder: str | Path) -> tuple[list[Sample], list[Skip]]:
    """Reads every listed shard.

    Raises: FileNotFoundError for a listed shard that is gone; ValueError for one that is not whole.
    """
    folder = Path(folder)
    samples: list[Sample] = []
    skips: list[Skip] = []
    for shard in read_manifest(folder)["shards"]:
        path = folder / shard["name"]
        if not path.is_file():
            raise FileNotFoundError(f"dataset: {folder} must hold {shard['name']}, which {MANIFEST} lists")
        before = len(samples) + len(skips)
        # Not splitlines: an answer's text may hold the other line separators of Unicode.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                values = json.loads(line)
                if "skipped" in values:
                    skips.append(Skip(**values))
                    continue
                values["prompt"] = unpack_runs(values["prompt"])
                values["answer"], values["images"] = tuple(values["answer"]), tuple(values["images"])
                samples.append(Sample(**values))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"dataset: {path} line {number} must be a sample or a skip: {error}") from error
        lines, listed = len(samples) + len(skips) - before, shard["next_index"] - shard["first_index"]
        if lines != listed:
            raise ValueError(f"dataset: {path} must hold {listed} lines, got {lines}")
    return samples, skips

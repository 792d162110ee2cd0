"""Reads the folder of pictures: NAME.bin beside NAME.jsonl.gz, and sets rows aside."""

import gzip
import hashlib
import io
import json
from pathlib import Path

from PIL import Image

HELD_OUT = {"openstax": 500, "caltech101": 200}


def read_rows(data: str | Path, name: str) -> list[dict]:
    """Read the rows of one set, in file order."""
    with gzip.open(Path(data) / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_pictures(data: str | Path, name: str, rows: list[dict]) -> list[Image.Image]:
    """Decode the pictures of `rows`."""
    with open(Path(data) / f"{name}.bin", "rb") as file:
        return [Image.open(io.BytesIO(encoded(file, row))).convert("RGB") for row in rows]


def encoded(file: io.BufferedReader, row: dict) -> bytes:
    """Read one row's encoded picture."""
    file.seek(row["off"])
    return file.read(row["len"])


def held_out(rows: list[dict], name: str) -> set[str]:
    """Choose the files that are never trained on: those with the smallest hash."""
    files = sorted({row["file"] for row in rows}, key=lambda f: hashlib.sha256(f.encode()).digest())
    return set(files[: HELD_OUT[name]])

"""Pictures and prompts to be answered: a JSONL file, a folder of pictures, or a data set of the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

PLACEHOLDER = "<image>"
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HUB = "hf://"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# What a folder of pictures is asked, in turn.
PICTURE_PROMPTS = (
    "Describe this picture in detail.",
    "What can be seen in this picture? Go through it part by part.",
    "Explain what this picture shows and how you can tell.",
    "Write about this picture: its subject, its surroundings, its colours and its mood.",
)


class UnusableSample(Exception):
    """A sample that cannot be used; `reason` is one of a few fixed phrases, so that skips can be counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Request:
    """What the target is to answer.

    Attributes:
        name: the source's own name of it, for people.
        images: references, in the order of their placeholders.
        messages: the conversation up to the last user turn; `content` is a list of ``{"type": "image"}`` and
            ``{"type": "text", "text": ...}``.
        kind: the source's own word for the kind of picture, where it has one.
        answer: the source's own answer, where it has one.
    """

    name: str
    images: tuple[str, ...]
    messages: tuple[dict[str, Any], ...]
    kind: str | None = None
    answer: str | None = None


class Source:
    """Requests by index, in an order that never changes; raises UnusableSample for those that are none."""

    def __init__(self, description: str, rows: Sequence[Any], image_root: Path) -> None:
        self.description = description
        self.image_root = image_root
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Request:
        row = self._rows[index]
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except ValueError as error:
                raise UnusableSample("not JSON", str(error)) from error
        return parse_request(row, f"row {index}")


def open_source(name: str | Path, *, image_root: str | Path | None = None, split: str = "train") -> Source:
    """Opens a JSONL file, a folder of pictures, or a data set of the hub (owner/name, needs `datasets`).

    Picture paths in a JSONL file are relative to `image_root` (default: the file's own folder).
    Raises: FileNotFoundError, ImportError where `datasets` is needed, ValueError for an empty source.
    """
    path = Path(name)
    root = None if image_root is None else Path(image_root)
    if path.is_dir():
        source = Source(f"folder {path.name}", _folder_rows(path), path.resolve())
    elif path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        source = Source(f"file {path.name}", lines, (root or path.parent).resolve())
    elif not path.is_absolute() and str(name).count("/") == 1 and not path.suffix:
        source = Source(f"hub {name} {split}", _HubRows(str(name), split), Path())
    else:
        raise FileNotFoundError(f"open_source: source must be a JSONL file, a folder or a hub id, got {name}")
    if not len(source):
        raise ValueError(f"open_source: source must hold at least one request, got none in {name}")
    return source


def parse_request(row: Any, name: str) -> Request:
    """Reads one row: `image` or `images`, and `prompt`, `question`, `messages` or LLaVA's `conversations`.

    Its own answer is `answer`, or the turns behind the last user turn.

    A first user turn without `<image>` gets its pictures in front of its text.
    Raises: UnusableSample.
    """
    if not isinstance(row, dict):
        raise UnusableSample("not an object", f"{name} is {type(row).__name__}")
    images = row.get("images", row.get("image")) or []
    images = [images] if isinstance(images, str) else list(images)
    if not all(isinstance(image, str) for image in images):
        raise UnusableSample("image reference", f"{name}: images must be paths, got {images!r}")
    turns = row.get("messages") or row.get("conversations")
    if not turns:
        text = row.get("prompt") or row.get("question")
        if not isinstance(text, str) or not text.strip():
            raise UnusableSample("no prompt", f"{name} has none of prompt, question, messages, conversations")
        turns = [{"role": "user", "content": text}]
    messages = [_message(turn, name) for turn in turns]
    behind: list[dict[str, Any]] = []
    while messages and messages[-1]["role"] != "user":
        behind.insert(0, messages.pop())
    spoken = [part["text"] for message in behind for part in message["content"] if part["type"] == "text"]
    answer = row.get("answer") or " ".join(spoken)
    if not messages:
        raise UnusableSample("no prompt", f"{name} has no user turn")
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if not places and images:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"}] * len(images) + first["content"]
    elif places != len(images):
        raise UnusableSample("placeholders", f"{name} has {places} {PLACEHOLDER} for {len(images)} pictures")
    kind = row.get("kind")
    kind = None if kind is None else str(kind)
    return Request(str(row.get("id", name)), tuple(images), tuple(messages), kind, str(answer) if answer else None)


def _message(turn: Any, name: str) -> dict[str, Any]:
    role = ROLES.get(turn.get("role", turn.get("from")) if isinstance(turn, dict) else None)
    if role is None:
        raise UnusableSample("role", f"{name}: a turn's role must be one of {sorted(ROLES)}, got {turn!r}")
    content = turn.get("content", turn.get("value", ""))
    if isinstance(content, str):
        pieces = content.split(PLACEHOLDER)
        parts: list[dict[str, str]] = []
        for index, piece in enumerate(pieces):
            parts += [{"type": "image"}] * (index > 0)
            parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        return {"role": role, "content": parts}
    parts = []
    for part in content:
        if part.get("type") not in ("image", "text"):
            raise UnusableSample("content", f"{name}: a part's type must be image or text, got {part.get('type')!r}")
        parts.append({"type": "image"} if part["type"] == "image" else {"type": "text", "text": str(part["text"])})
    return {"role": role, "content": parts}


def _folder_rows(folder: Path) -> list[dict[str, str]]:
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_ENDINGS and path.is_file()
    )
    return [
        {"id": name, "image": name, "prompt": PICTURE_PROMPTS[index % len(PICTURE_PROMPTS)]}
        for index, name in enumerate(names)
    ]


@lru_cache(maxsize=4)
def _hub_dataset(name: str, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("open_source: a hub data set needs the package datasets: pip install datasets") from error
    return load_dataset(name, split=split)


class _HubRows(Sequence):
    """Rows of a hub data set; its pictures become references that `ImageStore` resolves."""

    def __init__(self, name: str, split: str) -> None:
        self.name, self.split = name, split
        self._data = _hub_dataset(name, split)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self._data[index])
        count = len(_row_pictures(row))
        row.pop("image", None)
        row["images"] = [f"{HUB}{self.name}#{self.split}/{index}/{picture}" for picture in range(count)]
        return row


def _row_pictures(row: dict[str, Any]) -> list[Any]:
    pictures = row.get("images", row.get("image"))
    if pictures is None:
        return []
    return list(pictures) if isinstance(pictures, list | tuple) else [pictures]


class ImageStore:
    """Opens references: paths relative to a root, and rows of hub data sets."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def missing(self, reference: str) -> bool:
        """Whether a picture on disk is not there; cheap, nothing is read."""
        return not reference.startswith(HUB) and not (self.root / reference).is_file()

    def open(self, reference: str) -> Image.Image:
        """Reads one picture as RGB. Raises: UnusableSample where it is missing or unreadable."""
        if self.missing(reference):
            raise UnusableSample("image missing", str(self.root / reference))
        try:
            if not reference.startswith(HUB):
                with Image.open(self.root / reference) as picture:
                    return picture.convert("RGB")
            name, _, place = reference.removeprefix(HUB).partition("#")
            split, row, picture_index = place.rsplit("/", 2)
            return _row_pictures(dict(_hub_dataset(name, split)[int(row)]))[int(picture_index)].convert("RGB")
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UnusableSample("image unreadable", f"{reference}: {error}") from error

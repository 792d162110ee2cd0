"""Requests from files, folders and the hub, and rows that are none."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from vispec.train import sources
from vispec.train.sources import HUB, PICTURE_PROMPTS, ImageStore, UnusableSample, open_source, parse_request


def layout(request) -> list[list[str]]:
    return [[part.get("text", "IMAGE") for part in message["content"]] for message in request.messages]


def test_a_jsonl_file(tmp_path):
    rows = [
        {"id": "a", "image": "a.png", "prompt": "What?", "kind": "photo"},
        {"images": ["a.png", "b.png"], "question": "first <image> then <image>\nend"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]},
        {
            "image": ["a.png"],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A cat."},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        },
        {
            "image": "a.png",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}],
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    found = open_source(path)
    assert len(found) == 5 and found.image_root == tmp_path.resolve()
    assert [layout(found[index]) for index in range(5)] == [
        [["IMAGE", "What?"]],
        [["first", "IMAGE", "then", "IMAGE", "end"]],
        [["Be brief."], ["Hello"]],
        [["IMAGE", "What?"], ["A cat."], ["Sure?"]],
        [["x", "IMAGE"]],
    ]
    assert [found[index].answer for index in range(5)] == [None, None, None, "Yes.", None]
    assert parse_request({"prompt": "What?", "answer": "That."}, "row").answer == "That."
    assert found[0].name == "a" and found[0].kind == "photo" and found[1].name == "row 1"
    assert found[1].images == ("a.png", "b.png")
    assert [message["role"] for message in found[3].messages] == ["user", "assistant", "user"]


def test_a_folder_of_pictures(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    found = open_source(tmp_path)
    assert [found[index].images for index in range(len(found))] == [("a.jpg",), ("b.PNG",), ("deep/c.webp",)]
    assert layout(found[1]) == [["IMAGE", PICTURE_PROMPTS[1]]]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`."""
    red, blue = Image.new("RGB", (2, 2), "red"), Image.new("L", (2, 2), 7)
    rows = [{"image": red, "question": "What?"}, {"images": [blue, red], "question": "Both?"}, {"question": "None?"}]
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    sources._hub_dataset.cache_clear()
    yield asked
    sources._hub_dataset.cache_clear()


def test_a_data_set_of_the_hub(hub):
    found = open_source("owner/name", split="test")
    assert hub == [("owner/name", "test")]
    assert found[0].images == (f"{HUB}owner/name#test/0/0",)
    assert found[1].images == (f"{HUB}owner/name#test/1/0", f"{HUB}owner/name#test/1/1")
    assert found[2].images == ()
    store = ImageStore("")
    assert not store.missing(found[0].images[0])
    assert store.open(found[0].images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert store.open(found[1].images[0]).getpixel((0, 0)) == (7, 7, 7)
    assert len(hub) == 1


def test_the_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    sources._hub_dataset.cache_clear()
    with pytest.raises(ImportError, match="pip install datasets"):
        open_source("owner/name")


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ([1], "not an object", "list"),
        ({"image": "a.png"}, "no prompt", "none of prompt, question, messages, conversations"),
        ({"prompt": " "}, "no prompt", "none of"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no prompt", "no user turn"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role", "robot"),
        ({"messages": ["x"]}, "role", "'x'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "content", "audio"),
        ({"image": "a.png", "prompt": "<image> <image>"}, "placeholders", "2 <image> for 1"),
        ({"prompt": "<image> what?"}, "placeholders", "1 <image> for 0"),
        ({"images": [3], "prompt": "x"}, "image reference", "[3]"),
    ],
)
def test_rows_that_are_no_requests(row, reason, detail):
    with pytest.raises(UnusableSample) as found:
        parse_request(row, "row 3")
    assert found.value.reason == reason and detail in found.value.detail and "row 3" in found.value.detail


def test_sources_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a JSONL file, a folder or a hub id"):
        open_source(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="at least one request"):
        open_source(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "x"\n')
    with pytest.raises(UnusableSample, match="not JSON"):
        open_source(path)[0]


def test_pictures_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    store = ImageStore(tmp_path)
    assert store.missing("gone.png") and not store.missing("broken.png")
    with pytest.raises(UnusableSample, match=r"image missing: .*gone\.png"):
        store.open("gone.png")
    with pytest.raises(UnusableSample, match=r"image unreadable: broken\.png"):
        store.open("broken.png")

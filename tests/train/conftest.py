"""A tiny model with its processor, pictures, requests and answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.saved import make_processor
from vispec.train import CollectConfig, collect, open_source

EXTENSION = "w7 w8"
NEW_TOKENS = 24
COLLECT = CollectConfig(extension=EXTENSION, max_new_tokens=NEW_TOKENS, batch_size=3, shard_size=4)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums come out in one order, so that runs can be compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(seed: int = 0) -> tiny.Family:
    """A tiny LLaVA that never writes a picture's placeholder."""
    family = tiny.build("llava", seed)
    family.model.generation_config.suppress_tokens = [tiny.IMAGE_TOKEN]
    return family


def write_requests(root: Path) -> Path:
    """Ten requests: one picture, two pictures apart from each other, and text alone."""
    chance = random.Random(0)
    rows = []

    def words(count: int) -> str:
        return " ".join(f"w{chance.randrange(3, 147)}" for _ in range(count))

    for index in range(10):
        pixels = bytes(chance.randrange(256) for _ in range(28 * 28 * 3))
        Image.frombytes("RGB", (28, 28), pixels).save(root / f"{index}.png")
    for index in range(10):
        row = {"id": f"request {index}", "kind": "even" if index % 2 == 0 else "odd"}
        if index % 3 == 0:
            row |= {"image": f"{index}.png", "prompt": words(5)}
        elif index % 3 == 1:
            text = f"{words(2)} <image> {words(3)} <image> {words(2)}"
            row |= {"images": [f"{index}.png", f"{index - 1}.png"], "prompt": text}
        else:
            turns = [{"from": "human", "value": words(3)}, {"from": "gpt", "value": words(2)}]
            row |= {"conversations": turns + [{"from": "human", "value": words(4)}]}
        rows.append(row)
    path = root / "requests.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory, one_thread) -> SimpleNamespace:
    """The model, its processor, the requests and the data set of its answers."""
    root = tmp_path_factory.mktemp("world")
    family, processor = make_model(), make_processor(chat=True)
    requests = write_requests(root)
    totals = collect(family.model, processor, open_source(requests), root / "answers", COLLECT)
    return SimpleNamespace(
        root=root,
        family=family,
        model=family.model,
        processor=processor,
        requests=requests,
        answers=root / "answers",
        totals=totals,
    )

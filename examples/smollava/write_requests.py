"""Writes pictures and questions as `vispec train` takes them: a folder of pictures and two JSONL files.

`requests.jsonl` asks about pictures that may be trained on, `held_out.jsonl` about photographs set aside. Each row
also holds the text that the target was trained on, `answer`.
"""

import argparse
import json
import random
from pathlib import Path

from conversations import BRIEF, DETAILED, LONG, class_answers, openstax_answers
from pictures import encoded, held_out, read_rows
from scenes import draw

# How likely a picture of each kind is taken.
KINDS = {
    "photo": 0.66,
    "painting": 0.09,
    "map": 0.05,
    "chart": 0.05,
    "diagram": 0.06,
    "scenes": 0.05,
    "caltech101": 0.04,
}
TEXT_SHARE = 0.06
SETS = ("openstax", "caltech101")
HELD_OUT_SCENES, SCENES = 100, 2400
ABOUT = ("Tell me about {}.", "Write about {}.", "What is {}?")


class Pictures:
    """Pictures by kind, written into the output folder when they are asked for."""

    def __init__(self, data: Path, out: Path, aside: bool) -> None:
        self.data, self.out = data, out
        self.by_kind: dict[str, list] = {kind: [] for kind in KINDS}
        self.topics: list[str] = []
        for name in SETS:
            rows = read_rows(data, name)
            chosen = held_out(rows, name)
            for row in rows:
                if (row["file"] in chosen) == aside and row.get("label") != "BACKGROUND_Google":
                    self.by_kind[row["kind"] if name == "openstax" else name].append((name, row))
                    self.topics += [row["topic"]] if row.get("topic") else []
        self.by_kind["scenes"] = list(range(HELD_OUT_SCENES) if aside else range(HELD_OUT_SCENES, SCENES))

    def write(self, kind: str, one: object) -> tuple[str, str]:
        """Writes one picture. Returns: its name in the folder, and the text it was trained with."""
        if kind == "scenes":
            name, (picture, text) = f"scenes/{one}.png", draw(one)
            path = self._path(name)
            if not path.exists():
                picture.save(path)
            return name, text
        source, row = one
        name = f"{source}/{row['off']}.webp"
        path = self._path(name)
        if not path.exists():
            with open(self.data / f"{source}.bin", "rb") as file:
                path.write_bytes(encoded(file, row))
        detailed, last, _ = class_answers(row["label"]) if source == "caltech101" else openstax_answers(row)
        return name, detailed + last

    def _path(self, name: str) -> Path:
        path = self.out / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def question(chance: random.Random) -> str:
    """One of the questions that the target was trained on: mostly detailed, half of them asking for length."""
    asked = [(one + extra, 3.0 / len(LONG)) for one in DETAILED for extra in LONG]
    asked += [(one, 1.5) for one in DETAILED] + [(one, 0.4) for one in BRIEF]
    return chance.choices([one for one, _ in asked], [weight for _, weight in asked])[0]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=2400)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chance = random.Random(options.seed)
    pictures = Pictures(options.data, options.out, aside=False)
    rows = []
    for index in range(options.requests):
        if chance.random() < TEXT_SHARE:
            prompt = chance.choice(ABOUT).format(chance.choice(pictures.topics))
            rows.append({"id": f"text {index}", "kind": "text", "prompt": prompt})
            continue
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        name, text = pictures.write(kind, chance.choice(pictures.by_kind[kind]))
        rows.append({"id": name, "kind": kind, "image": name, "prompt": question(chance), "answer": text})
    aside = Pictures(options.data, options.out, aside=True)
    held = []
    for one in aside.by_kind["photo"][: options.held_out]:
        name, text = aside.write("photo", one)
        held.append({"id": name, "kind": "photo", "image": name, "prompt": question(chance), "answer": text})
    for name, found in (("requests", rows), ("held_out", held)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

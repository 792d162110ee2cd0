"""Writes the page of sample answers: what the model says of pictures that it was not trained on, beside the truth.

The demo's six photographs were picked by hand; the drawn scenes and, with `--data`, the photographs are the first ones
that were set aside, as they come: of the textbooks those that may be shown, of the classes without the picture.
"""

import argparse
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pictures import held_out, read_pictures, read_rows
from scenes import draw

import vispec
from vispec import demo
from vispec.cli.loading import load
from vispec.cli.prompts import make_inputs, open_pictures

SCENES = range(6)  # of the hundred that are never trained on
UNPICKED = 10
QUESTION = {"openstax": "Describe the picture in detail.", "caltech101": "What is in the picture?"}
HEAD = """# What SmolLaVA says

Greedy answers in float32 to pictures that it was not trained on, at most {tokens} tokens, as `sample_answers.py` writes
them. An answer that ends in an ellipsis reached the limit. `vispec.fast_generate` and `model.generate` give the same.
"""


class Speaker:
    """The model, asked about one picture at a time."""

    def __init__(self, model: str, tokens: int) -> None:
        # None: what the package ships.
        loaded = load(model, "", dtype="float32", device="cpu", quiet=True)
        self.model, self.processor, self.tokens = loaded.model, loaded.processor, tokens

    def __call__(self, picture: Any, prompt: str) -> str:
        inputs = make_inputs(self.processor, prompt, [picture])
        output = vispec.fast_generate(self.model, None, inputs, max_new_tokens=self.tokens, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        text = " ".join(self.processor.tokenizer.decode(answer, skip_special_tokens=True).split())
        return text + (" ..." if len(answer) == self.tokens else "")


def cell(text: str) -> str:
    """Text inside a table."""
    return text.replace("|", "\\|")


def set_aside(data: Path, name: str) -> list[dict]:
    """Rows of the pictures that were never trained on."""
    rows = read_rows(data, name)
    chosen = held_out(rows, name)
    return [row for row in rows if row["file"] in chosen]


def free(credit: str) -> bool:
    """Whether a credit names a licence that asks for nothing but this credit."""
    named = re.search(r"CC BY \d|CC0|public domain", credit or "", re.IGNORECASE)
    return named is not None and re.search(r"\b(SA|NC|ND)\b", credit) is None


def pictures(data: Path, name: str, rows: list[dict]) -> Iterator[tuple[dict, Any]]:
    """The first rows with their pictures."""
    rows = rows[:UNPICKED]
    return zip(rows, read_pictures(data, name, rows), strict=True)


def main() -> None:
    """Write the page and the pictures that it shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo or demo:RUN")
    parser.add_argument("--data", type=Path, help="the pictures, for the third table")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "answers.md")
    options = parser.parse_args()
    options.out = options.out.resolve()
    speaker = Speaker(options.model, options.tokens)
    folder = options.out.parent / "answers"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = [HEAD.format(tokens=options.tokens), "## The demo's photographs, picked by hand", ""]
    lines += ["| picture | question | answer |", "|---|---|---|"]
    for sample in demo.samples():
        answer = speaker(open_pictures([sample.path])[0], sample.prompt)
        place = os.path.relpath(sample.path, options.out.parent)
        shown = f"![{sample.path.stem}]({place})<br>{cell(sample.credit)}"
        lines.append(f"| {shown} | {cell(sample.prompt)} | {cell(answer)} |")
    lines += ["", "## Drawn scenes and charts, the first six as they come", ""]
    lines += ["| picture | answer | truth |", "|---|---|---|"]
    for seed in SCENES:
        picture, truth = draw(seed)
        picture.save(folder / f"scene-{seed}.png", optimize=True)
        answer = speaker(picture, QUESTION["openstax"])
        lines.append(f"| ![scene {seed}](answers/scene-{seed}.png) | {cell(answer)} | {cell(truth)} |")
    if options.data is not None:
        lines += ["", f"## Textbook photographs, the first {UNPICKED} that may be shown", ""]
        lines += ["| picture | what people say of it | answer |", "|---|---|---|"]
        rows = [row for row in set_aside(options.data, "openstax") if row["kind"] == "photo" and free(row["credit"])]
        for number, (row, picture) in enumerate(pictures(options.data, "openstax", rows)):
            picture.save(folder / f"photograph-{number}.webp")
            shown = f"![photograph {number}](answers/photograph-{number}.webp)<br>{cell(row['credit'])}"
            said = speaker(picture, QUESTION["openstax"])
            lines.append(f"| {shown} | {cell(row['text'] or row['caption'])} | {cell(said)} |")
        lines += ["", f"## Class photographs, the first of {UNPICKED} classes", "", "| class | answer |", "|---|---|"]
        firsts: dict[str, dict] = {}
        for row in set_aside(options.data, "caltech101"):
            firsts.setdefault(row["label"], row)
        rows = [row for label, row in firsts.items() if label != "BACKGROUND_Google"]
        for row, picture in pictures(options.data, "caltech101", rows):
            lines.append(f"| {row['label']} | {cell(speaker(picture, QUESTION['caltech101']))} |")
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

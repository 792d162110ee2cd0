"""Draws the draft tree of one real round as docs/tree.svg.

python docs/make_tree_picture.py              # the demo's first picture, its round of most tokens
python docs/make_tree_picture.py --picture 3 --depth 3 --width 4 --total-tokens 16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from vispec.cli.generate import add_tree_arguments, default_tree, set_threads, tree_of
from vispec.cli.loading import DEMO, load
from vispec.cli.prompts import make_inputs, open_pictures
from vispec.cli.running import answer
from vispec.cli.tree_view import ACCEPTED, BONUS, REJECTED, ROOT, Word, children

TARGET = Path(__file__).parent / "tree.svg"
LETTER_WIDTH, FONT_SIZE = 7.9, 13  # of the monospaced font, in pixels
BOX_HEIGHT, ROW_HEIGHT, COLUMN_GAP, MARGIN, HEADER = 24, 32, 44, 20, 52
# Fill, line and text of a box, and the width of its line.
COLOURS = {
    ROOT: ("#e8eef7", "#5b7aa8", "#1f3a5f", 1.5),
    ACCEPTED: ("#d9f2df", "#2e8b57", "#14532d", 2),
    BONUS: ("#fff3cd", "#b8860b", "#5c4400", 2),
    REJECTED: ("#ffffff", "#d8b4b4", "#a06060", 1),
}
LEGEND = {
    ROOT: "last committed token",
    ACCEPTED: "drafted and accepted",
    BONUS: "the target's own next token",
    REJECTED: "rejected",
}


class Box(NamedTuple):
    """A word in its place: left edge, middle and width in pixels."""

    word: Word
    left: float
    middle: float
    width: float


def label(word: Word) -> str:
    """The token, and what the draft gave it."""
    if word.probability is None or word.state == ROOT:
        return word.text
    return f"{word.text} {word.probability:.2f}"


def place(words: Sequence[Word]) -> list[Box]:
    """Columns by depth, one row a leaf, and every parent in line with its first child."""
    depths = []
    for word in words:
        depths.append(0 if word.parent < 0 else depths[word.parent] + 1)
    widths = [len(label(word)) * LETTER_WIDTH + 18 for word in words]
    columns = [
        max(width for width, own in zip(widths, depths, strict=True) if own == depth)
        for depth in range(max(depths) + 1)
    ]
    lefts = [MARGIN + sum(columns[:depth]) + COLUMN_GAP * depth for depth in range(len(columns))]
    rows: dict[int, int] = {}
    leaves = 0

    def walk(node: int) -> None:
        nonlocal leaves
        rows[node] = leaves
        below = children(words, node)
        for child in below:
            walk(child)
        if not below:
            leaves += 1

    walk(0)
    return [
        Box(word, lefts[depth], HEADER + MARGIN + rows[index] * ROW_HEIGHT + BOX_HEIGHT / 2, width)
        for index, (word, depth, width) in enumerate(zip(words, depths, widths, strict=True))
    ]


def draw(words: Sequence[Word], title: str) -> str:
    """The tree as an SVG document."""
    boxes = place(words)
    height = max(box.middle for box in boxes) + BOX_HEIGHT / 2 + MARGIN
    legend, legend_end = _legend()
    width = max(max(box.left + box.width for box in boxes) + MARGIN, legend_end)
    width = max(width, len(title) * LETTER_WIDTH + 2 * MARGIN)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-size="{FONT_SIZE}" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#ffffff"/>',
        f'<text x="{MARGIN}" y="24" fill="#333333">{escape(title)}</text>',
        *legend,
    ]
    # Edges of the accepted path come last, over the others.
    for box in sorted(boxes, key=lambda box: box.word.state != REJECTED):
        if box.word.parent >= 0:
            lines.append(_edge(boxes[box.word.parent], box))
    lines += [_box(box) for box in boxes]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _legend() -> tuple[list[str], float]:
    lines, left = [], float(MARGIN)
    for state, meaning in LEGEND.items():
        fill, line, _, _ = COLOURS[state]
        lines.append(
            f'<rect x="{left:.0f}" y="38" width="12" height="12" rx="3" fill="{fill}" '
            f'stroke="{line}"/><text x="{left + 18:.0f}" y="48" font-size="11" '
            f'fill="#555555">{escape(meaning)}</text>'
        )
        left += 18 + len(meaning) * LETTER_WIDTH * 11 / FONT_SIZE + 16
    return lines, left


def _edge(parent: Box, child: Box) -> str:
    _, colour, _, thickness = COLOURS[child.word.state]
    start, end = parent.left + parent.width, child.left
    half = (start + end) / 2
    return (
        f'<path d="M{start:.1f} {parent.middle:.1f} C{half:.1f} {parent.middle:.1f} '
        f'{half:.1f} {child.middle:.1f} {end:.1f} {child.middle:.1f}" '
        f'fill="none" stroke="{colour}" stroke-width="{thickness}"/>'
    )


def _box(box: Box) -> str:
    fill, line, text, thickness = COLOURS[box.word.state]
    weight = ' font-weight="bold"' if box.word.state == BONUS else ""
    return (
        f'<rect x="{box.left:.1f}" y="{box.middle - BOX_HEIGHT / 2:.1f}" width="{box.width:.1f}" '
        f'height="{BOX_HEIGHT}" rx="6" fill="{fill}" stroke="{line}" stroke-width="{thickness}"/>'
        f'<text x="{box.left + box.width / 2:.1f}" y="{box.middle + 4.5:.1f}" '
        f'text-anchor="middle" fill="{text}"{weight}>{escape(label(box.word))}</text>'
    )


def gained(words: Sequence[Word]) -> int:
    """Tokens that a round brought."""
    return sum(word.state in (ACCEPTED, BONUS) for word in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=int, default=1, metavar="N", help="the demo's, from 1")
    parser.add_argument("--round", type=int, metavar="N", help="from 1; default: of most tokens")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--out", type=Path, default=TARGET, metavar="FILE")
    add_tree_arguments(parser)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    from vispec import demo

    loaded = load(DEMO, None, device="cpu")
    sample = demo.samples()[arguments.picture - 1]
    found = answer(
        loaded,
        make_inputs(loaded.processor, sample.prompt, open_pictures([sample.path])),
        tree=tree_of(arguments, default_tree(DEMO)),
        show_tree=True,
        quiet=True,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
    )
    numbers = range(1, len(found.rounds) + 1)
    number = arguments.round or max(numbers, key=lambda one: gained(found.rounds[one - 1]))
    if number not in numbers:
        parser.error(f"--round must be in [1, {len(numbers)}], got {number}")
    words = found.rounds[number - 1]
    title = f"round {number} of {len(found.rounds)}: {gained(words)} tokens from one pass"
    arguments.out.write_text(draw(words, title), encoding="utf-8")
    print(f"{title}: {arguments.out}")


if __name__ == "__main__":
    main()

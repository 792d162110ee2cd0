"""A round's draft tree in words."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from vispec.cli.tree_view import ACCEPTED, BONUS, REJECTED, ROOT, rich_tree, words_of
from vispec.decode.round import RoundEvent
from vispec.tree import DraftTree


class Letters:
    """A tokenizer of letters: token 0 is `a`; 25 is a line end, 26 a blank in front of `b`."""

    def decode(self, tokens: list[int]) -> str:
        return {25: "\n", 26: " b", 27: ""}.get(tokens[0]) or chr(97 + tokens[0]) * (tokens[0] < 25)


def a_round(path: list[int], emitted: list[int]) -> RoundEvent:
    """Root a with children b and c; d and e behind b."""
    tree = DraftTree.empty(1, 5, 3, torch.device("cpu"))
    tree.tokens = torch.tensor([[0, 1, 2, 3, 4]])
    tree.parents = torch.tensor([[-1, 0, 0, 1, 1]])
    tree.scores = torch.log(torch.tensor([[1.0, 0.5, 0.25, 0.25, 0.05]]))
    return RoundEvent(tree, [path], [emitted])


def states(words) -> str:
    return " ".join(f"{word.text}:{word.state}" for word in words)


def test_accepted_path_and_bonus():
    words = words_of(a_round([0, 1, 4], [1, 4, 25]), Letters())
    assert states(words) == (f"a:{ROOT} b:{ACCEPTED} c:{REJECTED} d:{REJECTED} e:{ACCEPTED} ⏎:{BONUS}")
    assert words[-1].parent == 4 and words[-1].probability is None
    assert [round(word.probability, 3) for word in words[:-1]] == [1, 0.5, 0.25, 0.5, 0.1]


def test_nothing_accepted():
    words = words_of(a_round([0], [26]), Letters())
    assert [word.state for word in words] == [ROOT, *[REJECTED] * 4, BONUS]
    assert words[-1].text == "·b" and words[-1].parent == 0


def test_an_answer_that_ends_inside_the_path_has_no_bonus():
    words = words_of(a_round([0], [1]), Letters())
    assert states(words).startswith(f"a:{ROOT} b:{ACCEPTED} c:{REJECTED}")
    assert len(words) == 5


def test_an_unprintable_token_shows_its_number():
    assert words_of(a_round([0], [27]), Letters())[-1].text == "<27>"


def test_rich_tree_puts_the_accepted_path_first():
    console = Console(file=io.StringIO(), width=40, record=True, force_terminal=True, color_system="standard")
    words = words_of(a_round([0, 1, 4], [1, 4, 25]), Letters())
    console.print(rich_tree(words, "round 1"))
    coloured = console.file.getvalue()
    plain = console.export_text().splitlines()
    assert [line.strip(" │├└─") for line in plain] == [
        "round 1",
        "a",
        "b 0.50",
        "e 0.10",
        "⏎",
        "d 0.50",
        "c 0.25",
    ]
    assert "\x1b[32mb" in coloured
    assert "\x1b[2;31mc" in coloured

"""The picture of a draft tree: well-formed, every word in it, no two boxes on one another."""

from __future__ import annotations

import importlib.util
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

from tests.test_tree_view import Letters, a_round
from vispec.cli.tree_view import words_of

FILE = Path(__file__).parent.parent / "docs" / "make_tree_picture.py"


def picture_maker():
    spec = importlib.util.spec_from_file_location("make_tree_picture", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_word_is_drawn_once_and_apart():
    maker = picture_maker()
    words = words_of(a_round([0, 1, 4], [1, 4, 27]), Letters())
    root = ElementTree.fromstring(maker.draw(words, "3 < 4 & more"))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for word in words:
        assert texts.count(maker.label(word)) == 1
    assert "3 < 4 & more" in texts and "<27>" in texts
    assert maker.gained(words) == 3
    for one, other in combinations(maker.place(words), 2):
        apart = one.left + one.width < other.left or other.left + other.width < one.left
        assert apart or abs(one.middle - other.middle) >= maker.BOX_HEIGHT

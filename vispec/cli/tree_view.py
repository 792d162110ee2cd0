"""One round's draft tree with its words, for people and for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.text import Text
from rich.tree import Tree

from vispec.decode.round import RoundEvent

ROOT, ACCEPTED, BONUS, REJECTED = "root", "accepted", "bonus", "rejected"
STYLES = {ROOT: "bold", ACCEPTED: "green", BONUS: "bold", REJECTED: "dim red"}


class Word(NamedTuple):
    """One node of a tree, or the bonus token behind the accepted path.

    Attributes:
        text: the token as the tokenizer writes it, blanks made visible.
        parent: index of the parent, -1 for the root.
        probability: what the draft gave it after its parent; 1 for the root, None for the bonus.
        state: root, accepted, bonus or rejected.
    """

    text: str
    token: int
    parent: int
    probability: float | None
    state: str


def words_of(event: RoundEvent, tokenizer: Any, row: int = 0) -> list[Word]:
    """The nodes of a round's tree in order, root first, and then the bonus token.

    A round that ended the answer inside its path has no bonus: its last token is an accepted one.
    """
    tree, path, emitted = event.tree, event.path[row], event.emitted[row]
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    scores = tree.scores[row].tolist()
    accepted = set(path[1:])
    last = path[-1] if path else 0
    ended_inside = [
        node for node, parent in enumerate(parents) if parent == last and emitted and tokens[node] == emitted[-1]
    ]
    accepted.update(ended_inside)
    words = []
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        state = ROOT if parent < 0 else ACCEPTED if node in accepted else REJECTED
        before = scores[parent] if parent >= 0 else scores[node]
        probability = math.exp(min(scores[node] - before, 0.0))
        words.append(Word(visible(tokenizer, token), token, parent, probability, state))
    if emitted and not ended_inside:
        words.append(Word(visible(tokenizer, emitted[-1]), emitted[-1], last, None, BONUS))
    return words


def visible(tokenizer: Any, token: int) -> str:
    """A token's text with blanks and line ends that can be seen."""
    text = tokenizer.decode([token])
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or f"<{token}>"


def rich_tree(words: Sequence[Word], title: str) -> Tree:
    """The words as a `rich` tree: accepted green, the bonus bold, rejected ones dim red."""
    whole = Tree(Text(title, style="dim"))

    def grow(branch: Tree, parent: int) -> None:
        for index in children(words, parent):
            word = words[index]
            label = Text(word.text, style=STYLES[word.state])
            if word.probability is not None and word.state != ROOT:
                label.append(f" {word.probability:.2f}", style="dim")
            grow(branch.add(label), index)

    grow(whole, -1)
    return whole


def children(words: Sequence[Word], parent: int) -> list[int]:
    """Indices of a node's children, the accepted one or the bonus first."""
    found = [index for index, word in enumerate(words) if word.parent == parent]
    return sorted(found, key=lambda index: words[index].state == REJECTED)


def as_dict(words: Sequence[Word]) -> list[dict[str, Any]]:
    """The words for JSON."""
    return [word._asdict() for word in words]

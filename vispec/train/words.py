"""What kind of word each token of an answer belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

KINDS = ("function", "content", "named", "other")
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
# English articles, pronouns, prepositions, conjunctions, auxiliaries and the commonest adverbs.
FUNCTION_WORDS = frozenset(
    """
    a about above across after again against all along also although am among an and another any are around as at be
    because been before behind being below beneath beside between beyond both but by can could did do does doing down
    during each either else every few for from further had has have having he her here hers herself him himself his how
    however i if in inside into is it its itself just many may me might more most much must my near neither no nor not
    of off on once one only onto or other our ours out outside over own per rather same several shall she should since
    so some such than that the their theirs them themselves then there these they this those though through thus to
    together too toward towards under until up upon us very was we were what when where whether which while who whom
    whose why will with within without would yet you your
    """.split()
)


def content_words(text: str) -> frozenset[str]:
    """The words of a text that are no function words, in lower case."""
    return frozenset(word.lower() for word in WORD.findall(text)) - FUNCTION_WORDS


def pieces_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text, special tokens nothing."""
    pieces, before = [], ""
    for count in range(1, len(tokens) + 1):
        # A prefix at a time: single tokens would lose their spaces.
        text = tokenizer.decode(list(tokens[:count]), skip_special_tokens=True)
        pieces.append(text[len(before) :])
        before = text
    return pieces


def word_kinds(pieces: Sequence[str], named: frozenset[str] = frozenset()) -> list[str]:
    """The kind of each piece's first word, of `KINDS`: a named word is a content word among `named`."""
    text = "".join(pieces)
    of_place = [""] * len(text)
    for match in WORD.finditer(text):
        word = match.group().lower()
        kind = "function" if word in FUNCTION_WORDS else "named" if word in named else "content"
        of_place[match.start() : match.end()] = [kind] * len(match.group())
    found, start = [], 0
    for piece in pieces:
        inside = [kind for kind in of_place[start : start + len(piece)] if kind]
        found.append(inside[0] if inside else "other")
        start += len(piece)
    return found

"""How many of a draft's tokens its target accepts, on prompts that it was not trained on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from vispec.decode import fast_generate
from vispec.decode.round import RoundEvent
from vispec.drafts import Draft
from vispec.targets import load_target
from vispec.train.collect import EXTENSION, prepare
from vispec.train.data import Skip
from vispec.train.sources import ImageStore, Source, UnusableSample
from vispec.train.words import KINDS, content_words, pieces_of, word_kinds
from vispec.tree import TreeConfig

# Tokens of an answer that count as its beginning.
FIRST_TOKENS = 16


@dataclass
class Acceptance:
    """Rounds of one group of answers.

    Attributes:
        accepted: how many rounds accepted 0, 1, 2, ... drafted tokens.
    """

    accepted: Counter[int] = field(default_factory=Counter)

    @property
    def rounds(self) -> int:
        return sum(self.accepted.values())

    @property
    def tau(self) -> float:
        """Mean drafted tokens accepted a round; 0 without rounds."""
        return sum(count * rounds for count, rounds in self.accepted.items()) / max(1, self.rounds)

    def by_depth(self, longest: int) -> list[float]:
        """For depth 1, 2, ...: of the rounds that accepted the depth before, the share that accepted this one too."""
        reached = [sum(n for count, n in self.accepted.items() if count >= depth) for depth in range(longest + 1)]
        return [reached[depth] / max(1, reached[depth - 1]) for depth in range(1, longest + 1)]

    def as_dict(self, longest: int) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "tau": self.tau,
            "tokens_per_round": self.tau + 1,
            "acceptance_by_depth": self.by_depth(longest),
        }


def evaluate(
    model: Any,
    processor: Any,
    draft: Draft,
    source: Source,
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    max_new_tokens: int = 128,
    extension: str = EXTENSION,
    tree: TreeConfig | None = None,
    limit: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Generates an answer to each request with the draft and counts what was accepted, one generation a temperature.

    Prompts and pictures should be ones that the draft was not trained on; nothing here can tell.

    Returns: for JSON: for each temperature tau, tokens_per_round, acceptance_by_depth, the same by part of the
    answer (its first 16 tokens, the rest) and by the source's `kind`; by kind of word the tokens and the share of them
    that came from the draft, where words of the source's own answer count as named; answers, new_tokens, and skips.
    Raises: ValueError where no request can be used, or for a temperature below 0.
    """
    if not temperatures or min(temperatures) < 0:
        raise ValueError(f"evaluate: temperatures must be at least 0, got {list(temperatures)}")
    target = load_target(model)
    draft.check(target)
    tree = TreeConfig() if tree is None else tree
    longest = tree.longest_path - 1
    store = ImageStore(source.image_root)
    tokenizer = getattr(processor, "tokenizer", processor)
    count = len(source) if limit is None else min(limit, len(source))
    watches = {temperature: _Watch() for temperature in temperatures}
    skips: list[Skip] = []
    for index in range(count):
        name = f"row {index}"
        try:
            request = source[index]
            name = request.name
            one = prepare(index, request, processor, store, target, extension, max_new_tokens)
        except UnusableSample as error:
            skips.append(Skip(index, name, error.reason, error.detail))
            continue
        for temperature, watch in watches.items():
            options = {"do_sample": False}
            if temperature:
                options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            watch.begin(request.kind)
            fast_generate(
                target,
                draft,
                one.inputs,
                tree=tree,
                seed=seed + index,
                on_round=watch,
                max_new_tokens=max_new_tokens,
                **options,
            )
            watch.end(tokenizer, content_words(request.answer or ""))
        if console is not None:
            taus = ", ".join(f"T={t:g}: tau {watch.total.tau:.2f}" for t, watch in watches.items())
            console.print(f"{index + 1}/{count} prompts, {taus}", highlight=False)
    if len(skips) == count:
        raise ValueError(f"evaluate: at least one prompt must be usable, got none of {count}: {skips[0].detail}")
    return {
        "tree": asdict(tree),
        "max_new_tokens": max_new_tokens,
        "extension": extension,
        "seed": seed,
        "prompts": count - len(skips),
        "skipped": [asdict(skip) for skip in skips],
        "temperatures": {f"{t:g}": watch.as_dict(longest) for t, watch in watches.items()},
    }


class _Watch:
    """Sorts the rounds of one temperature's generations into groups."""

    def __init__(self) -> None:
        self.total = Acceptance()
        self.parts = {"first": Acceptance(), "later": Acceptance()}
        self.kinds: dict[str, Acceptance] = defaultdict(Acceptance)
        # For each kind of word, how many tokens were the target's own and how many were drafted.
        self.words = {kind: [0, 0] for kind in KINDS}
        self.answers = 0
        self.new_tokens = 0

    def begin(self, kind: str | None) -> None:
        """A new answer starts."""
        self._kind = kind
        self._place = 0
        self._tokens: list[int] = []
        self._drafted: list[bool] = []
        self.answers += 1

    def __call__(self, event: RoundEvent) -> None:
        emitted = len(event.emitted[0])
        self.new_tokens += emitted
        if event.tree is not None:
            # A round emits what it accepted and one token of the target's own.
            part = self.parts["first" if self._place < FIRST_TOKENS else "later"]
            groups = [self.total, part]
            if self._kind is not None:
                groups.append(self.kinds[self._kind])
            for group in groups:
                group.accepted[emitted - 1] += 1
        self._place += emitted
        self._tokens += event.emitted[0]
        self._drafted += [True] * (emitted - 1) + [False]

    def end(self, tokenizer: Any, named: frozenset[str]) -> None:
        """The answer is whole, and its words can be told."""
        kinds = word_kinds(pieces_of(tokenizer, self._tokens), named)
        for kind, drafted in zip(kinds, self._drafted, strict=True):
            self.words[kind][drafted] += 1

    def as_dict(self, longest: int) -> dict[str, Any]:
        return {
            **self.total.as_dict(longest),
            "answers": self.answers,
            "new_tokens": self.new_tokens,
            "by_part": {name: group.as_dict(longest) for name, group in self.parts.items()},
            "by_word": {
                kind: {"tokens": sum(counts), "drafted_share": counts[1] / sum(counts)}
                for kind, counts in self.words.items()
                if sum(counts)
            },
            "by_kind": {name: group.as_dict(longest) for name, group in sorted(self.kinds.items())},
        }

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
from vispec.targets import load_target, resolve_settings
from vispec.train.collect import EXTENSION, prepare
from vispec.train.data import Skip
from vispec.train.loops import breaking_off, looped
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
    max_repeated: float = 1.0,
    shortest_answer: int = 1,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Generates an answer to each request with the draft and counts what was accepted, one generation a temperature.

    Prompts and pictures should be ones that the draft was not trained on; nothing here can tell.

    Args:
        max_repeated: answers that loop, as in `CollectConfig`, are left out of all figures and counted.
        shortest_answer: so are answers of fewer tokens.

    Returns: for JSON: for each temperature tau, tokens_per_round, acceptance_by_depth, the same by part of the
    answer (its first 16 tokens, the rest) and by the source's `kind`; by kind of word the tokens and the share of them
    that came from the draft, where words of the source's own answer count as named; answers, new_tokens, the answers
    left out by reason, and skips.
    Raises: ValueError where no request can be used, and for options out of range.
    """
    if not temperatures or min(temperatures) < 0:
        raise ValueError(f"evaluate: temperatures must be at least 0, got {list(temperatures)}")
    if not 0 < max_repeated <= 1:
        raise ValueError(f"evaluate: max_repeated must be above 0 and at most 1, got {max_repeated}")
    if shortest_answer < 1:
        raise ValueError(f"evaluate: shortest_answer must be at least 1, got {shortest_answer}")
    target = load_target(model)
    draft.check(target)
    tree = TreeConfig() if tree is None else tree
    longest = tree.longest_path - 1
    store = ImageStore(source.image_root)
    tokenizer = getattr(processor, "tokenizer", processor)
    count = len(source) if limit is None else min(limit, len(source))
    watches = {temperature: _Watch(shortest_answer) for temperature in temperatures}
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
            options: dict[str, Any] = {"do_sample": False}
            if temperature:
                options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            options |= breaking_off(max_repeated, target.placeholder_tokens)
            ends = resolve_settings(target.model, one.inputs["input_ids"], options).eos_token_ids
            watch.begin()
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
            tokens = watch.tokens
            loop = looped(tokens, tokens[-1] in ends, max_new_tokens, max_repeated)
            watch.end(loop, request.kind, tokenizer, content_words(request.answer or ""))
        if console is not None:
            taus = ", ".join(f"T={t:g}: tau {watch.total.tau:.2f}" for t, watch in watches.items())
            console.print(f"{index + 1}/{count} prompts, {taus}", highlight=False)
    if len(skips) == count:
        raise ValueError(f"evaluate: at least one prompt must be usable, got none of {count}: {skips[0].detail}")
    for temperature, watch in watches.items():
        if not watch.answers:
            raise ValueError(
                f"evaluate: at least one answer at temperature {temperature:g} must count, got {dict(watch.left_out)}"
            )
    return {
        "tree": asdict(tree),
        "max_new_tokens": max_new_tokens,
        "extension": extension,
        "max_repeated": max_repeated,
        "shortest_answer": shortest_answer,
        "seed": seed,
        "prompts": count - len(skips),
        "skipped": [asdict(skip) for skip in skips],
        "temperatures": {f"{t:g}": watch.as_dict(longest) for t, watch in watches.items()},
    }


class _Watch:
    """Sorts the rounds of one temperature's generations into groups."""

    def __init__(self, shortest_answer: int) -> None:
        self.shortest_answer = shortest_answer
        self.total = Acceptance()
        self.parts = {"first": Acceptance(), "later": Acceptance()}
        self.kinds: dict[str, Acceptance] = defaultdict(Acceptance)
        # For each kind of word, how many tokens were the target's own and how many were drafted.
        self.words = {kind: [0, 0] for kind in KINDS}
        self.answers = 0
        self.new_tokens = 0
        self.left_out: Counter[str] = Counter()

    def begin(self) -> None:
        """A new answer starts."""
        self._rounds: list[list[int]] = []

    def __call__(self, event: RoundEvent) -> None:
        self._rounds.append(event.emitted[0])

    @property
    def tokens(self) -> list[int]:
        """The answer so far."""
        return [token for emitted in self._rounds for token in emitted]

    def end(self, loop: bool, kind: str | None, tokenizer: Any, named: frozenset[str]) -> None:
        """The answer has ended, in a `loop` or not: it counts, or it is left out."""
        tokens = self.tokens
        if loop:
            self.left_out["looping answer"] += 1
            return
        if len(tokens) < self.shortest_answer:
            self.left_out["short answer"] += 1
            return
        self.answers += 1
        self.new_tokens += len(tokens)
        # The prefill brought the first token.
        place = len(self._rounds[0])
        for emitted in self._rounds[1:]:
            groups = [self.total, self.parts["first" if place < FIRST_TOKENS else "later"]]
            if kind is not None:
                groups.append(self.kinds[kind])
            # A round emits what it accepted and one token of the target's own.
            for group in groups:
                group.accepted[len(emitted) - 1] += 1
            place += len(emitted)
        drafted = [place < len(emitted) - 1 for emitted in self._rounds for place in range(len(emitted))]
        word_of = word_kinds(pieces_of(tokenizer, tokens), named)
        for word, own in zip(word_of, drafted, strict=True):
            self.words[word][own] += 1

    def as_dict(self, longest: int) -> dict[str, Any]:
        return {
            **self.total.as_dict(longest),
            "answers": self.answers,
            "new_tokens": self.new_tokens,
            "left_out": dict(self.left_out),
            "by_part": {name: group.as_dict(longest) for name, group in self.parts.items()},
            "by_word": {
                kind: {"tokens": sum(counts), "drafted_share": counts[1] / sum(counts)}
                for kind, counts in self.words.items()
                if sum(counts)
            },
            "by_kind": {name: group.as_dict(longest) for name, group in sorted(self.kinds.items())},
        }

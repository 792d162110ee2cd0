"""One answer: streamed as it is accepted, its rounds kept for whoever wants to see the trees."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from transformers import TextStreamer

from vispec.cli.loading import Loaded
from vispec.cli.tree_view import Word, rich_tree, words_of
from vispec.compare import Audit, Comparison
from vispec.decode import GenerationStats, fast_generate
from vispec.decode.round import RoundEvent
from vispec.tree import TreeConfig


@dataclass
class Answer:
    """One answer.

    Attributes:
        prompt_tokens: length of the prompt, pictures included.
        tokens: the new token ids.
        text: the same without special tokens.
        seconds: wall time of the whole call.
        rounds: each round's tree in words, when it was asked for.
    """

    prompt_tokens: int
    tokens: list[int]
    text: str
    seconds: float
    stats: GenerationStats
    rounds: list[list[Word]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The answer for JSON."""
        stats = self.stats
        return {
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "seconds": self.seconds,
            "tokens_per_second": len(self.tokens) / self.seconds,
            "tau": stats.tau,
            "tokens_per_round": stats.tokens_per_round,
            "rounds": stats.rounds,
            "nodes_per_round": stats.nodes_per_round,
            "guarded": stats.guarded,
            "phase_seconds": {
                "prefill": stats.prefill_seconds,
                "draft": stats.draft_seconds,
                "verify": stats.verify_seconds,
                "accept": stats.accept_seconds,
                "replay": stats.replay_seconds,
            },
            "trees": [[word._asdict() for word in words] for words in self.rounds],
        }


class _Watch:
    """Turns rounds into words, and prints them as trees unless it is to be quiet."""

    def __init__(self, tokenizer: Any, console: Console | None) -> None:
        self.tokenizer = tokenizer
        self.console = console
        self.rounds: list[list[Word]] = []

    def __call__(self, event: RoundEvent) -> None:
        if event.tree is None:
            return
        words = words_of(event, self.tokenizer)
        self.rounds.append(words)
        if self.console is not None:
            count = len(event.emitted[0])
            plural = "" if count == 1 else "s"
            title = f"round {len(self.rounds)}: {count} token{plural}"
            self.console.print(rich_tree(words, title))


def answer(
    loaded: Loaded,
    inputs: Mapping[str, Any],
    *,
    tree: TreeConfig | str,
    show_tree: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Answer:
    """Generates one answer and shows it as it comes: as text, or round by round as trees.

    `quiet` prints nothing, for JSON. `options` are those of `fast_generate`.
    """
    tokenizer = loaded.tokenizer
    console = Console(highlight=False)
    watch = _Watch(tokenizer, None if quiet else console) if show_tree else None
    streamed = not quiet and not show_tree
    started = time.perf_counter()
    result = fast_generate(
        loaded.model,
        loaded.draft,
        inputs,
        tree=tree,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streamed else None,
        on_round=watch,
        return_dict_in_generate=True,
        **options,
    )
    seconds = time.perf_counter() - started
    prompt_tokens = inputs["input_ids"].shape[1]
    tokens = result.sequences[0, prompt_tokens:].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if show_tree and not quiet:
        print(text)
    rounds = [] if watch is None else watch.rounds
    return Answer(prompt_tokens, tokens, text, seconds, result.stats, rounds)


def verdict_lines(comparison: Comparison) -> list[str]:
    """What a comparison found, in words."""
    lines = [comparison.verdict]
    difference = comparison.difference
    if difference is not None and not difference.tie:
        gap = "" if difference.gap is None else f", gap {difference.gap:.3g}"
        lines.append(
            f"  first difference at token {difference.token}: plain {difference.plain}, vispec {difference.vispec}{gap}"
        )
    lines.append(
        f"tau {comparison.tau:.2f}, {comparison.tokens_per_round:.2f} tokens a round, "
        f"{comparison.vispec.tokens_per_second:.1f} tokens/s against "
        f"{comparison.plain.tokens_per_second:.1f} of model.generate: "
        f"speed-up {comparison.speed_up:.2f}x"
    )
    return lines


def audit_lines(audit: Audit) -> list[str]:
    """What an audit found, in words."""
    if not audit.departures:
        return [f"audit: passed, each of {audit.tokens} tokens is the plain model's argmax"]
    count = len(audit.departures)
    verdict = "passed" if audit.passed else "failed"
    lines = [f"audit: {verdict}, {count} of {audit.tokens} tokens not the plain model's argmax"]
    for found in audit.departures:
        kind = "tie" if found.tie else "no tie"
        lines.append(
            f"  token {found.token}: {found.emitted} for {found.best}, gap {found.gap:.3g}, "
            f"{found.steps:.3g} steps: {kind}"
        )
    return lines

"""Runs two ways of generating in turn, and says what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vispec.compare.verdict import Difference, find_difference
from vispec.decode import GenerationStats, fast_generate
from vispec.tree import TreeConfig

if TYPE_CHECKING:
    from vispec.drafts.base import Draft

# New tokens of the untimed runs, which fill caches and start threads.
WARMUP_TOKENS = 8
PROMPT_LOOKUP_TOKENS = 10
# Prompt lookup may copy a picture's placeholder into its candidates, which many models then refuse.
LOOKUP_ERRORS = (ValueError, RuntimeError, IndexError)


@dataclass
class Run:
    """One way of generating.

    Attributes:
        sequences: [B, prompt + new] int64, right-padded.
        new_tokens: tokens emitted over all rows, padding not among them.
        all_seconds: time of every repeat.
    """

    sequences: Tensor
    new_tokens: int
    all_seconds: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The fastest repeat: what else runs on the machine only ever adds time."""
        return min(self.all_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


@dataclass
class Comparison:
    """What `compare` found.

    Attributes:
        plain, vispec: the two runs.
        prompt_lookup: `model.generate` with prompt lookup, when it was asked for and ran.
        prompt_lookup_error: why it did not run.
        difference: the first difference that is no tie, else the first tie, else None.
        stats: rounds, accepted tokens and times of vispec's fastest repeat.
    """

    plain: Run
    vispec: Run
    prompt_lookup: Run | None
    prompt_lookup_error: str | None
    difference: Difference | None
    stats: GenerationStats

    @property
    def identical(self) -> bool:
        """Whether every token is equal, ties apart."""
        return self.difference is None or self.difference.tie

    @property
    def verdict(self) -> str:
        """`identical: yes`, `identical: tie at token k (gap g)` or `identical: no`."""
        if self.difference is None:
            return "identical: yes"
        if self.difference.tie:
            return f"identical: tie at token {self.difference.token} (gap {self.difference.gap:.3g})"
        return "identical: no"

    @property
    def speed_up(self) -> float:
        """Tokens a second over those of plain generation."""
        return self.vispec.tokens_per_second / self.plain.tokens_per_second

    @property
    def tau(self) -> float:
        return self.stats.tau

    @property
    def tokens_per_round(self) -> float:
        return self.stats.tokens_per_round

    def as_dict(self) -> dict[str, Any]:
        """Everything but the tokens, for JSON."""

        def speed(run: Run) -> dict[str, Any]:
            return {
                "new_tokens": run.new_tokens,
                "seconds": run.seconds,
                "all_seconds": run.all_seconds,
                "tokens_per_second": run.tokens_per_second,
            }

        lookup = self.prompt_lookup
        return {
            "verdict": self.verdict,
            "difference": None if self.difference is None else vars(self.difference),
            "tau": self.tau,
            "tokens_per_round": self.tokens_per_round,
            "rounds": self.stats.rounds,
            "speed_up": self.speed_up,
            "plain": speed(self.plain),
            "vispec": speed(self.vispec),
            "prompt_lookup": None if lookup is None else speed(lookup),
            "prompt_lookup_error": self.prompt_lookup_error,
        }


def compare(
    model: Any,
    draft: Draft | None,
    inputs: Mapping[str, Any],
    *,
    tree: TreeConfig | str = "auto",
    exact: str = "law",
    max_new_tokens: int,
    repeats: int = 1,
    warmup: int = WARMUP_TOKENS,
    prompt_lookup: bool = False,
    **options: Any,
) -> Comparison:
    """Runs `model.generate` and `fast_generate` in turn, greedily, and compares tokens and times.

    A first difference is a tie only where plain decoding's own two best logits are less than a
    bound apart and vispec chose one of them; the bound is two steps of bf16 or fp16, and 64 of
    float32 (see `vispec.compare.verdict`). Anything else is a fault of vispec. After a tie the two
    texts go their own ways and are not compared further.

    Args:
        model, draft, inputs, tree, exact: as for `fast_generate`.
        max_new_tokens: limit of both.
        repeats: timed runs of each, in turn A B A B.
        warmup: new tokens of one untimed run of each beforehand; 0 for none.
        prompt_lookup: also run `model.generate` with prompt lookup, in the same turns.
        **options: generation options for both, by `generate`'s names.

    Raises: ValueError for sampling and for what `fast_generate` refuses.
    Notes: a GPU is synchronised before and after every timed run.
    """
    if options.pop("do_sample", False):
        raise ValueError("compare: do_sample must be False, got True: sampled answers are not to be equal")
    if repeats < 1:
        raise ValueError(f"compare: repeats must be at least 1, got {repeats}")
    options["do_sample"] = False
    device = model.device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def plain(limit: int, **more: Any) -> Tensor:
        return model.generate(**inputs, max_new_tokens=limit, **{**options, **more})

    def ours(limit: int) -> Any:
        return fast_generate(
            model,
            draft,
            inputs,
            tree=tree,
            exact=exact,
            max_new_tokens=limit,
            return_dict_in_generate=True,
            **options,
        )

    runners: dict[str, Callable[[int], Any]] = {"vispec": ours, "plain": plain}
    if prompt_lookup:
        # Lookup copies stretches of the prompt into its guesses, and a forward pass over a picture's placeholder
        # without its picture fails. Suppressed tokens are cut out of the guesses; no answer holds a placeholder.
        suppressed = [*(options.get("suppress_tokens") or []), *_placeholders(model)]
        runners["prompt_lookup"] = lambda limit: plain(
            limit, prompt_lookup_num_tokens=PROMPT_LOOKUP_TOKENS, suppress_tokens=suppressed or None
        )
    turns = _Turns(runners, device)
    if warmup:
        turns.run(min(warmup, max_new_tokens), timed=False)
    for _ in range(repeats):
        turns.run(max_new_tokens)
    results, seconds = turns.results, turns.seconds
    ends = _end_tokens(model, options)
    prompt = inputs["input_ids"].shape[1]
    stats = results["vispec"].stats
    results["vispec"] = results["vispec"].sequences
    rows = {name: _new_tokens(result[:, prompt:], ends) for name, result in results.items()}
    runs = {name: Run(results[name], sum(map(len, rows[name])), seconds[name]) for name in runners}
    difference = find_difference(
        rows["plain"],
        rows["vispec"],
        lambda row, token: _plain_scores(plain, options, row, token),
        model.get_output_embeddings().weight.dtype,
    )
    lookup = runs.get("prompt_lookup")
    return Comparison(runs["plain"], runs["vispec"], lookup, turns.refused, difference, stats)


def _placeholders(model: Any) -> list[int]:
    """Token ids that stand for rows of a picture or a video."""
    found = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))
    return [token for token in found if token is not None]


class _Turns:
    """Ways of generating, run one after another; the fastest result of each is kept.

    Attributes:
        results, seconds: by name, of those that ran.
        refused: why prompt lookup did not run; it is then left out of all further turns.
    """

    def __init__(self, runners: dict[str, Callable[[int], Any]], device: torch.device) -> None:
        self._runners = runners
        self._device = device
        self.results: dict[str, Any] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in runners}
        self.refused: str | None = None

    def run(self, limit: int, timed: bool = True) -> None:
        """One turn of each, of at most `limit` new tokens."""
        for name, runner in list(self._runners.items()):
            try:
                result, elapsed = _timed(runner, limit, self._device)
            except LOOKUP_ERRORS as error:
                if name != "prompt_lookup":
                    raise
                self.refused = f"{type(error).__name__}: {error}"
                del self._runners[name]
                continue
            if not timed:
                continue
            past = self.seconds[name]
            if not past or elapsed < min(past):
                self.results[name] = result
            past.append(elapsed)


class _LastScores:
    """A logits processor that changes nothing and keeps the scores of the last step."""

    scores: Tensor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores = scores
        return scores


def _plain_scores(plain: Callable[..., Any], options: dict[str, Any], row: int, token: int) -> Tensor:
    """What plain decoding chose from at one step: its logits after all logits processors, [V]."""
    last = _LastScores()
    plain(token + 1, logits_processor=[*(options.get("logits_processor") or []), last])
    return last.scores[row].float()


def _timed(runner: Callable[[int], Any], limit: int, device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = runner(limit)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def _end_tokens(model: Any, options: dict[str, Any]) -> set[int]:
    found = options.get("eos_token_id")
    if found is None:
        found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        return set()
    return set(torch.as_tensor(found).flatten().tolist())


def _new_tokens(new: Tensor, ends: set[int]) -> list[list[int]]:
    """Each row's tokens up to and with its first end token, without padding."""
    rows = []
    for tokens in new.tolist():
        end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
        rows.append(tokens[: end + 1])
    return rows

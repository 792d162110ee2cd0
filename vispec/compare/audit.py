"""Is every token of an answer the one that the plain model would have chosen after the tokens before it?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vispec.compare.verdict import TIE_STEPS, step_at
from vispec.targets import GenerationSettings, load_target, resolve_settings

# Answer positions whose logits are held at one time.
POSITIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Departure:
    """A token that is not the plain model's first choice.

    Attributes:
        row, token: where: the row of the batch, and the index among its new tokens.
        emitted, best: the token in the answer, and the model's own.
        gap: how far the emitted token's logit is below the best.
        steps: the same in steps of the logits' dtype.
        tie: whether that is little enough for rounding to decide.
    """

    row: int
    token: int
    emitted: int
    best: int
    gap: float
    steps: float
    tie: bool


@dataclass(frozen=True)
class Audit:
    """What `audit` found.

    Attributes:
        tokens: new tokens that were looked at, over all rows.
        departures: those that are not the argmax, in order.
        tie_steps: below so many steps a departure is a tie.
    """

    tokens: int
    departures: list[Departure]
    tie_steps: int

    @property
    def passed(self) -> bool:
        """Whether every token is the argmax, ties apart."""
        return all(departure.tie for departure in self.departures)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        departures = [asdict(departure) for departure in self.departures]
        return {"passed": self.passed, "tokens": self.tokens, "tie_steps": self.tie_steps, "departures": departures}


def audit(model: Any, inputs: Mapping[str, Any], output: Tensor, **options: Any) -> Audit:
    """Reads prompt and answer in one pass of the plain model, and looks at every token that was emitted.

    The pass is the model's own code with the attention that the caller chose; nothing of the engine's decoding runs.
    It is another arithmetic than one token at a time, as verification is, so that near-ties may fall either way.

    Args:
        model, inputs: as for `fast_generate`.
        output: [B, S + new] int64, what `generate` or `fast_generate` returned for them.
        **options: generation options that the answer was made with (eos_token_id, repetition_penalty, ...).

    Raises: ValueError for an output that does not begin with the prompt, and for sampling.
    """
    target = load_target(model)
    inputs = {name: value.to(target.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    tokens = inputs["input_ids"]
    settings = resolve_settings(target.model, tokens, {"max_new_tokens": max(output.shape[-1], 1), **options})
    if settings.do_sample:
        raise ValueError("audit: do_sample must be False, got True: a sampled token need not be the argmax")
    output = output.to(target.device)
    start = tokens.shape[1]
    if output.ndim != 2 or output.shape[1] <= start or not torch.equal(output[:, :start], tokens):
        raise ValueError(
            f"audit: output must be the prompt {list(tokens.shape)} and an answer, got {list(output.shape)}"
        )
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(tokens) if mask is None else mask
    answers = _answers(output[:, start:], settings)
    extended = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == tokens.shape:
            # What is said of each token of the prompt (pictures, for example) is 0 for text.
            extended[name] = torch.cat([value, value.new_zeros(len(tokens), output.shape[1] - start)], dim=1)
    extended["input_ids"] = output
    extended["attention_mask"] = torch.cat([mask, torch.zeros_like(output[:, start:])], dim=1)
    for row, answer in enumerate(answers):
        extended["attention_mask"][row, start : start + len(answer)] = 1
    dtype = target.head.weight.dtype
    departures: list[Departure] = []
    with torch.inference_mode(), target.session():
        features = target.read(extended, use_cache=False).features
        for row, answer in enumerate(answers):
            own = torch.nonzero(extended["attention_mask"][row])[:, 0]
            # A token is chosen from the logits at its row's token before, which padding may part from it.
            prompt = len(own) - len(answer)
            before = own[prompt - 1 : -1]
            history = output[row, own]
            for first in range(0, len(answer), POSITIONS_AT_ONCE):
                logits = target.head(features[row, before[first : first + POSITIONS_AT_ONCE]])
                for index, scores in enumerate(logits, start=first):
                    scores = _processed(
                        settings, history[: len(own) - len(answer) + index], len(own) - len(answer), scores
                    )
                    departures += _departure(row, index, answer[index], scores, dtype)
    return Audit(sum(map(len, answers)), departures, TIE_STEPS[dtype])


def _answers(new: Tensor, settings: GenerationSettings) -> list[list[int]]:
    """Each row's tokens up to and with its first end token, without padding."""
    rows = []
    for tokens in new.tolist():
        end = next((index for index, token in enumerate(tokens) if token in settings.eos_token_ids), len(tokens))
        rows.append(tokens[: end + 1])
    return rows


def _processed(settings: GenerationSettings, history: Tensor, prompt_length: int, scores: Tensor) -> Tensor:
    """The scores [V] after the logits processors, as plain decoding applies them behind `history`."""
    if not settings.processors:
        return scores
    scores = scores.to(torch.float32)[None]
    for processor in settings.processors:
        if hasattr(processor, "at"):
            processor.at(prompt_length)
        scores = processor(history[None], scores)
    return scores[0]


def _departure(row: int, token: int, emitted: int, scores: Tensor, dtype: torch.dtype) -> list[Departure]:
    best = int(scores.argmax())
    if best == emitted:
        return []
    top, own = float(scores[best]), float(scores[emitted])
    gap = top - own
    steps = gap / step_at(max(top, own, key=abs), dtype)
    return [Departure(row, token, emitted, best, gap, steps, steps < TIE_STEPS[dtype])]

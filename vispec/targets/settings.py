"""What a generation was asked for: the caller's options over the model's generation_config over the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MaxTimeCriteria,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

# What `generate` itself falls back to where neither the caller nor the model says anything.
DEFAULTS: dict[str, Any] = {
    "max_length": None,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "return_dict_in_generate": False,
}
DEFAULT_NEW_TOKENS = 20

# Options that change the answer and that we do not offer; any of the values beside each changes nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "num_return_sequences": (None, 1),
    "typical_p": (None, 1.0),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "guidance_scale": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "watermarking_config": (None,),
    "dola_layers": (None,),
    "stop_strings": (None,),
    "token_healing": (None, False),
    "remove_invalid_values": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_cache": (None, True),
}


@dataclass(frozen=True)
class GenerationSettings:
    """Resolved settings of one call.

    Attributes:
        max_new_tokens: tokens a row may emit.
        do_sample, temperature, top_k, top_p, min_p: as in `generate`; top_k 0, top_p 1 and min_p 0 are off.
        eos_token_ids: any of them ends a row.
        pad_token_id: fills rows that ended early; None where neither it nor an end token is known.
        processors: further logits processors, applied to every node with that node's own history.
        criteria: further stopping criteria, applied to every emitted token.
        return_dict: whether statistics are returned beside the tokens.
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    return_dict: bool


def resolve_settings(model: PreTrainedModel, prompt: Tensor, options: dict[str, Any]) -> GenerationSettings:
    """Reads the options of one call as `generate` would.

    Shapes: `prompt` [B, S] int64, padding included (lengths count it, as in `generate`).
    Raises: ValueError for unknown or unsupported options and for values out of range, by name.
    """
    options = dict(options)
    processors = options.pop("logits_processor", None)
    criteria = options.pop("stopping_criteria", None)
    given = options.pop("generation_config", None)
    unknown = sorted(set(options) - set(DEFAULTS) - set(UNSUPPORTED))
    if unknown:
        known = ", ".join(sorted(DEFAULTS))
        raise ValueError(f"fast_generate: unknown option {', '.join(unknown)}; known: {known}")
    sources = [source for source in (given, getattr(model, "generation_config", None)) if source is not None]

    def value(name: str, default: Any = None) -> Any:
        if name in options:
            return options[name]
        for source in sources:
            found = getattr(source, name, None)
            if found is not None:
                return found
        return default

    for name, neutral in UNSUPPORTED.items():
        if value(name) not in neutral:
            raise ValueError(f"fast_generate: {name} must be one of {neutral}, got {value(name)!r}: not supported")
    resolved = {name: value(name, default) for name, default in DEFAULTS.items()}
    _check_ranges(resolved)
    eos = _token_ids(resolved["eos_token_id"])
    pad = resolved["pad_token_id"]
    if pad is None and eos:
        pad = eos[0]
    return GenerationSettings(
        max_new_tokens=_new_token_limit(resolved, prompt.shape[1]),
        do_sample=bool(resolved["do_sample"]),
        temperature=float(resolved["temperature"]) if resolved["temperature"] is not None else 1.0,
        top_k=int(resolved["top_k"] or 0),
        top_p=float(resolved["top_p"]) if resolved["top_p"] is not None else 1.0,
        min_p=float(resolved["min_p"] or 0.0),
        eos_token_ids=eos,
        pad_token_id=pad,
        processors=_processors(resolved, eos, prompt, processors),
        criteria=_criteria(resolved, criteria),
        return_dict=bool(resolved["return_dict_in_generate"]),
    )


def _token_ids(value: int | Sequence[int] | Tensor | None) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _new_token_limit(resolved: dict[str, Any], prompt_length: int) -> int:
    if resolved["max_new_tokens"] is not None:
        limit = int(resolved["max_new_tokens"])
    elif resolved["max_length"] is not None:
        limit = int(resolved["max_length"]) - prompt_length
    else:
        limit = DEFAULT_NEW_TOKENS
    if limit < 1:
        raise ValueError(
            f"fast_generate: max_new_tokens must be at least 1, got {limit} (prompt of {prompt_length} tokens)"
        )
    return limit


def _check_ranges(resolved: dict[str, Any]) -> None:
    def demand(holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise ValueError(f"fast_generate: {name} must be {wanted}, got {resolved[name]!r}")

    temperature, top_k, top_p, min_p = (resolved[n] for n in ("temperature", "top_k", "top_p", "min_p"))
    demand(temperature is None or temperature > 0 or not resolved["do_sample"], "temperature", "above 0")
    demand(top_k is None or (int(top_k) == top_k and top_k >= 0), "top_k", "an integer of at least 0")
    demand(top_p is None or 0 <= top_p <= 1, "top_p", "in [0, 1]")
    demand(min_p is None or 0 <= min_p <= 1, "min_p", "in [0, 1]")
    penalty = resolved["repetition_penalty"]
    demand(penalty is None or penalty > 0, "repetition_penalty", "above 0")


def _processors(
    resolved: dict[str, Any],
    eos: tuple[int, ...],
    prompt: Tensor,
    own: Sequence[Any] | None,
) -> LogitsProcessorList:
    """The processors that `generate` would build, in its order, then the caller's own."""
    device = str(prompt.device)
    found = LogitsProcessorList()
    if resolved["sequence_bias"] is not None:
        found.append(SequenceBiasLogitsProcessor(resolved["sequence_bias"]))
    if resolved["repetition_penalty"] not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(float(resolved["repetition_penalty"])))
    if resolved["no_repeat_ngram_size"]:
        found.append(NoRepeatNGramLogitsProcessor(resolved["no_repeat_ngram_size"]))
    if resolved["bad_words_ids"] is not None:
        found.append(NoBadWordsLogitsProcessor(resolved["bad_words_ids"], list(eos) or None))
    least = resolved["min_new_tokens"]
    if least is None:
        least = max(0, (resolved["min_length"] or 0) - prompt.shape[1])
    if least and eos:
        found.append(_MinNewTokens(least, eos))
    if resolved["suppress_tokens"] is not None:
        found.append(SuppressTokensLogitsProcessor(resolved["suppress_tokens"], device=device))
    if resolved["begin_suppress_tokens"] is not None:
        found.append(_SuppressAtBegin(resolved["begin_suppress_tokens"]))
    found.extend(own or [])
    return found


class _PromptRelative:
    """A processor that counts from the end of the prompt, which differs from row to row without padding."""

    prompt_length: int = 0

    def at(self, prompt_length: int) -> _PromptRelative:
        """The same processor for a row whose own prompt has `prompt_length` tokens."""
        self.prompt_length = prompt_length
        return self


class _MinNewTokens(_PromptRelative):
    def __init__(self, least: int, eos: tuple[int, ...]) -> None:
        self.least, self.eos = least, list(eos)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        inner = MinNewTokensLengthLogitsProcessor(self.prompt_length, self.least, self.eos, device=scores.device)
        return inner(input_ids, scores)


class _SuppressAtBegin(_PromptRelative):
    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        inner = SuppressTokensAtBeginLogitsProcessor(self.tokens, self.prompt_length, device=scores.device)
        return inner(input_ids, scores)


def _criteria(resolved: dict[str, Any], own: Sequence[Any] | None) -> StoppingCriteriaList:
    found = StoppingCriteriaList(own or [])
    if resolved["max_time"] is not None:
        found.append(MaxTimeCriteria(resolved["max_time"]))
    return found

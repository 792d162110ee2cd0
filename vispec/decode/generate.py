"""`fast_generate`: what `model.generate` returns, sooner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from vispec.decode import memory
from vispec.decode.exactness import GUARD, check_exactness, load_target_for
from vispec.decode.graph import LateEngine
from vispec.decode.policy import AdaptiveTree, FixedTree, TreePolicy
from vispec.decode.round import Engine, RoundEvent, Speculation
from vispec.decode.shapes import AdaptiveShape, OneShape, ShapePolicy, menu_for
from vispec.decode.stats import GenerationStats
from vispec.decode.stopping import Transcript
from vispec.drafts.base import Draft, FixedSession
from vispec.ops import Sampling
from vispec.targets import GenerationSettings, Target, check_rows, resolve_settings, self_check
from vispec.tree import TreeConfig

# Below this temperature sampling is the argmax, and dividing by it would only overflow.
GREEDY_TEMPERATURE = 1e-5


@dataclass
class GenerationResult:
    """Returned with ``return_dict_in_generate=True``.

    Attributes:
        sequences: [B, prompt + new] int64, right-padded with the pad id.
        stats: rounds, accepted tokens and times.
    """

    sequences: Tensor
    stats: GenerationStats


def fast_generate(
    model: Any,
    draft: Draft | None,
    inputs: Mapping[str, Any],
    *,
    tree: TreeConfig | Literal["auto"] = "auto",
    seed: int | Sequence[int] | None = None,
    exact: Literal["law", "guard", "self"] = "law",
    streamer: Any = None,
    on_round: Callable[[RoundEvent], None] | None = None,
    graphs: bool | None = None,
    **options: Any,
) -> Tensor | GenerationResult:
    """Generates what `model.generate(**inputs, **options)` would, several tokens a pass.

    Greedy output is the target's own argmax at every position. Sampled output follows the target's distribution
    exactly, and with a seed it is the same whatever the draft, the tree or the batch it ran in.

    Args:
        model: a Hugging Face causal LM or ...ForConditionalGeneration, as the caller loaded it. It is as before
            when the call returns or raises.
        draft: a draft made for this model, or None for plain decoding on the same engine.
        inputs: what the processor returned; `input_ids` [B, S] int64 with an `attention_mask` when rows are padded
            (left or right), and the pictures.
        tree: "auto" chooses the sizes of the draft tree round by round for most tokens a second, and decodes
            plainly where a tree would not pay; it learns costs and acceptance from the rounds and remembers them for
            later calls with the same model and draft. With `graphs`, where a size must be captured before it is used,
            it chooses among the few of `shapes.MENU`; where a GPU's rounds wait for the host it is `TreeConfig()`. A
            `TreeConfig` of the caller's is kept to in every round.
        seed: key of the sampling noise: one for all rows (equal prompts then get equal answers) or one a row.
            Default: drawn from torch's generator, one a row.
        exact: "law": every token is the argmax, or a draw, of the logits that the pass over the tree gave. In float32
            that is `generate`'s answer token for token; 16-bit formats round a pass over many tokens otherwise than
            one over one, and where the two best logits are a step or two apart either may win. "guard" (greedy only):
            where they are less than `guard.GUARD_STEPS` steps apart the path is cut, and a pass over that one token
            decides, as in plain decoding. It costs one plain step for each such place. It does not promise
            `generate`'s answer: keys and values still come from passes over trees. "self": the answer is that of plain
            decoding here (`draft=None, exact="self"`), bit by bit, greedy or with a seed, in every format, whatever the
            draft and the tree. Every pass then has `ops.PATH_NODES` rows for each of the batch, which is the most nodes
            that a tree may have, and attention in one fixed order; models in which a row depends on the others are
            refused, and two more passes see to it that on this machine none does.
        streamer: a Hugging Face streamer; batch 1.
        on_round: called after every round with a `RoundEvent`.
        graphs: keep a round's state on the device, replay each round as one CUDA graph and read its result one round
            late. Default: on a CUDA device, where nothing needs the host in every round (logits processors,
            `on_round`, `exact="guard"`, a draft that runs on the host). On a CPU, True runs the same rounds call by
            call. Captured rounds and their caches are kept for the next call with this model and draft, two sets at
            most; `vispec.release` gives their memory back.
        **options: generation options by `generate`'s names (max_new_tokens, max_length, do_sample, temperature,
            top_k, top_p, min_p, eos_token_id, pad_token_id, repetition_penalty, stopping_criteria, ...);
            what is not given comes from the model's `generation_config`.

    Returns: [B, S + new] int64, right-padded, or a `GenerationResult` with ``return_dict_in_generate=True``.
    Raises:
        ValueError: bad input, by name, before any work.
        FloatingPointError: logits that are not finite, with the round.
    Notes: the host reads a few integers each round, one round late where `graphs` holds.
    Source: ViSpec (arXiv 2509.15235); tree of EAGLE-2 (arXiv 2406.16858).
    """
    target = load_target_for(model, exact)
    inputs = _checked_inputs(inputs, target)
    tokens = inputs["input_ids"]
    settings = resolve_settings(target.model, tokens, options)
    inputs.setdefault("attention_mask", _inferred_mask(tokens, settings))
    _check_limits(target, draft, inputs, settings, tree, streamer)
    sampling = _sampling(settings, seed, len(tokens), target)
    check_exactness(exact, sampling is not None)
    late = _late(
        graphs,
        target.device,
        {
            "logits processors": bool(settings.processors),
            "on_round": on_round is not None,
            'exact="guard"': exact == GUARD,
        },
    )
    stats = GenerationStats()
    with torch.inference_mode(), target.session(), _current(target.device):
        self_check(target, inputs)
        with stats.timed("prefill"):
            prompt = target.prefill(inputs)
        if target.row_exact:
            check_rows(target, prompt)
        transcript = Transcript(
            prompt.tokens, prompt.lengths, settings.max_new_tokens, settings.eos_token_ids, settings.criteria
        )
        engine = Engine(
            target,
            prompt,
            transcript,
            sampling,
            torch.tensor(settings.eos_token_ids, dtype=torch.int64, device=tokens.device),
            settings.processors,
            stats,
            target.dtype if exact == GUARD else None,
        )
        watch = _Watcher(streamer, on_round, tokens)
        with stats.timed("accept"):
            event = engine.first(prompt.logits)
        watch(event)
        if draft is not None:
            circumstances = (len(tokens), sampling is not None, torch.get_num_threads(), target.row_exact)
            policy = _policy(target, draft, tree, circumstances, late)
            start = partial(draft.start, target, prompt, engine.roots)
            engine.speculation = Speculation(policy, start)
        features = prompt.features
        del prompt
        if late and not transcript.done:
            engine = _started_late(engine, graphs, draft, tree, features)
        del features
        while not transcript.done:
            watch(engine.step())
        watch.end()
        if isinstance(engine, LateEngine):
            _put_back(engine, draft)
        elif draft is not None and isinstance(policy, AdaptiveTree):
            memory.keep(target.model, draft, circumstances, policy)
    sequences = transcript.sequences(tokens, settings.pad_token_id or 0)
    return GenerationResult(sequences, stats) if settings.return_dict else sequences


def _current(device: torch.device) -> AbstractContextManager:
    """Makes a CUDA device the current one: events and graphs belong to that one's stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _late(graphs: bool | None, device: torch.device, hosts: Mapping[str, bool]) -> bool:
    """Whether rounds run ahead of the host; `hosts` says what would need it in every round.

    Raises ValueError where the caller asks for what cannot be.
    """
    found = [name for name, holds in hosts.items() if holds]
    if graphs and found:
        raise ValueError(f"fast_generate: graphs must not be True with {' and '.join(found)}")
    return device.type == "cuda" and not found if graphs is None else graphs


def _started_late(
    engine: Engine, graphs: bool | None, draft: Draft | None, tree: TreeConfig | str, features: Tensor
) -> Engine | LateEngine:
    """The engine with its draft started, running ahead of the host unless that draft needs it in every round."""
    session = None
    if draft is not None:
        with engine.stats.timed("draft"):
            session = engine.speculation.session()
        on_host = {f"a draft that runs on the host ({type(draft).__name__})": not isinstance(session, FixedSession)}
        if not _late(graphs, engine.roots.device, on_host):
            return engine
    if draft is None or isinstance(tree, TreeConfig):
        shapes = OneShape(tree if draft is not None else None)
    else:
        shapes = AdaptiveShape(menu_for(draft.widest(engine.target), engine.target.most_nodes))
        shapes = memory.recall(engine.target.model, draft, _late_circumstances(engine, shapes)) or shapes
    rounds = memory.take_rounds(engine.target.model, draft, _late_circumstances(engine, shapes))
    return LateEngine(engine, session, shapes, rounds, features)


def _put_back(late: LateEngine, draft: Draft | None) -> None:
    """Keeps what the next call can use. A call that raised does not come here."""
    model, circumstances = late.engine.target.model, _late_circumstances(late.engine, late.shapes)
    memory.put_back_rounds(model, draft, circumstances, late.finish())
    if isinstance(late.shapes, AdaptiveShape):
        memory.keep(model, draft, circumstances, late.shapes)


def _late_circumstances(engine: Engine, shapes: ShapePolicy) -> tuple:
    """What decides the work of rounds that run ahead of the host; a stream's buffers are for that stream alone."""
    stream = torch.cuda.current_stream().cuda_stream if engine.roots.is_cuda else 0
    exact = engine.target.row_exact
    return len(engine.roots), engine.sampling is not None, len(engine.end_tokens), exact, shapes.menu, stream


class _Watcher:
    """Feeds a streamer token by token, as `generate` does, and a callback round by round."""

    def __init__(self, streamer: Any, on_round: Callable[[RoundEvent], None] | None, prompt: Tensor) -> None:
        self._streamer = streamer
        self._on_round = on_round
        if streamer is not None:
            streamer.put(prompt.cpu())

    def __call__(self, event: RoundEvent | None) -> None:
        if event is None:
            return
        if self._streamer is not None:
            for token in event.emitted[0]:
                self._streamer.put(torch.tensor([token]))
        if self._on_round is not None:
            self._on_round(event)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()


def _checked_inputs(inputs: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """The processor's output as a plain dict on the model's device."""
    if not hasattr(inputs, "keys") or "input_ids" not in inputs:
        raise ValueError(f"fast_generate: inputs must hold input_ids, got {type(inputs).__name__}")
    found = {
        name: value.to(target.device) if isinstance(value, Tensor) else value
        for name, value in dict(inputs).items()
        if value is not None
    }
    tokens = found["input_ids"]
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 2:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"fast_generate: input_ids must be int64 [B, S], got {shape}")
    mask = found.get("attention_mask")
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(
            f"fast_generate: attention_mask must be {tuple(tokens.shape)} like input_ids, got {tuple(mask.shape)}"
        )
    if not tokens.numel() or (mask is not None and bool((mask.sum(1) == 0).any())):
        raise ValueError(f"fast_generate: prompt must not be empty, got input_ids of shape {tuple(tokens.shape)}")
    return found


def _inferred_mask(tokens: Tensor, settings: GenerationSettings) -> Tensor:
    """The mask where none was given, as `generate` infers it: the pad id is padding unless it also ends a text."""
    if settings.pad_token_id is None or settings.pad_token_id in settings.eos_token_ids:
        return torch.ones_like(tokens)
    mask = (tokens != settings.pad_token_id).long()
    # A row of padding alone is a prompt that happens to consist of that token.
    return torch.where(mask.any(dim=1, keepdim=True), mask, 1)


def _check_limits(
    target: Target,
    draft: Draft | None,
    inputs: Mapping[str, Any],
    settings: GenerationSettings,
    tree: TreeConfig | str,
    streamer: Any,
) -> None:
    if not isinstance(tree, TreeConfig) and tree != "auto":
        raise ValueError(f'fast_generate: tree must be "auto" or a TreeConfig, got {tree!r}')
    batch = inputs["input_ids"].shape[0]
    length = int(inputs["attention_mask"].sum(1).max())
    limit = target.max_positions
    if limit is not None and length + settings.max_new_tokens > limit:
        raise ValueError(
            f"fast_generate: prompt + max_new_tokens must be at most the model's {limit} positions, "
            f"got {length} + {settings.max_new_tokens}"
        )
    if streamer is not None and batch > 1:
        raise ValueError(f"fast_generate: a streamer takes batch 1, got {batch}")
    if draft is not None:
        draft.check(target)
        if isinstance(tree, TreeConfig) and tree.nodes > target.most_nodes:
            raise ValueError(
                f'fast_generate: tree must have at most {target.most_nodes} nodes with exact="self", got {tree.nodes}'
            )
        widest = draft.widest(target)
        if isinstance(tree, TreeConfig) and tree.top_k > widest:
            raise ValueError(
                f"fast_generate: tree.top_k must be at most the {widest} tokens that the draft proposes from, "
                f"got {tree.top_k}"
            )


def _policy(target: Target, draft: Draft, tree: TreeConfig | str, circumstances: tuple, late: bool) -> TreePolicy:
    """Who chooses the trees: what was remembered, something fresh, or the caller."""
    if isinstance(tree, TreeConfig):
        return FixedTree(tree)
    widest = draft.widest(target)
    if late or target.device.type != "cpu":
        # Here passes run behind the host's back, and its clock says nothing of them. Rounds that run ahead of it
        # have a policy of their own (`shapes.py`).
        default = TreeConfig()
        return FixedTree(replace(default, top_k=min(default.top_k, widest)))
    return memory.recall(target.model, draft, circumstances) or AdaptiveTree(widest, target.most_nodes)


def _sampling(
    settings: GenerationSettings, seed: int | Sequence[int] | None, batch: int, target: Target
) -> Sampling | None:
    if not settings.do_sample or settings.temperature < GREEDY_TEMPERATURE:
        return None
    if seed is None:
        seeds = torch.randint(0, 2**63 - 1, (batch,), dtype=torch.int64).tolist()
    elif isinstance(seed, int):
        seeds = [seed] * batch
    else:
        seeds = list(seed)
    if len(seeds) != batch:
        raise ValueError(f"fast_generate: seed must be one number or {batch}, got {len(seeds)}")
    device = target.device
    # The key is 64 bits wide; int64 holds the upper half as negative numbers.
    seeds = [(value + 2**63) % 2**64 - 2**63 for value in seeds]

    def filled(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((batch,), value, dtype=dtype, device=device)

    return Sampling(
        temperature=filled(settings.temperature, torch.float32),
        top_k=filled(min(settings.top_k, target.vocabulary), torch.int64),
        top_p=filled(settings.top_p, torch.float32),
        min_p=filled(settings.min_p, torch.float32),
        seeds=torch.tensor(seeds, dtype=torch.int64, device=device),
    )

"""A Hugging Face model as a target: prefill with its own code, then verify trees through its own decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vispec import ops
from vispec.cache import GROWTH_SLOTS, KeyValueCache
from vispec.prompt import Prompt, Span
from vispec.targets.attention import TreePass, attention_of
from vispec.targets.fused import FusedDecoder
from vispec.tree import MAX_NODES, DraftTree

# Settings by which some families change the logits after `lm_head`; the value beside each changes nothing.
LOGIT_TRANSFORMS = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier_scale": 1.0,
}

_UNKNOWN = object()


@dataclass
class Captured:
    """What the decoder read and wrote in one pass.

    Attributes:
        embeddings: [B, S, C] its input rows, images merged.
        positions: its position ids, [B, S] or three or four such rows; None where it counted for itself.
        features: [B, S, C] its output.
    """

    embeddings: Tensor | None = None
    positions: Tensor | None = None
    features: Tensor | None = field(default=None, repr=False)


class Target:
    """Adapter for decoder-only models of transformers: causal LMs and vision-language models alike.

    Nothing of the model is copied or changed. While `session` is open its decoder runs with our attention
    function during `verify` only, and hooks exist during `prefill` only; both are undone on the way out.

    Attributes:
        needs_mask: the next `verify` must build the dense mask. False once a pass has shown that every layer's
            attention does without.
        row_exact: what `verify` says of a node depends on its path alone, bit by bit: see `targets.row_exact`.

    Raises:
        ValueError: a kind of model or cache that is not supported, named.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_output_embeddings"):
            raise ValueError(f"target: model must be a Hugging Face language model, got {type(model).__name__}")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"target: encoder-decoder models are not supported, got {type(model).__name__}")
        if model.get_output_embeddings() is None:
            raise ValueError(f"target: model must have a language-model head, got {type(model).__name__}")
        devices = set(getattr(model, "hf_device_map", {}).values())
        if len(devices) > 1:
            raise ValueError(f"target: model must be on one device, got {sorted(map(str, devices))}")
        self.model = model
        self.needs_mask = True
        self.row_exact = False
        self._fused_decoder: FusedDecoder | None | object = _UNKNOWN
        self.decoder = _decoder_of(model)
        self.head = model.get_output_embeddings()
        self.text_config = config.get_text_config(decoder=True)
        _refuse_logit_transforms(self.text_config)
        _refuse_unsupported_cache(self.text_config)
        _refuse_linear_biases(self.text_config)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoder's weights (the embedding's)."""
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> torch.nn.Module:
        return self.model.get_input_embeddings()

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def vocabulary(self) -> int:
        """Number of logits, which may exceed the tokenizer's size."""
        return self.head.weight.shape[0]

    @property
    def max_positions(self) -> int | None:
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def most_nodes(self) -> int:
        """Nodes that a tree may have."""
        return ops.PATH_NODES if self.row_exact else MAX_NODES

    def pass_rows(self, nodes: int) -> int:
        """Rows that a pass over so many nodes takes, and slots behind the committed ones."""
        return ops.PATH_NODES if self.row_exact else nodes

    @property
    def placeholder_tokens(self) -> list[int]:
        """Token ids that stand for rows of an image or a video."""
        names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
        found = {getattr(self.model.config, name, None) for name in names}
        return sorted(token for token in found if token is not None)

    @contextmanager
    def session(self) -> Iterator[None]:
        """The state that a generation may change, saved and put back, also after an exception."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            if training:
                self.model.train()

    def prefill(self, inputs: Mapping[str, Tensor]) -> Prompt:
        """Runs the model itself over a batch of prompts, padded left or right or not at all.

        Shapes: `inputs` as the processor returns them, `input_ids` and `attention_mask` [B, S]. The attention
        function is the user's own, so the first token is plain generation's own.
        """
        tokens = inputs["input_ids"]
        mask = inputs["attention_mask"]
        keep = mask.bool()
        lengths = keep.sum(1)
        layers = DynamicCache(config=self.text_config)
        captured = self.read(inputs, past_key_values=layers, use_cache=True)
        # A stable sort by "is padding" lists a row's own tokens first, in order.
        rows = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, : int(lengths.max())]
        picked = rows[..., None].expand(*rows.shape, captured.features.shape[-1])
        features = captured.features.gather(1, picked)
        last = features[torch.arange(len(lengths), device=features.device), lengths - 1]
        pairs = [(layer.keys, layer.values) for layer in layers.layers]
        del layers
        if not pairs or any(keys is None for keys, _ in pairs):
            raise ValueError(
                f"target: {type(self.model).__name__} must fill the cache it is given, got layers without keys "
                "(recurrent and custom caches are not supported)"
            )
        unpadded = tokens.gather(1, rows)
        return Prompt(
            tokens=unpadded,
            lengths=lengths,
            features=features,
            embeddings=captured.embeddings.gather(1, picked),
            logits=self.head(last),
            next_positions=_next_positions(captured.positions, keep, lengths),
            spans=self.spans(unpadded, lengths, inputs),
            cache=KeyValueCache.from_prefill(pairs, rows, lengths, rows.shape[1] + GROWTH_SLOTS),
        )

    def read(self, inputs: Mapping[str, Tensor], **options: object) -> Captured:
        """Runs the model without its head over a padded batch, with the positions that `generate` would give it.

        Shapes: `inputs` as for `prefill`. `options` go to the model's forward pass (its cache, for example).
        """
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        captured = Captured()
        with self._capture(captured):
            base(**{**inputs, **self.prefill_positions(inputs, inputs["attention_mask"])}, **options)
        return captured

    def prefill_positions(self, inputs: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Position arguments for the prefill: counted over each row's own tokens, as `generate` does."""
        positions = mask.long().cumsum(-1) - 1
        return {"position_ids": positions.masked_fill(mask == 0, 0)}

    def verify_positions(self, positions: Tensor) -> Tensor:
        """Position ids in the decoder's own form, from [B, T]."""
        return positions

    def spans(self, tokens: Tensor, lengths: Tensor, inputs: Mapping[str, Tensor]) -> list[list[Span]]:
        """Finds the runs of placeholder tokens in rows without padding [B, S]."""
        placeholders = torch.tensor(self.placeholder_tokens, dtype=torch.int64)
        rows = []
        for row, length in zip(tokens.cpu(), lengths.tolist(), strict=True):
            inside = torch.isin(row[:length], placeholders)
            edges = torch.diff(inside.to(torch.int8), prepend=torch.zeros(1), append=torch.zeros(1))
            starts = torch.nonzero(edges == 1)[:, 0].tolist()
            ends = torch.nonzero(edges == -1)[:, 0].tolist()
            rows.append([Span(start, end - start) for start, end in zip(starts, ends, strict=True)])
        return rows

    def verify(self, tree: DraftTree, positions: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
        """Reads all nodes of a tree in one pass of the model's own decoder.

        Shapes: `positions` [B] int64, the rotary position of each root. Returns logits [B, T, V] and features
        [B, T, C]. The nodes' keys and values are left behind the committed slots, for `cache.commit` to keep or
        forget.
        """
        nodes = tree.size
        if nodes > self.most_nodes:
            raise ValueError(f"target: a tree must have at most {self.most_nodes} nodes, got {nodes}")
        exact_nodes = nodes if self.row_exact else 0
        if exact_nodes:
            tree = tree.padded(self.pass_rows(nodes))
        features = self._features(tree, positions, cache, exact_nodes)
        return self.head(features)[:, :nodes], features[:, :nodes]

    def _features(self, tree: DraftTree, positions: Tensor, cache: KeyValueCache, exact_nodes: int) -> Tensor:
        """The pass itself: the decoder's output [B, T, C]. `exact_nodes` as for `FusedDecoder`."""
        node_positions = positions[:, None] + tree.depths
        if self.max_positions is not None:
            # Nodes past the model's last position can never be emitted, but a table look-up must not fail.
            node_positions = node_positions.clamp(max=self.max_positions - 1)
        position_ids = self.verify_positions(node_positions)
        cache.begin(tree.size)
        fused = self._fused(cache)
        if fused is not None:
            return fused(tree.tokens, position_ids, tree.ancestors, cache, exact_nodes=exact_nodes)
        dense = self.needs_mask and not exact_nodes
        tree_pass = TreePass(cache, tree, self.dtype, dense=dense, exact_nodes=exact_nodes)
        with attention_of(self.decoder.config, tree_pass):
            output = self.decoder(
                input_ids=tree.tokens,
                attention_mask=tree_pass.mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        self.needs_mask = len(tree_pass.served) < len(cache.keys)
        if self.row_exact and self.needs_mask:
            raise ValueError(
                f'target: exact="self" needs layers of plain softmax attention over the cache, got '
                f"{len(cache.keys) - len(tree_pass.served)} others of {len(cache.keys)} in {type(self.model).__name__}"
            )
        return output.last_hidden_state

    def _fused(self, cache: KeyValueCache) -> FusedDecoder | None:
        """The decoder with our ops between its products, where they are native and nobody has altered it."""
        if not ops.serves_layers(cache.keys[0]):
            return None
        known = self._fused_decoder
        if known is _UNKNOWN or (known is not None and known.is_altered):
            self._fused_decoder = FusedDecoder.of(self.decoder)
        return self._fused_decoder

    @contextmanager
    def _capture(self, captured: Captured) -> Iterator[None]:
        """Notes what the decoder reads and writes while the block runs; the hooks go with it."""

        def before(module: object, args: tuple, kwargs: dict) -> None:
            embeddings = kwargs.get("inputs_embeds")
            captured.embeddings = self.embedding(kwargs["input_ids"]) if embeddings is None else embeddings
            captured.positions = kwargs.get("position_ids")

        def after(module: object, args: tuple, kwargs: dict, output: object) -> None:
            captured.features = output.last_hidden_state

        handles = [
            self.decoder.register_forward_pre_hook(before, with_kwargs=True),
            self.decoder.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The module that turns embeddings into features: the language model inside a VLM, the base of a causal LM."""
    base = getattr(model, model.base_model_prefix, model)
    inner = getattr(base, "language_model", None) or getattr(model, "language_model", None)
    decoder = inner if inner is not None else base
    # Some families hold a whole causal LM there, head included.
    return getattr(decoder, "model", decoder)


def _refuse_logit_transforms(config: object) -> None:
    for name, neutral in LOGIT_TRANSFORMS.items():
        value = getattr(config, name, neutral)
        if value is not None and value != neutral:
            raise ValueError(f"target: {name} must be {neutral}, got {value}: logits after lm_head are not supported")


def _refuse_unsupported_cache(config: object) -> None:
    """Layers must keep every key and value: a window or a recurrent state cannot take back rejected tokens."""
    kinds = sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers} - {"DynamicLayer"})
    if kinds:
        raise ValueError(
            f"target: every layer must keep all keys and values, got {', '.join(kinds)} "
            "(sliding-window, chunked and recurrent caches are not supported)"
        )


def _refuse_linear_biases(config: object) -> None:
    """ALiBi derives its biases from a two-dimensional mask, which cannot say what a tree's node sees."""
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise ValueError(f"target: attention with linear biases (ALiBi) is not supported, got {config.model_type}")


def _next_positions(positions: Tensor | None, keep: Tensor, lengths: Tensor) -> Tensor:
    """One more than the largest rotary position of each row's own tokens, [B]."""
    if positions is None:
        return lengths.clone()
    if positions.ndim == 3:
        positions = positions[-3:].amax(0)
    return positions.masked_fill(~keep, -1).amax(1) + 1

"""The ViSpec draft: one decoder layer on the target's features, with a vision adaptor.

Source: ViSpec (arXiv 2509.15235), sections 3.1 to 3.3. Without the adaptor it is EAGLE's draft (arXiv 2401.15077).
Dimension letters: B rows, S prompt tokens, M draft rows, C hidden units, H heads, D head width, N image rows,
P pieces of them, Q adaptor queries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vispec import ops
from vispec.cache import KeyValueCache
from vispec.drafts.base import check_sizes
from vispec.drafts.files import write_draft
from vispec.drafts.session import DraftRuntime, ViSpecSession
from vispec.drafts.weights import check_format
from vispec.prompt import Prompt, Span
from vispec.targets import Target, load_target
from vispec.tree import seen_slots


@dataclass(frozen=True)
class ViSpecDraftConfig:
    """Sizes of a draft; `num_queries` 0 means no adaptor (EAGLE: image tokens go into the draft one by one).

    `num_key_value_heads` None means full multi-head attention, as all ViSpec drafts have. For comparison: without
    `global_feature` later text knows a picture by its compressed rows alone; without `picture_rows`, and without an
    adaptor, nothing of a picture goes into the draft.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    num_queries: int = 2
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    fc_bias: bool = True
    global_feature: bool = True
    picture_rows: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


class VisionAdaptor(nn.Module):
    """Compresses the N image rows of a span into Q rows by cross-attention with learned queries."""

    def __init__(self, config: ViSpecDraftConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.q = nn.Parameter(torch.randn(config.num_queries, heads, config.head_dim) * config.head_dim**-0.5)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width, bias=False)

    def absorbed_queries(self) -> Tensor:
        """The queries folded with `k_proj`: [Q * H, C] in float32.

        A key's bias adds the same number to all logits of a query and leaves the softmax as it is, so it drops out.
        """
        queries, heads, width = self.q.shape
        keys = self.k_proj.weight.float().view(heads, width, -1)
        folded = torch.einsum("qhd,hdc->qhc", self.q.float(), keys) * width**-0.5
        return folded.reshape(queries * heads, -1)

    def forward(self, rows: Tensor) -> Tensor:
        """[N, C] image rows to [Q, C], in the absorbed form: no image row is ever projected. Gradients flow through."""
        return self.project(ops.attend(self.absorbed_queries().to(rows.dtype), rows)[None])[0]

    def compress(self, rows: Tensor, pieces: Sequence[tuple[int, int]], absorbed: Tensor) -> Tensor:
        """`forward` over P pieces of [N, C] rows at once: [P, Q, C], without gradients.

        `pieces` are (start, length); `absorbed` is `absorbed_queries()` in the rows' dtype.
        """
        starts, lengths = torch.tensor(pieces, device=rows.device).T.contiguous()
        context = rows.new_empty(len(pieces), *absorbed.shape)
        ops.adaptor(absorbed, rows, starts, lengths, output=context)
        return self.project(context)

    def project(self, context: Tensor) -> Tensor:
        """Mixed image rows [P, Q * H, C] to outputs [P, Q, C]: every head's value projection, then `o_proj`."""
        queries, heads, width = self.q.shape
        values = self.v_proj.weight.view(heads, width, -1)
        mixed = torch.einsum("pqhc,hdc->pqhd", context.unflatten(1, (queries, heads)), values).flatten(2)
        if self.v_proj.bias is not None:
            mixed = mixed + self.v_proj.bias
        return self.o_proj(mixed)


class DraftAttention(nn.Module):
    """Attention with rotary embeddings on explicit positions."""

    def __init__(self, config: ViSpecDraftConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = config.head_dim
        shared = config.key_value_heads * config.head_dim
        self.grouped = shared != width
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, shared, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, shared, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width, bias=False)

    def project(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, M, D], keys and values [B, G, M, D] of rows [B, M, C], rotated."""
        batch, rows, _ = hidden.shape

        def split(projected: Tensor) -> Tensor:
            return projected.view(batch, rows, -1, self.head_dim).transpose(1, 2)

        query = apply_rotary(split(self.q_proj(hidden)), rotary)
        return query, apply_rotary(split(self.k_proj(hidden)), rotary), split(self.v_proj(hidden))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Rows [B, M, C] that queries read from keys and values; `mask` None: causal."""
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], ancestors: Tensor | None, store: KeyValueCache | None
    ) -> Tensor:
        """Rows [B, M, C]; `ancestors` and `store` as for `ViSpecDraft.forward`."""
        query, key, value = self.project(hidden, rotary)
        if store is not None:
            key, value = store.update(key, value, 0)
        if ancestors is None:
            return self.attend(query, key, value, None)
        keys, values = store.keys[0], store.values[0]
        batch, heads, rows, width = query.shape
        if not ops.serves_tree_attention(query, keys, values):
            tail = seen_slots(ancestors, store.offset + rows)
            return self.attend(query, key, value, store.mask(tail, query.dtype))
        mixed = query.new_empty(batch, rows, heads, width)
        ops.tree_attention(
            query,
            keys,
            values,
            ancestors,
            store.lengths,
            output=mixed.transpose(1, 2),
            offset=store.offset,
        )
        return self.o_proj(mixed.flatten(2))


class DraftMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ViSpecDraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class DraftLayer(nn.Module):
    """One Llama layer without an input norm: x -> x + attention(x) -> x + mlp(rmsnorm(x))."""

    def __init__(self, config: ViSpecDraftConfig) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.mlp = DraftMLP(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], ancestors: Tensor | None, store: KeyValueCache | None
    ) -> Tensor:
        return self.finish(hidden, self.self_attn(hidden, rotary, ancestors, store))

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: both residual sums and the MLP, [B, M, C]."""
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def rotary_tables(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, M, D] for positions [B, M], each frequency twice (rotate-half)."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions[:, None, :, None].float() * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(rows: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates [B, H, M, D] by the tables of `rotary_tables`."""
    cosines, sines = rotary
    first, second = rows.chunk(2, dim=-1)
    return rows * cosines + torch.cat([-second, first], dim=-1) * sines


class ViSpecDraft(nn.Module):
    """The draft model, in the layout of published ViSpec checkpoints; shares the target's embedding and head.

    Make one with `for_target` or `vispec.load_draft`. Parameters are named as in the published files, but for
    `embed_tokens`, which belongs to the target.

    Attributes:
        weights: "int8": rounds read the layer's and the head's weights rounded to int8, in copies that are made when
            they are first needed; None: as they are. It cannot change an answer.
    """

    def __init__(self, config: ViSpecDraftConfig) -> None:
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                "draft: hidden_size must be a multiple of num_attention_heads, got "
                f"{config.hidden_size} and {config.num_attention_heads}"
            )
        if config.num_queries and not config.picture_rows:
            raise ValueError(f"draft: picture_rows must be true with an adaptor, got {config.num_queries} queries")
        self.config = config
        width = config.hidden_size
        self.fc = nn.Linear(2 * width, width, bias=config.fc_bias)
        self.img_fc = nn.Linear(2 * width, width)
        self.layers = nn.ModuleList([DraftLayer(config)])
        self.imadpt = VisionAdaptor(config) if config.num_queries else None
        # Token ids that the draft's reduced head may propose, [Vd]; empty: the whole vocabulary.
        self.register_buffer("head_tokens", torch.empty(0, dtype=torch.int64))
        self.weights: str | None = None
        self._runtime: tuple[tuple, DraftRuntime] | None = None
        self._reset_image_input()

    def _reset_image_input(self) -> None:
        """Starts `img_fc` as [I | 0]: without pictures the draft is EAGLE's."""
        with torch.no_grad():
            self.img_fc.weight.zero_()
            self.img_fc.weight[:, : self.config.hidden_size] = torch.eye(self.config.hidden_size)
            self.img_fc.bias.zero_()

    @classmethod
    def for_target(cls, model: object, num_queries: int = 2) -> ViSpecDraft:
        """Fresh weights of the right sizes for a Hugging Face model (or a `Target`), in its dtype, on its device."""
        target = load_target(model)
        text = target.text_config
        draft = cls(
            ViSpecDraftConfig(
                hidden_size=text.hidden_size,
                intermediate_size=text.intermediate_size,
                num_attention_heads=text.num_attention_heads,
                vocab_size=target.vocabulary,
                num_queries=num_queries,
                rms_norm_eps=getattr(text, "rms_norm_eps", 1e-5),
                rope_theta=1e6 if "qwen" in text.model_type else 1e4,
                qkv_bias="qwen" in text.model_type,
            )
        )
        return draft.to(device=target.device, dtype=target.dtype).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` in the published layout, less the target's embedding."""
        more = {"hidden_act": "silu", "num_hidden_layers": 1, "num_key_value_heads": self.config.key_value_heads}
        write_draft(self, folder, more)

    def check(self, target: Target) -> None:
        """Raises ValueError where the sizes are not this target's."""
        check_sizes(self.config, target)

    def combine(self, embeddings: Tensor, features: Tensor, visual: Tensor) -> Tensor:
        """The layer's input rows: x = fc([embedding of the next token ; img_fc([feature ; g])]), each [..., C]."""
        return self.fc(torch.cat([embeddings, self.img_fc(torch.cat([features, visual], -1))], -1))

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        ancestors: Tensor | None = None,
        store: KeyValueCache | None = None,
        layer: DraftLayer | None = None,
    ) -> Tensor:
        """The layer on input rows [B, M, C] at positions [B, M]: predicted features [B, M, C].

        `ancestors` [B, M, W] says in the words of `ops.tree_attention` which slots behind the committed ones each row
        reads, the last M being the rows' own (None: rows are a prompt, read causally); `store` is a `KeyValueCache`
        that has begun this pass; `layer` stands in for the draft's own.
        """
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        return (layer or self.layers[0])(hidden, rotary, ancestors, store)

    def compress(
        self, embeddings: Tensor, spans: Sequence[Span], absorbed: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Of every span of [N, C] rows the rows that replace it, and its global feature [C].

        An image gives Q - 1 rows; a video gives Q - 1 rows a frame, and the mean of the frames' global features.
        All pieces of all spans go through the adaptor at once where `absorbed` is given
        (`VisionAdaptor.absorbed_queries` in the rows' dtype); without it gradients flow through.
        """
        if self.imadpt is None or not spans:
            return []
        pieces = [piece for span in spans for piece in span.pieces()]
        if absorbed is None:
            outputs = torch.stack([self.imadpt(embeddings[start : start + length]) for start, length in pieces])
        else:
            outputs = self.imadpt.compress(embeddings, pieces, absorbed)
        frames = outputs.split([span.frames for span in spans])
        return [(output[:, :-1].flatten(0, 1), output[:, -1].mean(0)) for output in frames]

    def prompt_rows(
        self,
        embeddings: Tensor,
        features: Tensor,
        spans: list[Span],
        compressed: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The draft's input for one prompt, its spans compressed.

        Shapes: `embeddings` [n, C], row i the embedding of token i + 1 (the last one the first sampled token's);
        `features` [n, C], row i the target's feature of token i; `spans` in the frame of the tokens.
        `compressed` is what `compress` made of the spans less the prompt's first token, when it has run before.
        Returns: rows [M, C], their positions [M] int64 (indices into the uncompressed sequence), and the global
        feature [C] that holds for all later text (zeros when there was no span).
        """
        count = embeddings.shape[0]
        positions = torch.arange(count, device=embeddings.device)
        visual = torch.zeros_like(embeddings[0])
        # Row i holds token i + 1, so in the draft's frame a span lies one to the left.
        spans = [span.without_first_token().moved(-1) for span in spans]
        if self.imadpt is None and self.config.picture_rows:
            spans = []
        if compressed is None:
            compressed = self.compress(embeddings, spans)
        rows, places, cursor = [], [], 0

        def text(start: int, stop: int) -> None:
            if stop > start:
                rows.append(self.combine(embeddings[start:stop], features[start:stop], visual.expand(stop - start, -1)))
                places.append(positions[start:stop])

        for index, span in enumerate(spans):
            stop = span.start + span.length
            text(cursor, span.start)
            cursor = stop
            if self.imadpt is None:
                continue
            replacement, feature = compressed[index]
            visual = feature if self.config.global_feature else visual
            kept = min(len(replacement), span.length)
            rows.append(replacement[len(replacement) - kept :])
            places.append(positions[stop - kept : stop])
        text(cursor, count)
        return torch.cat(rows), torch.cat(places), visual

    def runtime(self, target: Target) -> DraftRuntime:
        """What follows from the present weights, computed again only after they changed."""
        check_format(self.weights)
        weights = (target.head.weight, *self.parameters())
        changes = ((id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in weights)
        version = (len(self.head_tokens), self.weights, *changes)
        if self._runtime is None or self._runtime[0] != version:
            self._runtime = (version, DraftRuntime(self, target))
        return self._runtime[1]

    def widest(self, target: Target) -> int:
        """Columns of the head; see `Draft.widest`."""
        return self.head_tokens.numel() or target.vocabulary

    def start(self, target: Target, prompt: Prompt, first_tokens: Tensor) -> ViSpecSession:
        """Reads a prefilled prompt; see `Draft.start`."""
        return ViSpecSession(self, target, prompt, first_tokens)

"""Verification through a decoder's own linear layers with our kernels between them: fewer launches, equal rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vispec import ops
from vispec.cache import KeyValueCache
from vispec.ops import Tail

# Decoders whose layers are exactly: norm, attention with rotate-half positions, norm, gated MLP. By qualified name, so
# that a subclass with another forward pass is not taken for one of them.
_MODELS = "transformers.models."
LAYERS = {
    f"{_MODELS}llama.modeling_llama.LlamaDecoderLayer",
    f"{_MODELS}mistral.modeling_mistral.MistralDecoderLayer",
    f"{_MODELS}qwen2.modeling_qwen2.Qwen2DecoderLayer",
    f"{_MODELS}qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLDecoderLayer",
}


class FusedDecoder:
    """One pass over a tree of a decoder that `of` has recognised.

    Linear layers, the embedding and the rotary tables are the model's own modules, called as they are, so adapters
    and quantised weights work. Norms, residual additions, rotation, the cache's append, attention and the gated
    activation are `ops`, in the forms that round where the model rounds. Nothing of the model is changed or copied.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        attention = decoder.layers[0].self_attn
        self.width = attention.head_dim
        self.scale = attention.scaling

    @classmethod
    def of(cls, decoder: nn.Module) -> FusedDecoder | None:
        """The fused form of a decoder, or None where anything but the known modules would be left out by it."""
        layers = getattr(decoder, "layers", ())
        if not layers or not all(_is_known(layer) for layer in layers):
            return None
        replaced = [decoder, decoder.norm, *(part for layer in layers for part in _replaced(layer))]
        dtype = decoder.embed_tokens.weight.dtype
        # Of the weights of these modules themselves, the norms have some: the ops want one dtype.
        weights = [weight for module in replaced for weight in module.parameters(recurse=False)]
        if any(map(_is_altered, replaced)) or any(weight.dtype is not dtype for weight in weights):
            return None
        return cls(decoder)

    def __call__(
        self, tokens: Tensor, positions: Tensor, ancestors: Tensor, cache: KeyValueCache, *, row_exact: bool = False
    ) -> Tensor:
        """Features [B, T, C] of nodes `tokens` [B, T], after the decoder's final norm.

        Shapes: `positions` as the decoder's rotary embedding takes them; `ancestors` [B, T, W]. The cache must have
        begun a pass over T tokens; their keys and values are left behind the committed slots. `row_exact`: attention is
        `ops.path_attention`.
        """
        decoder, layers = self.decoder, self.decoder.layers
        residual = decoder.embed_tokens(tokens)
        batch, nodes, width = residual.shape
        # Text positions have three equal components where there are three.
        cosines, sines = (
            (table[0] if table.dim() == 4 else table).expand(batch, nodes, -1).contiguous()
            for table in decoder.rotary_emb(residual, positions)
        )
        residual = residual.reshape(batch * nodes, width)
        hidden = torch.empty_like(residual)
        norm = layers[0].input_layernorm
        ops.rms_norm(residual, norm.weight, output=hidden, epsilon=norm.variance_epsilon)
        for index, layer in enumerate(layers):
            attention, mlp = layer.self_attn, layer.mlp
            queries, keys, values = (
                projection(hidden).view(batch, nodes, -1, self.width).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            mixed, tail = torch.empty_like(queries), Tail(keys, values, cosines, sines)
            stores = cache.keys[index], cache.values[index]
            if row_exact:
                turned = torch.empty_like(queries)
                ops.rope_append(queries, tail, *stores, cache.lengths, output=turned)
                ops.path_attention(turned, *stores, ancestors, cache.lengths, output=mixed, scale=self.scale)
            else:
                ops.tree_attention(
                    queries, *stores, ancestors, cache.lengths, output=mixed, scale=self.scale, tail=tail
                )
            step = attention.o_proj(mixed.transpose(1, 2).reshape(batch * nodes, -1))
            norm = layer.post_attention_layernorm
            ops.rms_norm(step, norm.weight, output=hidden, epsilon=norm.variance_epsilon, residual=residual)
            gate = mlp.gate_proj(hidden)
            ops.silu_mul(gate, mlp.up_proj(hidden), output=gate)
            step = mlp.down_proj(gate)
            norm = layers[index + 1].input_layernorm if index + 1 < len(layers) else decoder.norm
            ops.rms_norm(step, norm.weight, output=hidden, epsilon=norm.variance_epsilon, residual=residual)
        return hidden.view(batch, nodes, width)


def _is_known(layer: nn.Module) -> bool:
    kind = type(layer)
    if f"{kind.__module__}.{kind.__qualname__}" not in LAYERS:
        return False
    attention = layer.self_attn
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return attention.head_dim in ops.HEADS and window is None and layer.mlp.config.hidden_act == "silu"


def _replaced(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of a layer whose own forward pass is not called."""
    return (
        layer,
        layer.self_attn,
        layer.mlp,
        layer.mlp.act_fn,
        layer.input_layernorm,
        layer.post_attention_layernorm,
    )


def _is_altered(module: nn.Module) -> bool:
    """Whether someone has hooked into a module, given this one object another forward pass, or put in one of theirs."""
    foreign = not type(module).__module__.startswith(("transformers.models.", "transformers.activations"))
    return bool(foreign or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))

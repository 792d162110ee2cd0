"""Verification through a decoder's own linear layers with our kernels between them: fewer launches, equal rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vispec import ops
from vispec.cache import KeyValueCache
from vispec.ops import Tail
from vispec.targets.attention import attend_along_paths
from vispec.targets.joined import join, joined
from vispec.tree import seen_slots

# Decoders whose layers are exactly: norm, attention with rotate-half positions, norm, gated MLP. By qualified name, so
# that a subclass with another forward pass is not taken for one of them.
_MODELS = "transformers.models."
LAYERS = {
    f"{_MODELS}llama.modeling_llama.LlamaDecoderLayer",
    f"{_MODELS}mistral.modeling_mistral.MistralDecoderLayer",
    f"{_MODELS}qwen2.modeling_qwen2.Qwen2DecoderLayer",
    f"{_MODELS}qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLDecoderLayer",
}

# Parts of such a layer, and in each the linear layers that read the same rows.
QUERIES_KEYS_VALUES = ("self_attn", ("q_proj", "k_proj", "v_proj"))
GATE_UP = ("mlp", ("gate_proj", "up_proj"))


def join_projections(model: nn.Module) -> int:
    """Lays the query, key and value weights of each decoder layer, and its gate and up weights, one behind another.

    `fast_generate` then multiplies each group as one matrix wherever that is faster: on a GPU, and in 16-bit formats
    on a CPU. Nothing is kept twice. The parameters stay the same objects with the same values and shapes, but become
    views of shared memory at new addresses, which is why the owner of a model has to ask for it: whoever keeps a CUDA
    graph over the model captures it again. Converting or moving the model takes the groups apart; call this then.

    Args:
        model: a Hugging Face model. Left as they are: decoders of kinds that verification does not know layer by
            layer, and groups with a member that is more than an `nn.Linear` (an adapter, a quantised weight, a hook).

    Returns:
        The number of groups that lie together, those that already did included.
    """
    layers = filter(_is_known, model.modules())
    return sum(join(_members(layer, *group)) for layer in layers for group in (QUERIES_KEYS_VALUES, GATE_UP))


class FusedDecoder:
    """One pass over a tree of a decoder that `of` has recognised.

    Linear layers, the embedding and the rotary tables are the model's own modules, called as they are, so adapters
    and quantised weights work. Norms, residual additions, rotation, the cache's append, attention and the gated
    activation are `ops`, in the forms that round where the model rounds; where there is no kernel for attention,
    it is PyTorch's. Nothing of the model is changed or copied.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        attention = decoder.layers[0].self_attn
        self.width = attention.head_dim
        self.scale = attention.scaling
        self.products = [
            tuple(_Product(_members(layer, *group)) for group in (QUERIES_KEYS_VALUES, GATE_UP))
            for layer in decoder.layers
        ]
        whole = [linear for pair in self.products for product in pair if product.whole for linear in product.linears]
        self._not_called = [*_replaced(decoder), *whole]

    @classmethod
    def of(cls, decoder: nn.Module) -> FusedDecoder | None:
        """The fused form of a decoder, or None where anything but the known modules would be left out by it."""
        layers = getattr(decoder, "layers", ())
        if not layers or not all(map(_is_known, layers)):
            return None
        replaced = _replaced(decoder)
        dtype = decoder.embed_tokens.weight.dtype
        # Of the weights of these modules themselves, the norms have some: the ops want one dtype.
        weights = [weight for module in replaced for weight in module.parameters(recurse=False)]
        if any(map(_is_altered, replaced)) or any(weight.dtype is not dtype for weight in weights):
            return None
        return cls(decoder)

    @property
    def is_altered(self) -> bool:
        """Whether someone has since hooked into a module whose own forward pass is left out, or given it another."""
        return any(map(_has_hooks, self._not_called))

    def __call__(
        self, tokens: Tensor, positions: Tensor, ancestors: Tensor, cache: KeyValueCache, *, exact_nodes: int = 0
    ) -> Tensor:
        """Features [B, T, C] of nodes `tokens` [B, T], after the decoder's final norm.

        Shapes: `positions` as the decoder's rotary embedding takes them; `ancestors` [B, T, W]. The cache must have
        begun a pass over T tokens; their keys and values are left behind the committed slots. `exact_nodes`: of so many
        nodes attention is `ops.path_attention`, the others are padding; 0: no such pass.
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
        slots = cache.keys[0], cache.values[0]
        in_kernel = exact_nodes or ops.serves_tree_attention(slots[0][:, :, :1], *slots)
        mask = None if in_kernel else cache.mask(seen_slots(ancestors, nodes), residual.dtype)
        norm = layers[0].input_layernorm
        ops.rms_norm(residual, norm.weight, output=hidden, epsilon=norm.variance_epsilon)
        for index, layer in enumerate(layers):
            to_heads, to_units = self.products[index]
            queries, keys, values = (
                rows.view(batch, nodes, -1, self.width).transpose(1, 2) for rows in to_heads(hidden)
            )
            tail, stores = Tail(keys, values, cosines, sines), (cache.keys[index], cache.values[index])
            if in_kernel and not exact_nodes:
                # As the output projection reads it.
                mixed = queries.new_empty(batch, nodes, queries.shape[1], self.width).transpose(1, 2)
                ops.tree_attention(
                    queries, *stores, ancestors, cache.lengths, output=mixed, scale=self.scale, tail=tail
                )
            else:
                turned = torch.empty_like(queries)
                ops.rope_append(queries, tail, *stores, cache.lengths, output=turned)
                mixed = self._attend(turned, cache, index, ancestors, mask, exact_nodes)
            step = layer.self_attn.o_proj(mixed.transpose(1, 2).reshape(batch * nodes, -1))
            norm = layer.post_attention_layernorm
            ops.rms_norm(step, norm.weight, output=hidden, epsilon=norm.variance_epsilon, residual=residual)
            gate, up = to_units(hidden)
            units = torch.empty_like(gate)
            ops.silu_mul(gate, up, output=units)
            step = layer.mlp.down_proj(units)
            norm = layers[index + 1].input_layernorm if index + 1 < len(layers) else decoder.norm
            ops.rms_norm(step, norm.weight, output=hidden, epsilon=norm.variance_epsilon, residual=residual)
        return hidden.view(batch, nodes, width)

    def _attend(
        self,
        queries: Tensor,
        cache: KeyValueCache,
        layer: int,
        ancestors: Tensor,
        mask: Tensor | None,
        exact_nodes: int,
    ) -> Tensor:
        """Attention [B, H, T, D] of rotated queries where the cache already holds the nodes' own keys and values."""
        if exact_nodes:
            return attend_along_paths(queries, cache, layer, ancestors, exact_nodes, self.scale)
        keys, values = cache.used(layer)
        grouped = queries.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=grouped
        )


class _Product:
    """Linear layers that read the same rows: one product where their weights lie together and that is faster."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self.linears = linears
        self.whole = joined(linears)
        if self.whole is not None:
            weight = self.whole[0]
            self.sizes = [linear.out_features for linear in self.linears]
            # MKL's float32 products of few rows are slower with one wide matrix than with its parts.
            if weight.device.type == "cpu" and weight.dtype is torch.float32:
                self.whole = None

    def __call__(self, rows: Tensor) -> Sequence[Tensor]:
        """What each layer makes of rows [M, C]: [M, N] each, views of one tensor where there was one product."""
        if self.whole is None:
            return [linear(rows) for linear in self.linears]
        return F.linear(rows, *self.whole).split(self.sizes, dim=-1)


def _members(layer: nn.Module, part: str, names: Sequence[str]) -> list[nn.Module]:
    return [getattr(getattr(layer, part), name) for name in names]


def _is_known(layer: nn.Module) -> bool:
    kind = type(layer)
    if f"{kind.__module__}.{kind.__qualname__}" not in LAYERS:
        return False
    attention = layer.self_attn
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return window is None and layer.mlp.config.hidden_act == "silu"


def _replaced(decoder: nn.Module) -> list[nn.Module]:
    """The modules of a known decoder whose own forward pass is not called."""
    replaced = [decoder, decoder.norm]
    for layer in decoder.layers:
        replaced += [layer, layer.self_attn, layer.mlp, layer.mlp.act_fn]
        replaced += [layer.input_layernorm, layer.post_attention_layernorm]
    return replaced


def _is_altered(module: nn.Module) -> bool:
    """Whether someone has hooked into a module, given this one object another forward pass, or put in one of theirs."""
    foreign = not type(module).__module__.startswith(("transformers.models.", "transformers.activations"))
    return foreign or _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))

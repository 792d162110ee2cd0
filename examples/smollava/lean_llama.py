"""The language model's forward pass, laid out for fast training on one core.

Query, key and value share one matrix, and so do gate and up; each matrix carries a LoRA pair.
The published weights stay frozen in bfloat16, what is trained is float32.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig

GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Apply the root mean square norm, in float32 inside."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Apply rotate-half rotary positions."""
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-right, left], dim=-1) * sine


def _adapted(x: torch.Tensor, frozen: torch.Tensor, pair: tuple | None) -> torch.Tensor:
    y = F.linear(x, frozen)
    if pair is not None:
        down, up = pair
        narrow = F.linear(x, down.to(x.dtype)).flatten(0, -2)
        y = torch.addmm(y.flatten(0, -2), narrow, up.to(x.dtype).t()).view(y.shape)
    return y


def gated(x: torch.Tensor) -> torch.Tensor:
    """Gate one half of the channels with the other."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# Fusing only the elementwise parts gains a quarter; fusing whole layers gains nothing more.
normalise = torch.compile(normalise, dynamic=True)
rotate = torch.compile(rotate, dynamic=True)
gated = torch.compile(gated, dynamic=True)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend causally with grouped keys; q [B, H, S, D], k and v [B, G, S, D].

    Notes: as plain matrix products, since on a CPU with AMX the backward pass of torch's fused
    attention takes four times as long (34 against 9 ms for 4 sequences of 384).
    """
    batch, heads, length, size = q.shape
    repeats = heads // k.shape[1]
    flat = (batch * heads, length, size)
    k = k.repeat_interleave(repeats, dim=1).reshape(flat)
    v = v.repeat_interleave(repeats, dim=1).reshape(flat)
    mask = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1)
    scores = torch.baddbmm(mask, q.reshape(flat), k.transpose(1, 2), alpha=size**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(q.shape)


def layer_forward(x, cosine, sine, frozen, pairs, heads, groups, eps):
    """Run one decoder layer over [B, S, C] with a causal mask and no cache."""
    batch, length, width = x.shape
    size = width // heads
    y = _adapted(normalise(x, frozen["norm1"], eps), frozen["qkv"], pairs.get("qkv"))
    q, k, v = y.split([width, groups * size, groups * size], dim=-1)
    q = rotate(q.view(batch, length, heads, size).transpose(1, 2), cosine, sine)
    k = rotate(k.view(batch, length, groups, size).transpose(1, 2), cosine, sine)
    v = v.view(batch, length, groups, size).transpose(1, 2)
    y = causal_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
    x = x + _adapted(y, frozen["out"], pairs.get("out"))
    y = _adapted(normalise(x, frozen["norm2"], eps), frozen["gate_up"], pairs.get("gate_up"))
    return x + _adapted(gated(y), frozen["down"], pairs.get("down"))


class LeanLlama(nn.Module):
    """A frozen Llama with trainable LoRA pairs.

    `state` holds the weights by the names of `LlamaModel`. Rank 0 makes no LoRA pairs.
    """

    def __init__(self, config: LlamaConfig, state: dict[str, torch.Tensor], rank: int) -> None:
        super().__init__()
        self.config = config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.embedding = state["embed_tokens.weight"].bfloat16()
        self.final_norm = state["norm.weight"].bfloat16()
        self.frozen, self.pairs = [], nn.ModuleList()
        for index in range(config.num_hidden_layers):
            stem = f"layers.{index}."
            weights = {
                group: torch.cat([state[f"{stem}{name}.weight"] for name in names]).bfloat16()
                for group, names in GROUPS.items()
            }
            weights["norm1"] = state[f"{stem}input_layernorm.weight"].bfloat16()
            weights["norm2"] = state[f"{stem}post_attention_layernorm.weight"].bfloat16()
            self.frozen.append(weights)
            pairs = nn.ModuleDict()
            for group in GROUPS if rank else ():
                outside, inside = weights[group].shape
                down = nn.Parameter(torch.randn(rank, inside) / inside**0.5)
                pairs[group] = nn.ParameterList([down, nn.Parameter(torch.zeros(outside, rank))])
            self.pairs.append(pairs)
        size = config.hidden_size // self.heads
        theta = config.rope_parameters["rope_theta"]
        self.rates = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Turn embeddings [B, S, C] bfloat16 into features (after the final norm)."""
        angles = torch.arange(embeddings.shape[1], dtype=torch.float32)[:, None] * self.rates
        angles = torch.cat([angles, angles], dim=-1)
        cosine, sine = angles.cos().bfloat16(), angles.sin().bfloat16()
        x, eps = embeddings, self.config.rms_norm_eps
        for frozen, pairs in zip(self.frozen, self.pairs, strict=True):
            pairs = {group: tuple(pair) for group, pair in pairs.items()}
            x = layer_forward(x, cosine, sine, frozen, pairs, self.heads, self.groups, eps)
        return normalise(x, self.final_norm, eps)

    def lora_state(self) -> dict[str, torch.Tensor]:
        """List the LoRA pairs by the published layer names, bfloat16."""
        listed = {}
        for index, pairs in enumerate(self.pairs):
            for group, (down, up) in pairs.items():
                names = GROUPS[group]
                sizes = self.group_sizes(group)
                for name, part in zip(names, up.detach().split(sizes), strict=True):
                    stem = f"layers.{index}.{name}"
                    listed[f"{stem}.lora_a"] = down.detach().bfloat16().clone()
                    listed[f"{stem}.lora_b"] = part.bfloat16().clone()
        return listed

    def group_sizes(self, group: str) -> list[int]:
        """Tell how many output rows each matrix of a group has."""
        width, size = self.config.hidden_size, self.config.hidden_size // self.heads
        return {
            "qkv": [width, self.groups * size, self.groups * size],
            "out": [width],
            "gate_up": [self.config.intermediate_size] * 2,
            "down": [width],
        }[group]

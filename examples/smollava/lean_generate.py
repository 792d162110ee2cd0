"""Writes answers in batches, and keeps the features that the language model computes meanwhile."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from lean_llama import LeanLlama, gated, normalise, rotate

PREFILL_ROWS = 8
SAMPLED_FROM = 64


LOOPING = 0.35  # share of repeated 4-grams in the last 32 tokens


def repeated(tokens: list[int]) -> float:
    """Tell which share of a text's 4-grams occurred before in it."""
    grams = list(zip(*(tokens[shift:] for shift in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Written(NamedTuple):
    """One answer: its tokens (end included when it ended), and the feature that led to each."""

    tokens: torch.Tensor
    features: torch.Tensor
    prompt_features: torch.Tensor


class LeanGenerator:
    """Generates for prompts of equal length, so that nothing is padded or masked.

    Notes: the weights are packed once for oneDNN, which otherwise packs them at each of the small
    products of a decoding step.
    """

    def __init__(self, language: LeanLlama) -> None:
        self.language = language
        self.packed = [
            {
                name: torch.ops.mkldnn._reorder_linear_weight(weights[name], 64)
                for name in ("qkv", "out", "gate_up", "down")
            }
            for weights in language.frozen
        ]
        self.head = torch.ops.mkldnn._reorder_linear_weight(language.embedding, 64)

    def _linear(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        flat = torch.ops.mkldnn._linear_pointwise(flat, packed, None, "none", [], "")
        return flat.view(*x.shape[:-1], -1)

    def _forward(self, x: torch.Tensor, start: int, caches: list) -> torch.Tensor:
        """Run rows [B, S, C] at positions from `start` on; they enter the caches."""
        language = self.language
        config, heads, groups = language.config, language.heads, language.groups
        batch, length, width = x.shape
        size, stop = width // heads, start + length
        angles = torch.arange(start, stop, dtype=torch.float32)[:, None] * language.rates
        angles = torch.cat([angles, angles], dim=-1)
        cosine, sine = angles.cos().bfloat16(), angles.sin().bfloat16()
        # `is_causal` would align the mask with the first key, not with the last.
        mask = None
        if start and length > 1:
            mask = torch.full((length, stop), float("-inf"), dtype=x.dtype).triu(start + 1)
        for frozen, packed, (keys, values) in zip(language.frozen, self.packed, caches, strict=True):
            y = self._linear(normalise(x, frozen["norm1"], config.rms_norm_eps), packed["qkv"])
            q, k, v = y.split([width, groups * size, groups * size], dim=-1)
            q = rotate(q.view(batch, length, heads, size).transpose(1, 2), cosine, sine)
            k = rotate(k.view(batch, length, groups, size).transpose(1, 2), cosine, sine)
            keys[:, :, start:stop] = k
            values[:, :, start:stop] = v.view(batch, length, groups, size).transpose(1, 2)
            y = F.scaled_dot_product_attention(
                q,
                keys[:, :, :stop],
                values[:, :, :stop],
                attn_mask=mask,
                is_causal=length > 1 and mask is None,
                enable_gqa=True,
            )
            x = x + self._linear(y.transpose(1, 2).reshape(batch, length, width), packed["out"])
            y = self._linear(normalise(x, frozen["norm2"], config.rms_norm_eps), packed["gate_up"])
            x = x + self._linear(gated(y), packed["down"])
        return normalise(x, language.final_norm, config.rms_norm_eps)

    def prefill(self, embeddings: torch.Tensor, repeats: int, room: int) -> tuple:
        """Read prompt beginnings [P, S, C] into caches with `room` places for P * repeats rows.

        Returns: the features [P * repeats, S, C] and the caches; row r continues beginning
        r // repeats.
        """
        count, length, width = embeddings.shape
        language, parts = self.language, []
        shape = (count * repeats, language.groups, room, width // language.heads)
        caches = [
            (torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16))
            for _ in language.frozen
        ]
        small = (PREFILL_ROWS, language.groups, length, width // language.heads)
        for first in range(0, count, PREFILL_ROWS):
            rows = embeddings[first : first + PREFILL_ROWS]
            fresh = [
                (torch.zeros(small, dtype=torch.bfloat16), torch.zeros(small, dtype=torch.bfloat16))
                for _ in language.frozen
            ]
            fresh = [(keys[: len(rows)], values[: len(rows)]) for keys, values in fresh]
            parts.append(self._forward(rows, 0, fresh))
            part = slice(first * repeats, (first + len(rows)) * repeats)
            for cache, new in zip(caches, fresh, strict=True):
                for whole, piece in zip(cache, new, strict=True):
                    whole[part, :, :length] = piece.repeat_interleave(repeats, 0)
        return torch.cat(parts).repeat_interleave(repeats, 0), caches

    @torch.inference_mode()
    def generate(
        self,
        beginnings: torch.Tensor,
        questions: torch.Tensor,
        temperatures: torch.Tensor,
        max_new_tokens: int,
        generator: torch.Generator,
    ) -> list[Written]:
        """Write answers, several behind each beginning of a prompt.

        Shapes: beginnings [P, S, C] embeddings; questions [B, T] token ids with B a multiple of P;
        temperatures [B], 0 takes the likeliest token.
        """
        rows, end = len(questions), self.language.config.eos_token_id
        repeats, start = rows // len(beginnings), beginnings.shape[1]
        length = start + questions.shape[1]
        first, caches = self.prefill(beginnings, repeats, length + max_new_tokens)
        second = self._forward(F.embedding(questions, self.language.embedding), start, caches)
        prompt_features = torch.cat([first, second], 1)
        features = second[:, -1]
        tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long)
        kept = torch.zeros(rows, max_new_tokens, features.shape[-1], dtype=torch.bfloat16)
        counts = torch.full((rows,), max_new_tokens)
        active = torch.arange(rows)
        for step in range(max_new_tokens):
            logits = self._linear(features, self.head)
            chosen = _choose(logits, temperatures[active], generator)
            tokens[active, step] = chosen
            kept[active, step] = features
            ended = chosen == end
            if step % 16 == 15 and step > 40:
                # An answer that has begun to loop is of no use, and would hold up the others.
                recent = tokens[active, step - 31 : step + 1].tolist()
                ended |= torch.tensor([repeated(row) > LOOPING for row in recent])
            counts[active[ended]] = step + 1
            alive = (~ended).nonzero()[:, 0]
            if len(alive) == 0 or step + 1 == max_new_tokens:
                break
            if len(alive) < len(active):
                # Take ended answers out of the batch; most of a step is reading the caches.
                active, chosen = active[alive], chosen[alive]
                caches = [_shrink(cache, alive, length + step) for cache in caches]
            x = F.embedding(chosen, self.language.embedding)[:, None]
            features = self._forward(x, length + step, caches)[:, 0]
        return [
            Written(tokens[row, :count], kept[row, :count], prompt_features[row])
            for row, count in enumerate(counts.tolist())
        ]


def _choose(logits: torch.Tensor, temperatures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Take the likeliest token where the temperature is 0, else draw from the likeliest 64."""
    chosen = logits.argmax(-1)
    hot = temperatures > 0
    if hot.any():
        values, indices = logits[hot].topk(SAMPLED_FROM)
        chances = (values.float() / temperatures[hot, None]).softmax(-1)
        drawn = torch.multinomial(chances, 1, generator=generator)
        chosen[hot] = indices.gather(1, drawn)[:, 0]
    return chosen


def _shrink(cache: tuple, alive: torch.Tensor, stop: int) -> tuple:
    for whole in cache:
        whole[: len(alive), :, :stop] = whole[alive, :, :stop]
    return tuple(whole[: len(alive)] for whole in cache)

"""Attention of 30 or 60 tree nodes, and of 1 as in plain decoding, over the cache of one layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.ops.accept import tree
from benchmarks.ops.case import Baseline, Case, Problem, compiled, eager_and_compiled, largest_error, require, same
from benchmarks.ops.rope_append import rotated
from vispec import ops

BEHIND = 1000.0  # fills slots that nobody may see


def plain(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Products, mask and softmax as Hugging Face's models write them out; in float64 if the queries are."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = (queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(queries.dtype, torch.float32))
    return weights.to(queries.dtype) @ values


def sdpa(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    return scaled_dot_product_attention(
        queries, keys, values, attn_mask=visible, enable_gqa=queries.shape[1] != keys.shape[1]
    )


def exactly(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """`plain` in float64, a group of heads at a time: the scores of all would take gigabytes."""
    groups = zip(queries.chunk(keys.shape[1], dim=1), keys.split(1, dim=1), values.split(1, dim=1), strict=True)
    return torch.cat([plain(*(part.double() for part in group), visible) for group in groups], dim=1)


def ancestor_words(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Of parents [T]: whether node j is n or one of its ancestors [T, T], and the same as words [T, W]."""
    lines: list[list[int]] = []
    for node, parent in enumerate(parents.tolist()):
        lines.append([*(lines[parent] if parent >= 0 else []), node])
    T = len(lines)
    words = torch.zeros(T, (T + 63) // 64, dtype=torch.int64)
    seen = torch.zeros(T, T, dtype=torch.bool)
    for node, line in enumerate(lines):
        seen[node, line] = True
        for other in line:
            words[node, other // 64] |= torch.tensor(1, dtype=torch.int64) << other % 64
    return seen.to(parents.device), words.to(parents.device)


def make(device: torch.device, generator: torch.Generator, *, T: int, L: int, H: int, G: int, head: int) -> Problem:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    _, parents = tree(T, 8, 5, 32000, generator)
    tail, words = ancestor_words(parents)
    queries = random(1, H, T, head)
    # A cache with room beyond the tail, whose content must not be seen.
    keys, values = (random(1, G, L + T + 40, head) for _ in range(2))
    keys[:, :, L + T :], values[:, :, L + T :] = torch.nan, torch.nan
    lengths = torch.tensor([L], device=device)
    written = torch.zeros(1, H, T, head, dtype=torch.bfloat16, device=device)

    visible = torch.ones(T, L + T, dtype=torch.bool, device=device)
    visible[:, L:] = tail
    seen_keys, seen_values = keys[:, :, : L + T], values[:, :, : L + T]
    dense = (queries, seen_keys, seen_values, visible)
    exact = exactly(*dense)

    def error_of(answer: Tensor) -> float:
        return largest_error(answer, exact)

    return Problem(
        run=lambda: ops.tree_attention(queries, keys, values, words[None], lengths, output=written),
        outputs=[written],
        error=lambda: error_of(written),
        error_bound=2 * error_of(plain(*dense)),
        bytes_moved=2 * (2 * queries.numel() + 2 * seen_keys.numel()) + words.nbytes,
        operations=4 * H * T * (L + T) * head,
        baselines=[
            *eager_and_compiled("PyTorch", plain, dense, error_of),
            Baseline("SDPA, dense mask", lambda: lambda: sdpa(*dense), error_of),
            Baseline("FlexAttention", partial(_flex, *dense, words, L), error_of, compiles=True),
            Baseline("FlashInfer, dense mask", partial(_flashinfer, *dense), error_of, compiles=True),
        ],
    )


def biased(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else rows + bias.view(-1, 1, rows.shape[-1])


def plain_with_tail(
    queries: Tensor, tail: ops.Tail, keys: Tensor, values: Tensor, slots: Tensor, visible: Tensor
) -> Tensor:
    """Biases, rotation, the caches' update at slots on the device, and `plain` over all visible slots."""
    tables = tail.cosines, tail.sines
    keys.index_copy_(2, slots, rotated(biased(tail.keys, tail.key_bias), *tables))
    values.index_copy_(2, slots, biased(tail.values, tail.value_bias))
    end = visible.shape[1]
    return plain(rotated(biased(queries, tail.query_bias), *tables), keys[:, :, :end], values[:, :, :end], visible)


def make_with_tail(
    device: torch.device, generator: torch.Generator, *, T: int, L: int, H: int, G: int, head: int, biases: bool
) -> Problem:
    """As a layer calls it: projections in, with their biases; rotation and append on the way to the answer."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    _, parents = tree(T, 8, 5, 32000, generator)
    seen, words = ancestor_words(parents)
    projected = random(1, T, H + 2 * G, head).transpose(1, 2)
    queries, new_keys, new_values = projected.split([H, G, G], dim=1)
    angles = 100 * torch.rand(1, T, head // 2, generator=generator, device=device).repeat(1, 1, 2)
    bias = (random(H * head), random(G * head), random(G * head)) if biases else (None, None, None)
    tail = ops.Tail(new_keys, new_values, angles.cos().bfloat16(), angles.sin().bfloat16(), *bias)
    keys, values = (random(1, G, L + T + 40, head) for _ in range(2))
    lengths, slots = torch.tensor([L], device=device), L + torch.arange(T, device=device)
    written, apart = (torch.zeros(1, H, T, head, dtype=torch.bfloat16, device=device) for _ in range(2))
    turned = torch.empty_like(apart)
    visible = torch.ones(T, L + T, dtype=torch.bool, device=device)
    visible[:, L:] = seen

    def restore() -> None:
        """Only what an answer appends may be seen of the slots behind the committed ones."""
        for cache in (keys, values):
            cache[:, :, L:] = BEHIND
            cache[:, :, slots] = torch.nan
        written.fill_(torch.nan)

    def unfused() -> Tensor:
        ops.rope_append(queries, tail, keys, values, lengths, output=turned)
        ops.tree_attention(turned, keys, values, words[None], lengths, output=apart)
        return apart

    exact_tail = tail._replace(**{name: part.double() for name, part in tail._asdict().items() if part is not None})
    before = keys[:, :, :L].clone(), values[:, :, :L].clone()
    exact_caches = keys.double(), values.double()
    exact = plain_with_tail(queries.double(), exact_tail, *exact_caches, slots, visible)
    arguments = (queries, tail, keys, values, slots, visible)

    def error_of(answer: Tensor) -> float:
        for name, cache, old in (("keys", keys, before[0]), ("values", values, before[1])):
            same(f"committed {name}", cache[:, :, :L], old)
            same(f"{name} behind the tail", cache[:, :, L + T :], torch.full_like(cache[:, :, L + T :], BEHIND))
        same("appended values", values[:, :, slots], biased(tail.values, tail.value_bias))
        new = exact_caches[0][:, :, slots]
        # The bias, two products and their sum, each rounded by 2^-9 of itself at most.
        require(largest_error(keys[:, :, slots], new), 2**-6 * float(new.abs().max()))
        return largest_error(answer, exact)

    restore()
    own_error = error_of(plain_with_tail(*arguments))
    moved = 2 * (queries.nbytes + 2 * new_keys.nbytes) + words.nbytes  # read and written once each
    moved += sum(part.nbytes for part in tail[2:] if part is not None) + 2 * keys[:, :, :L].nbytes
    return Problem(
        run=lambda: ops.tree_attention(queries, keys, values, words[None], lengths, output=written, tail=tail),
        outputs=[written, keys, values],
        error=lambda: error_of(written),
        error_bound=2 * own_error,
        bytes_moved=moved,
        operations=4 * H * T * (L + T) * head,
        baselines=[
            Baseline("rope_append, then without a tail", lambda: unfused, error_of),
            *eager_and_compiled("PyTorch", plain_with_tail, arguments, error_of),
        ],
        restore=restore,
    )


def _flex(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, words: Tensor, L: int) -> Callable[[], Any]:
    """FlexAttention with the same words as a mask function; its block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        node = (slot - L).clamp(min=0)
        return (slot < L) | ((words[row, node // 64] >> (node % 64)) & 1 == 1)

    mask = create_block_mask(sees, None, None, *visible.shape, device=str(queries.device))
    attention = compiled(flex_attention)
    grouped = queries.shape[1] != keys.shape[1]
    return lambda: attention(queries, keys, values, block_mask=mask, enable_gqa=grouped)


def _flashinfer(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Callable[[], Any]:
    from flashinfer import single_prefill_with_kv_cache

    rows, keys, values = queries[0].transpose(0, 1).contiguous(), keys[0].contiguous(), values[0].contiguous()
    attention = partial(single_prefill_with_kv_cache, custom_mask=visible, kv_layout="HND")
    return lambda: attention(rows, keys, values).transpose(0, 1)[None]


def _case(name: str, T: int, L: int, H: int, G: int, target_microseconds: float | None = None) -> Case:
    sizes = {"T": T, "L": L, "H": H, "G": G, "head": 128}
    return Case("tree_attention", f"{name}, T={T}, L={L}", make, sizes, _small(T, H == G), True, target_microseconds)


def _case_with_tail(name: str, T: int, L: int, H: int, G: int, *, biases: bool) -> Case:
    sizes = {"T": T, "L": L, "H": H, "G": G, "head": 128, "biases": biases}
    small = _small(T, H == G) | {"biases": biases}
    return Case("tree_attention", f"{name}, T={T}, L={L}, with the tail", make_with_tail, sizes, small, True)


def _small(T: int, each_its_own: bool) -> dict[str, int]:
    """Two words of ancestors where the case has a large tree, and groups where it has them."""
    return {"T": {1: 1, 30: 13, 60: 70}[T], "L": 45, "H": 4, "G": 4 if each_its_own else 2, "head": 64}


CASES = [
    _case("LLaVA 7B", 30, 512, 32, 32, target_microseconds=6),
    _case("LLaVA 7B", 30, 2048, 32, 32, target_microseconds=15),
    _case("LLaVA 7B", 30, 4096, 32, 32, target_microseconds=28),
    _case("Qwen 7B", 30, 4096, 28, 4, target_microseconds=8),
    _case("Qwen 7B", 60, 16384, 28, 4, target_microseconds=36),
    _case("LLaVA 7B", 1, 2048, 32, 32),
    _case("Qwen 7B", 1, 4096, 28, 4),
    _case_with_tail("LLaVA 7B", 30, 2048, 32, 32, biases=False),
    _case_with_tail("Qwen 7B", 30, 4096, 28, 4, biases=True),
    _case_with_tail("Qwen 7B", 1, 4096, 28, 4, biases=True),
]

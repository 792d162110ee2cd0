"""Families that no test covers are tried once before their first answer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from vispec.targets.base import Target
from vispec.tree import DraftTree

# Model types that tests/ compare with `generate`, token for token.
TESTED = frozenset({"llama", "qwen2", "llava", "llava_next", "qwen2_5_vl", "qwen2_5_vl_text"})
TEXT, PICTURES = "a tree", "a prompt with pictures"
PROMPT_TOKENS = 6
# Rounding moves logits by far less than this share of the largest one, a wrong mask or position by far more.
SHARES = {torch.float32: 1e-3, torch.float64: 1e-6}
SHARE_OF_HALF_PRECISION = 0.05

_passed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def self_check(target: Target, inputs: Mapping[str, Tensor]) -> None:
    """Compares our logits with the model's own, once a model, for a tree and for a prompt with pictures.

    The adapter counts on conventions that hold for nearly every decoder of transformers (explicit positions, a
    four-dimensional mask, a cache that is updated layer by layer). A family that breaks one must be an error and not
    another answer. Costs three short passes on the first call, and on the first call with pictures two tokens of plain
    generation; nothing for model types in `TESTED`.

    Raises: ValueError when the logits differ by more than rounding.
    """
    types = {target.model.config.model_type, target.text_config.model_type}
    if types <= TESTED:
        return
    passed = _passed.setdefault(target.model, set())
    if TEXT not in passed:
        _compare(target, TEXT, *_tree_logits(target))
        passed.add(TEXT)
    # Plain generation does not handle padding on the right, so such a prompt has nothing to be compared with.
    comparable = bool(inputs["attention_mask"][:, -1].all())
    if PICTURES not in passed and comparable and set(inputs) > {"input_ids", "attention_mask"}:
        _compare(target, PICTURES, *_prompt_logits(target, inputs))
        passed.add(PICTURES)


def _compare(target: Target, what: str, actual: Tensor, expected: Tensor) -> None:
    limit = SHARES.get(target.dtype, SHARE_OF_HALF_PRECISION) * float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    if not difference <= limit:
        raise ValueError(
            f"target: {type(target.model).__name__} must give {what} the logits of plain decoding, "
            f"got a difference of {difference:.3g} where {limit:.3g} is rounding: not supported"
        )


def _tree_logits(target: Target) -> tuple[Tensor, Tensor]:
    """A root with two children and one grandchild behind the first, after a random prompt: [5, V] each.

    The rows are the nodes of the longer path and then those of the shorter; the other side comes from the model's own
    pass over each path, without any cache.
    """
    generator = torch.Generator().manual_seed(0)
    usable = torch.ones(target.vocabulary)
    usable[target.placeholder_tokens] = 0
    drawn = torch.multinomial(usable, PROMPT_TOKENS + 4, generator=generator).to(target.device)
    prompt, (root, child, sibling, grandchild) = drawn[:PROMPT_TOKENS], drawn[PROMPT_TOKENS:].tolist()
    read = target.prefill({"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt)[None]})

    def row(*values: int) -> Tensor:
        return torch.tensor([values], dtype=torch.int64, device=target.device)

    tree = DraftTree(
        tokens=row(root, child, sibling, grandchild),
        parents=row(-1, 0, 0, 1),
        depths=row(0, 1, 1, 2),
        ancestors=row(0b1, 0b11, 0b101, 0b1011)[:, :, None],
        scores=torch.zeros(1, 4, device=target.device),
        longest_path=3,
    )
    logits, _ = target.verify(tree, read.next_positions, read.cache)
    if not target.needs_mask:  # nor will any later pass have one
        logits, _ = target.verify(tree, read.next_positions, read.cache)
    expected = []
    for path in ((root, child, grandchild), (root, sibling)):
        tokens = torch.cat([prompt, prompt.new_tensor(path)])[None]
        output = target.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        expected.append(output.logits[0, -len(path) :].float())
    return logits[0, [0, 1, 3, 0, 2]].float(), torch.cat(expected)


def _prompt_logits(target: Target, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits of the first two new tokens, ours and those of plain generation: [2 * B, V] each."""
    plain = target.model.generate(
        **inputs,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    read = target.prefill(inputs)
    first = plain.sequences[:, inputs["input_ids"].shape[1]]
    second, _ = target.verify(DraftTree.root_only(first), read.next_positions, read.cache)
    return torch.cat([read.logits, second[:, 0]]).float(), torch.cat(plain.logits).float()

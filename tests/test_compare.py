"""The verdict on two greedy answers, and the comparison that leads to it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import vispec.compare.run
from tests import tiny
from vispec import TreeConfig, ViSpecDraft
from vispec.compare import TIE_STEPS, compare, find_difference, tie_limit

TREE = TreeConfig(depth=2, top_k=3, total_tokens=8)
# No end tokens: every answer is as long as it may be.
ENDLESS = {"eos_token_id": [tiny.VOCABULARY - 20], "pad_token_id": tiny.PAD}


def never(row: int, token: int) -> torch.Tensor:
    raise AssertionError(f"asked for logits at {row}, {token} though nothing differs")


def logits(**values: float) -> torch.Tensor:
    """[10], -5 but for the given tokens (`t3=1.0`)."""
    found = torch.full((10,), -5.0)
    for name, value in values.items():
        found[int(name[1:])] = value
    return found


def test_equal_rows_are_not_asked_about():
    assert find_difference([[1, 2], [3]], [[1, 2], [3]], never, torch.float32) is None


@pytest.mark.parametrize(
    "dtype, best, step",
    [
        (torch.bfloat16, 1.0, 2.0**-7),
        (torch.bfloat16, -17.5, 2.0**-3),
        (torch.float16, 17.5, 2.0**-6),
        (torch.float32, 17.5, 2.0**-19),
    ],
)
def test_limit_counts_steps_of_the_dtype(dtype, best, step):
    assert tie_limit(best, dtype) == TIE_STEPS[dtype] * step


def test_limit_at_zero_is_tiny():
    assert 0 < tie_limit(0.0, torch.float32) < 1e-30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("steps_from_limit, tie", [(-1, True), (0, False), (1, False)])
def test_tie_is_strictly_below_the_limit(dtype, steps_from_limit, tie):
    step = 16 * torch.finfo(dtype).eps
    second = 17.0 - (TIE_STEPS[dtype] + steps_from_limit) * step
    found = find_difference([[7, 3, 5]], [[7, 4, 5]], lambda row, token: logits(t3=17.0, t4=second), dtype)
    assert (found.row, found.token, found.plain, found.vispec) == (0, 1, 3, 4)
    assert found.tie is tie
    assert found.gap == pytest.approx(17.0 - second)


def test_a_third_token_is_no_tie():
    found = find_difference([[3]], [[5]], lambda row, token: logits(t3=1.0, t4=1.0), torch.bfloat16)
    assert not found.tie


@pytest.mark.parametrize("plain, ours", [([3, 4], [3]), ([3], [3, 4])])
def test_another_end_is_no_tie(plain, ours):
    found = find_difference([plain], [ours], never, torch.float32)
    assert (found.token, found.gap, found.tie) == (1, None, False)
    assert (found.plain is None, found.vispec is None) == (len(plain) == 1, len(ours) == 1)


def test_a_fault_in_a_later_row_outweighs_a_tie():
    tied = logits(t3=1.0, t4=1.0)
    clear = logits(t3=1.0, t4=0.5)
    found = find_difference([[3], [3]], [[4], [4]], lambda row, token: (tied, clear)[row], torch.float32)
    assert (found.row, found.tie) == (1, False)


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl"])
def test_compare_on_real_models(name):
    family = tiny.build(name)
    inputs = family.prompt(images=0 if name == "llama" else 1, seed=3)
    found = compare(
        family.model,
        ViSpecDraft.for_target(family.model),
        inputs,
        tree=TREE,
        max_new_tokens=12,
        repeats=2,
        warmup=2,
        prompt_lookup=True,
        **ENDLESS,
    )
    assert found.verdict == "identical: yes" and found.identical
    assert torch.equal(found.plain.sequences, found.vispec.sequences)
    runs = [found.plain, found.vispec]
    if name == "llama":
        assert torch.equal(found.plain.sequences, found.prompt_lookup.sequences)
        runs.append(found.prompt_lookup)
    else:
        # Where the lookup comes upon a picture's placeholders the model refuses, and says so.
        assert (found.prompt_lookup is None) == (found.prompt_lookup_error is not None)
    for run in runs:
        assert run.new_tokens == 12 and len(run.all_seconds) == 2
        assert run.seconds == min(run.all_seconds) > 0
        assert run.tokens_per_second == pytest.approx(12 / run.seconds)
    ratio = found.plain.seconds / found.vispec.seconds
    assert found.speed_up == pytest.approx(ratio)
    assert found.tokens_per_round == found.tau + 1
    json.dumps(found.as_dict())


def test_compare_takes_a_padded_batch():
    family = tiny.build("llava")
    prompts = [family.prompt(1, seed=1, text=5), family.prompt(1, seed=2, text=9)]
    found = compare(family.model, None, family.batch(prompts, "left"), max_new_tokens=8, warmup=0)
    assert found.verdict == "identical: yes"
    assert found.vispec.new_tokens == found.plain.new_tokens <= 16


def test_compare_counts_no_padding():
    family = tiny.build("llama")
    prompt = family.prompt(0, seed=1)
    free = compare(family.model, None, prompt, max_new_tokens=10, warmup=0, **ENDLESS)
    third = free.plain.sequences[0, prompt["input_ids"].shape[1] + 2].item()
    found = compare(family.model, None, prompt, max_new_tokens=10, warmup=0, eos_token_id=third)
    assert found.verdict == "identical: yes"
    assert found.plain.new_tokens == found.vispec.new_tokens <= 3


@pytest.fixture
def altered(monkeypatch):
    """Makes `fast_generate` answer another token at one place."""

    def alter(token: int, replacement: int) -> None:
        own = vispec.compare.run.fast_generate

        def other(model, draft, inputs, **options):
            result = own(model, draft, inputs, **options)
            place = inputs["input_ids"].shape[1] + token
            sequences = result.sequences.clone()
            if place < sequences.shape[1]:
                sequences[0, place] = replacement
            return SimpleNamespace(sequences=sequences, stats=result.stats)

        monkeypatch.setattr(vispec.compare.run, "fast_generate", other)

    return alter


def plain_token(family, inputs, token: int) -> int:
    start = inputs["input_ids"].shape[1]
    new = family.model.generate(**inputs, do_sample=False, max_new_tokens=token + 1, **ENDLESS)
    return new[0, start + token].item()


def twin(family, token: int) -> int:
    """Gives another token the very same logits as `token`, wherever `token` was the lower id."""
    other = next(other for other in range(token + 1, tiny.VISION_END) if other != token)
    weight = family.model.get_output_embeddings().weight
    with torch.no_grad():
        weight[other] = weight[token]
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tie_is_told_with_its_token_and_gap(altered, dtype):
    family = tiny.build("llama")
    family.model.to(dtype)
    inputs = family.prompt(0, seed=5)
    chosen = plain_token(family, inputs, 4)
    altered(4, twin(family, chosen))
    found = compare(family.model, None, inputs, max_new_tokens=8, warmup=0, **ENDLESS)
    assert found.difference.plain == chosen
    assert found.verdict == "identical: tie at token 4 (gap 0)"
    assert found.identical


def test_any_other_difference_is_a_no(altered):
    family = tiny.build("llama")
    inputs = family.prompt(0, seed=5)
    chosen = plain_token(family, inputs, 4)
    altered(4, chosen + 1)
    found = compare(family.model, None, inputs, max_new_tokens=8, warmup=0, **ENDLESS)
    assert found.verdict == "identical: no" and not found.identical
    assert (found.difference.row, found.difference.token) == (0, 4)
    assert found.difference.gap > found.difference.limit > 0
    assert json.loads(json.dumps(found.as_dict()))["difference"]["vispec"] == chosen + 1


def test_logits_processors_count_in_the_gap(altered):
    """The gap is that of the scores which plain decoding chose from, not of the raw logits."""
    family = tiny.build("llama")
    inputs = family.prompt(0, seed=5)
    chosen = plain_token(family, inputs, 0)
    options = {**ENDLESS, "suppress_tokens": [chosen]}
    start = inputs["input_ids"].shape[1]
    new = family.model.generate(**inputs, do_sample=False, max_new_tokens=1, **options)
    second = new[0, start].item()
    altered(0, chosen)
    found = compare(family.model, None, inputs, max_new_tokens=4, warmup=0, **options)
    assert found.difference.plain == second
    assert found.verdict == "identical: no"


@pytest.mark.parametrize(
    "options, message",
    [({"do_sample": True}, "do_sample must be False"), ({"repeats": 0}, "repeats must be")],
)
def test_bad_arguments(options, message):
    family = tiny.build("llama")
    with pytest.raises(ValueError, match=message):
        compare(family.model, None, family.prompt(0, 1), max_new_tokens=4, **options)

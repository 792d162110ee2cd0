"""Greedy speculation equals plain generation, token for token, in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria

import vispec
from tests import tiny
from tests.replay import ReplayDraft

NEW_TOKENS = 24
TREES = {
    "default": vispec.TreeConfig(),
    "chain": vispec.TreeConfig(depth=4, top_k=1, total_tokens=6),
    "small": vispec.TreeConfig(depth=1, top_k=3, total_tokens=5),
    "wide": vispec.TreeConfig(depth=5, top_k=10, total_tokens=90),
}
SCENES = [(name, images) for name in tiny.VISION_FAMILIES for images in (0, 1, 2)]
SCENES += [("llama", 0), ("qwen2", 0)]


@pytest.fixture(scope="module")
def families():
    return {name: tiny.build(name) for name in tiny.FAMILIES}


def unpadded(inputs: dict) -> list[tuple]:
    return [
        tuple(row[keep.bool()].tolist())
        for row, keep in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


def plain(model, inputs, **options) -> list[int]:
    """The new tokens of plain generation for one prompt."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


def fresh_draft(model, seed: int = 1) -> vispec.ViSpecDraft:
    torch.manual_seed(seed)
    return vispec.ViSpecDraft.for_target(model)


@pytest.mark.parametrize("seed", (3, 4))
@pytest.mark.parametrize(("name", "images"), SCENES)
def test_speculation_equals_generate(families, name, images, seed):
    family = families[name]
    inputs = family.prompt(images, seed)
    expected = family.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = expected[0, inputs["input_ids"].shape[1] :].tolist()
    drafts = {
        "none": (None, "default"),
        "vispec": (fresh_draft(family.model), "default"),
        "vispec small": (fresh_draft(family.model), "small"),
        "vispec wide": (fresh_draft(family.model), "wide"),
    }
    for tree in TREES:
        replay = ReplayDraft({unpadded(inputs)[0]: new}, tiny.VOCABULARY, hit_rate=0.8, seed=seed)
        drafts[f"replay {tree}"] = (replay, tree)
    for label, (draft, tree) in drafts.items():
        result = vispec.fast_generate(
            family.model,
            draft,
            inputs,
            tree=TREES[tree],
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
        )
        assert torch.equal(result.sequences, expected), label
        if label.startswith("replay") and len(new) > 6:
            assert result.stats.tau > 0.5, label
        assert result.stats.new_tokens == len(new)
        assert sum(result.stats.accepted_per_round) + result.stats.rounds + 1 == len(new)


@pytest.mark.parametrize("name", ("qwen2_5_vl",))
def test_speculation_equals_generate_on_a_video(families, name):
    family = families[name]
    inputs = family.video_prompt(frames=3, seed=5)
    expected = family.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    actual = vispec.fast_generate(
        family.model, fresh_draft(family.model), inputs, max_new_tokens=NEW_TOKENS, tree=vispec.TreeConfig()
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_rows_of_a_ragged_batch_equal_rows_alone(families, name, side):
    family = families[name]
    images = (1, 0, 2, 1) if name in tiny.VISION_FAMILIES else (0, 0, 0, 0)
    prompts = [family.prompt(count, seed=10 + row, text=5 + 3 * row) for row, count in enumerate(images)]
    answers = {unpadded(prompt)[0]: plain(family.model, prompt) for prompt in prompts}
    batch = family.batch(prompts, side)
    drafts = {
        "none": None,
        "vispec": fresh_draft(family.model),
        "replay": ReplayDraft(answers, tiny.VOCABULARY, hit_rate=0.7, seed=2),
    }
    for label, draft in drafts.items():
        sequences = vispec.fast_generate(
            family.model, draft, batch, max_new_tokens=NEW_TOKENS, tree=vispec.TreeConfig()
        )
        assert torch.equal(sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        new = sequences[:, batch["input_ids"].shape[1] :].tolist()
        for row, key in enumerate(unpadded(batch)):
            expected = answers[key] + [tiny.PAD] * (len(new[row]) - len(answers[key]))
            assert new[row] == expected, (label, row)


def test_left_padded_batch_equals_generate_on_the_batch(families):
    family = families["llava"]
    batch = family.batch([family.prompt(1, seed=row, text=4 + 2 * row) for row in range(4)], "left")
    expected = family.model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    actual = vispec.fast_generate(
        family.model, fresh_draft(family.model), batch, max_new_tokens=NEW_TOKENS, tree=vispec.TreeConfig()
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("at", range(1, 9))
def test_end_tokens_and_limits_hold_inside_an_accepted_path(families, at):
    family = families["llava"]
    inputs = family.prompt(1, seed=6)
    full = plain(family.model, inputs, eos_token_id=tiny.VOCABULARY + 1)
    draft = ReplayDraft({unpadded(inputs)[0]: full}, tiny.VOCABULARY, hit_rate=1.0)
    for options in (
        {"max_new_tokens": at},
        {"max_length": inputs["input_ids"].shape[1] + at},
        {"max_new_tokens": NEW_TOKENS, "eos_token_id": [full[at - 1], tiny.VOCABULARY + 1]},
        {"max_new_tokens": at + 1, "eos_token_id": full[at - 1]},
    ):
        expected = family.model.generate(**inputs, do_sample=False, **options)
        actual = vispec.fast_generate(family.model, draft, inputs, tree=vispec.TreeConfig(), **options)
        assert torch.equal(actual, expected), options


class StopAfter(StoppingCriteria):
    """Stops when the text has so many tokens, and remembers every length that it was asked about."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.asked: list[int] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("extra", (1, 4, 6))
def test_stopping_criteria_are_asked_after_every_token(families, extra):
    family = families["qwen2_5_vl"]
    inputs = family.prompt(1, seed=7)
    full = plain(family.model, inputs)
    length = inputs["input_ids"].shape[1]
    draft = ReplayDraft({unpadded(inputs)[0]: full}, tiny.VOCABULARY, hit_rate=1.0)
    stop = StopAfter(length + extra)
    sequences = vispec.fast_generate(
        family.model, draft, inputs, max_new_tokens=NEW_TOKENS, stopping_criteria=[stop], tree=vispec.TreeConfig()
    )
    assert sequences[0, length:].tolist() == full[:extra]
    assert stop.asked == list(range(length + 1, length + extra + 1))


PROCESSOR_OPTIONS = (
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 12, "eos_token_id": list(range(3, 60))},
    {"suppress_tokens": list(range(20, 80)), "begin_suppress_tokens": list(range(80, 120))},
    {"bad_words_ids": [[5], [9, 11]], "repetition_penalty": 0.8},
)


@pytest.mark.parametrize("options", PROCESSOR_OPTIONS, ids=lambda options: "+".join(options))
def test_processors_see_each_nodes_own_history(families, options):
    family = families["llava"]
    prompts = [family.prompt(1, seed=20 + row, text=5 + row) for row in range(2)]
    expected = {unpadded(prompt)[0]: plain(family.model, prompt, **options) for prompt in prompts}
    batch = family.batch(prompts, "left")
    draft = ReplayDraft(expected, tiny.VOCABULARY, hit_rate=0.9)
    result = vispec.fast_generate(
        family.model,
        draft,
        batch,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        tree=vispec.TreeConfig(),
        **options,
    )
    assert result.stats.tau > 1
    new = result.sequences[:, batch["input_ids"].shape[1] :].tolist()
    for row, key in enumerate(unpadded(batch)):
        assert new[row][: len(expected[key])] == expected[key]
        assert set(new[row][len(expected[key]) :]) <= {tiny.PAD}


def test_the_models_own_generation_config_is_the_default(families):
    family = tiny.build("llama")
    inputs = family.prompt(0, seed=3)
    family.model.generation_config.max_new_tokens = 5
    family.model.generation_config.repetition_penalty = 1.5
    expected = family.model.generate(**inputs)
    assert torch.equal(
        vispec.fast_generate(family.model, fresh_draft(family.model), inputs, tree=vispec.TreeConfig()), expected
    )


def test_twenty_tokens_without_any_limit(families):
    family = families["llava"]
    inputs = family.prompt(0, seed=3)
    expected = family.model.generate(**inputs, do_sample=False)
    assert torch.equal(vispec.fast_generate(family.model, None, inputs), expected)


def test_the_cache_grows_past_its_first_size(families):
    family = families["llama"]
    inputs = family.prompt(0, seed=8, text=20)
    limit = 400
    expected = plain(family.model, inputs, max_new_tokens=limit, eos_token_id=tiny.VOCABULARY + 1)
    draft = ReplayDraft({unpadded(inputs)[0]: expected}, tiny.VOCABULARY, hit_rate=0.95)
    actual = vispec.fast_generate(
        family.model, draft, inputs, max_new_tokens=limit, eos_token_id=tiny.VOCABULARY + 1, tree=vispec.TreeConfig()
    )
    assert actual[0, inputs["input_ids"].shape[1] :].tolist() == expected


def test_generation_up_to_the_last_position(families):
    family = families["llama"]
    inputs = family.prompt(0, seed=8, text=495)
    expected = family.model.generate(**inputs, max_new_tokens=17, do_sample=False)
    actual = vispec.fast_generate(
        family.model, fresh_draft(family.model), inputs, max_new_tokens=17, tree=vispec.TreeConfig()
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
def test_any_attention_implementation_of_the_model(attention):
    family = tiny.build("llava")
    family.model.set_attn_implementation(attention)
    inputs = family.prompt(1, seed=3)
    expected = family.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    draft = fresh_draft(family.model)
    assert torch.equal(
        vispec.fast_generate(family.model, draft, inputs, max_new_tokens=NEW_TOKENS, tree=vispec.TreeConfig()), expected
    )


class Recorder:
    """A streamer that remembers every call."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_what_generate_would_give_it(families):
    family = families["llava"]
    inputs = family.prompt(1, seed=6)
    answer = plain(family.model, inputs)
    expected, actual = Recorder(), Recorder()
    family.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=expected)
    draft = ReplayDraft({unpadded(inputs)[0]: answer}, tiny.VOCABULARY, hit_rate=0.9)
    vispec.fast_generate(
        family.model, draft, inputs, max_new_tokens=NEW_TOKENS, streamer=actual, tree=vispec.TreeConfig()
    )
    assert actual.calls == expected.calls
    assert actual.ended == expected.ended == 1


def test_inputs_straight_from_a_processor_and_without_a_mask(families):
    from transformers import BatchFeature

    family = families["qwen2_5_vl"]
    inputs = family.prompt(1, seed=6)
    expected = family.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(vispec.fast_generate(family.model, None, BatchFeature(inputs), max_new_tokens=8), expected)
    del inputs["attention_mask"]
    assert torch.equal(vispec.fast_generate(family.model, None, inputs, max_new_tokens=8), expected)


def test_padding_is_inferred_where_no_mask_was_given(families):
    family = families["llama"]
    batch = family.batch([family.prompt(0, seed=1, text=4), family.prompt(0, seed=2, text=9)], "left")
    del batch["attention_mask"]
    expected = family.model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert torch.equal(vispec.fast_generate(family.model, None, batch, max_new_tokens=8), expected)

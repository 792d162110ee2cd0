"""Training rows against what the draft computes while it drafts."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.test_draft import random_draft
from vispec.targets import load_target
from vispec.train.chains import attend_chains, chain_passes
from vispec.train.data import Sample
from vispec.train.inputs import merge_inputs, sample_inputs
from vispec.train.rows import feature_noise, read_target, supervised_rows, whole_passes
from vispec.train.sources import ImageStore

ANSWERS = (6, 9)


def samples(name: str):
    """Two samples of one family: two pictures, and one picture in a longer text; answers of random words."""
    family = tiny.build(name)
    generator = torch.Generator().manual_seed(3)
    prompts = [family.prompt(2, seed=1, text=5), family.prompt(1, seed=2, text=14)]
    whole = []
    for prompt, count in zip(prompts, ANSWERS, strict=True):
        tokens = torch.randint(3, 140, (1, count), generator=generator)
        shape = prompt["input_ids"].shape
        padded = {
            key: torch.nn.functional.pad(value, (0, count)) for key, value in prompt.items() if value.shape == shape
        }
        ids = torch.cat([prompt["input_ids"], tokens], dim=1)
        whole.append({**prompt, **padded, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
    supervised = [
        supervised_rows(Sample(0, "", (), "", tuple(one["input_ids"][0, :-count].tolist()), (0,) * count, ended=False))
        for one, count in zip(whole, ANSWERS, strict=True)
    ]
    return family, prompts, whole, supervised


def mild_draft(model, queries: int = 2):
    """A random draft whose weights do not blow rounding errors up from pass to pass."""
    draft = random_draft(model, queries)
    for parameter in draft.parameters():
        parameter.data *= 0.3
    return draft


@pytest.mark.parametrize("name", tiny.VISION_FAMILIES)
def test_the_reading_equals_a_prefill(name):
    family, _, whole, _ = samples(name)
    target = load_target(family.model)
    readings = read_target(target, merge_inputs(whole))
    with torch.inference_mode():
        prompt = target.prefill(family.batch(whole, "left"))
    assert [one.length for one in readings] == prompt.lengths.tolist()
    assert [one.spans for one in readings] == prompt.spans and [len(one.spans) for one in readings] == [2, 1]
    for row, one in enumerate(readings):
        assert not one.features.requires_grad
        torch.testing.assert_close(one.features, prompt.features[row, : one.length], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.embeddings, prompt.embeddings[row, : one.length])


@pytest.mark.parametrize("name", tiny.VISION_FAMILIES)
@pytest.mark.parametrize("queries", (0, 1, 2, 4))
def test_the_first_pass_is_what_a_generation_computes(name, queries):
    """The supervised rows are, one by one, the outputs from which a generation drafts behind each answer token."""
    family, prompts, whole, supervised = samples(name)
    target = load_target(family.model)
    draft = random_draft(family.model, queries)
    readings = read_target(target, merge_inputs(whole))
    said = whole_passes(draft, readings, supervised)
    (predicted,), wanted = said.predicted, said.wanted
    chained = chain_passes(draft, readings, supervised)
    assert torch.equal(chained.wanted, wanted) and chained.counted.all()
    torch.testing.assert_close(chained.predicted[0], predicted, rtol=1e-4, atol=1e-4)
    assert len(predicted) == len(wanted) == sum(ANSWERS)
    place = 0
    for row, count in enumerate(ANSWERS):
        length = readings[row].length
        tokens = whole[row]["input_ids"][:, -count:]
        with torch.inference_mode():
            prompt = target.prefill(prompts[row])
            session = draft.start(target, prompt, tokens[:, 0])
            for step in range(count):
                torch.testing.assert_close(session._last[0], predicted[place + step], rtol=1e-3, atol=1e-3)
                feature = readings[row].features[length - count + step]
                torch.testing.assert_close(feature, wanted[place + step])
                if step + 1 < count:
                    following = tokens[:, step + 1 : step + 2]
                    session.commit(feature[None, None], following, torch.tensor([1]), [1])
        place += count


@pytest.mark.parametrize("queries", (0, 1, 2, 4))
def test_later_passes_read_the_row_before(queries):
    """Two passes over two pictures, against a loop over rows with the spans taken apart by hand."""
    family, _, whole, supervised = samples("llava")
    draft = random_draft(family.model, queries)
    readings = read_target(load_target(family.model), merge_inputs(whole))
    noises = [feature_noise(one.length, 64, seed) for seed, one in enumerate(readings)]
    with torch.no_grad():
        said = whole_passes(draft, readings, supervised, passes=3, noises=noises)
        passes, bare = said.predicted, whole_passes(draft, readings, supervised)
        assert torch.equal(said.wanted, bare.wanted), "what is predicted has no noise"
        place = 0
        for row, one in enumerate(readings):
            length, embeddings = one.length, one.embeddings[1:]
            features = one.features[:-1] + noises[row][:-1]
            inside = set()
            if queries:
                for span in one.spans:
                    inside |= set(range(span.start - 1, span.start - 1 + span.length))
            for number in range(3):
                rows, places, _ = draft.prompt_rows(embeddings, features, one.spans)
                output = draft(rows[None], places[None])[0]
                kept = [output[index] for index, at in enumerate(places.tolist()) if at in supervised[row]]
                count = len(supervised[row])
                torch.testing.assert_close(
                    passes[number][place : place + count], torch.stack(kept), rtol=1e-3, atol=1e-3
                )
                before = {at: output[index] for index, at in enumerate(places.tolist())}
                for at in range(1, length - 1):
                    # With one query a picture leaves no row: the text behind it keeps the target's feature.
                    if at not in inside and at - 1 in before:
                        features[at] = before[at - 1]
            place += count
    assert not torch.allclose(passes[0], passes[1], atol=1e-2)


@pytest.mark.parametrize("name", tiny.VISION_FAMILIES)
@pytest.mark.parametrize("queries", (0, 1, 2, 4))
def test_chains_are_what_a_generation_drafts(name, queries):
    """Row a of pass s is, number by number, level s of a tree whose root is the answer's token s places before.

    Every chain is drafted by a real session that has committed the answer as far as its root, and then is forced
    along the answer's own tokens. The samples are of different lengths, so one of them is padded.
    """
    family, prompts, whole, supervised = samples(name)
    target, deep = load_target(family.model), 4
    draft = mild_draft(family.model, queries)
    for projection in (draft.layers[0].self_attn.q_proj, draft.layers[0].self_attn.k_proj):
        # So that it matters which keys are looked at.
        projection.weight.data *= 8
    readings = read_target(target, merge_inputs(whole))
    said = chain_passes(draft, readings, supervised, passes=deep)
    place = 0
    for row, count in enumerate(ANSWERS):
        expected_counts = [[step >= number for step in range(count)] for number in range(deep)]
        assert said.counted[:, place : place + count].tolist() == expected_counts
        tokens = whole[row]["input_ids"][:, -count:]
        with torch.inference_mode():
            session = draft.start(target, target.prefill(prompts[row]), tokens[:, 0])
            for root in range(count):
                parent, ancestors = session._last[:, None], torch.ones(1, 1, 1, dtype=torch.int64)
                for number in range(1, min(deep, count - root)):
                    parent = session._level(number - 1, tokens[:, root + number, None], parent, ancestors)
                    ancestors = 2 * ancestors + 1
                    actual = said.predicted[number, place + root + number]
                    torch.testing.assert_close(actual, parent[0, 0], rtol=1e-3, atol=1e-3)
                if root + 1 < count:
                    feature = readings[row].features[len(prompts[row]["input_ids"][0]) + root]
                    session.commit(feature[None, None], tokens[:, root + 1, None], torch.tensor([1]), [1])
        place += count


def test_query_heads_share_key_heads_in_order():
    """As EAGLE's drafts have them: against every key head written out for each of its query heads."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 6, 5, 8, generator=generator)
    keys, values = ([torch.randn(2, 2, rows, 8, generator=generator) for rows in (9, 5, 5)] for _ in range(2))
    firsts = torch.tensor([4, 3])
    expected = attend_chains(query, *([one.repeat_interleave(3, 1) for one in pair] for pair in (keys, values)), firsts)
    torch.testing.assert_close(attend_chains(query, keys, values, firsts), expected)


@pytest.mark.parametrize("run", (whole_passes, chain_passes))
def test_checkpointing_and_padding_change_nothing(run):
    family, _, whole, supervised = samples("llava")
    draft = mild_draft(family.model).double().requires_grad_(True)
    target = load_target(family.model)
    noises = [feature_noise(one["input_ids"].shape[1], 64, seed) for seed, one in enumerate(whole)]

    def gradients(groups, checkpointed):
        draft.zero_grad()
        for group in groups:
            readings = read_target(target, merge_inputs([whole[index] for index in group]))
            rows, noise = [supervised[index] for index in group], [noises[index] for index in group]
            said = run(draft, readings, rows, passes=3, noises=noise, checkpointed=checkpointed)
            errors = (said.predicted - said.wanted).square().sum(-1)
            (errors if said.counted is None else errors * said.counted).sum().backward()
        found = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
        assert {"imadpt.q", "img_fc.weight", "fc.weight"} <= set(found)
        return found

    together = gradients([[0, 1]], checkpointed=False)
    for other in (gradients([[0], [1]], False), gradients([[0, 1]], True)):
        for name, gradient in together.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-4 * scale)


def test_a_stored_sample_is_read_with_its_picture_and_its_answer():
    """Qwen's processor also says which tokens are of pictures: an answer's are not."""
    family = tiny.build("qwen2_5_vl")
    prompt = family.prompt(1, seed=1)

    class Processor:
        image_processor, bos_token = None, None

        def __call__(self, text, return_tensors):
            return dict(prompt)

    sample = Sample(0, "", (), "text", tuple(prompt["input_ids"][0].tolist()), (5, 6, 7), ended=False)
    inputs = sample_inputs(Processor(), ImageStore(""), sample)
    assert inputs["input_ids"][0, -3:].tolist() == [5, 6, 7]
    kinds = inputs["mm_token_type_ids"][0].tolist()
    assert kinds == prompt["mm_token_type_ids"][0].tolist() + [0, 0, 0] and sum(kinds) == 6
    (reading,) = read_target(load_target(family.model), merge_inputs([inputs]))
    with torch.inference_mode():
        expected = family.model.model(**inputs).last_hidden_state
    torch.testing.assert_close(reading.features, expected[0], rtol=1e-4, atol=1e-4)
    assert sample_inputs(Processor(), ImageStore(""), sample, longest=len(sample.prompt) + 1)["input_ids"][0, -1] == 5


def test_supervised_rows():
    def rows(prompt: int, answer: int, ended: bool, longest: int | None = None) -> list[int]:
        return list(supervised_rows(Sample(0, "", (), "", (5,) * prompt, (6,) * answer, ended), longest))

    # The prompt's last row reads answer token 0 and predicts token 1; nothing is asked behind an end token.
    assert rows(4, 3, ended=False) == [3, 4, 5]
    assert rows(4, 3, ended=True) == [3, 4]
    assert rows(4, 1, ended=True) == []
    assert rows(4, 3, ended=True, longest=6) == [3, 4]
    assert rows(4, 3, ended=True, longest=4) == []


def test_noise_is_uniform_and_narrower_for_longer_samples():
    for length, width in ((512, 0.1), (128, 0.4)):
        noise = feature_noise(length, 300, seed=5)
        assert noise.abs().max() <= width
        assert float(noise.std()) == pytest.approx(2 * width / 12**0.5, rel=0.01)
        assert float(noise.mean()) == pytest.approx(0, abs=0.002 * width * 10)
    assert torch.equal(feature_noise(8, 4, 1), feature_noise(8, 4, 1))
    assert not torch.equal(feature_noise(8, 4, 1), feature_noise(8, 4, 2))


def test_padding_on_the_left_is_refused():
    family, _, whole, _ = samples("llava")
    with pytest.raises(ValueError, match="padded on the right"):
        read_target(load_target(family.model), family.batch(whole, "left"))

"""The audit finds every token that is not the plain model's first choice, and no other."""

from __future__ import annotations

import json

import pytest
import torch

import vispec
from tests import tiny
from vispec.compare import TIE_STEPS

OPTIONS = {"max_new_tokens": 12, "do_sample": False}


def scene(name: str, side: str):
    """A ragged batch of a family, padded on one side, with what each row answers alone behind it."""
    family = tiny.build(name)
    images = (1, 0, 2) if name in tiny.VISION_FAMILIES else (0, 0, 0)
    prompts = [family.prompt(count, seed=10 + row, text=5 + 3 * row) for row, count in enumerate(images)]
    batch = family.batch(prompts, side)
    answers = [
        family.model.generate(**prompt, **OPTIONS)[0, prompt["input_ids"].shape[1] :].tolist() for prompt in prompts
    ]
    longest = max(map(len, answers))
    new = torch.tensor([answer + [tiny.PAD] * (longest - len(answer)) for answer in answers])
    return family, batch, torch.cat([batch["input_ids"], new], dim=1), answers


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_plain_answers_pass_and_one_other_token_is_found(name, side):
    family, batch, output, answers = scene(name, side)
    found = vispec.audit(family.model, batch, output)
    assert found.passed and not found.departures
    assert found.tokens == sum(map(len, answers))
    start = batch["input_ids"].shape[1]
    row, token = 1, len(answers[1]) - 1
    changed = output.clone()
    # The last token of a row: nothing behind it changes its mind.
    changed[row, start + token] = 5 if answers[row][token] != 5 else 6
    found = vispec.audit(family.model, batch, changed)
    (departure,) = found.departures
    assert (departure.row, departure.token) == (row, token)
    assert departure.emitted == int(changed[row, start + token]) and departure.best == answers[row][token]
    assert not departure.tie and not found.passed
    assert departure.gap > 0 and departure.steps > TIE_STEPS[torch.float32] == found.tie_steps
    assert json.loads(json.dumps(found.as_dict()))["departures"][0]["token"] == token


def test_what_follows_another_token_is_judged_behind_it():
    """A departure changes the text, and later tokens are compared with what the model says of the changed text."""
    family = tiny.build("llama")
    prompt = family.prompt(0, seed=3)
    output = family.model.generate(**prompt, **OPTIONS)
    start = prompt["input_ids"].shape[1]
    changed = output[:, : start + 4].clone()
    changed[0, start + 3] = 5
    again = {"input_ids": changed, "attention_mask": torch.ones_like(changed)}
    rest = family.model.generate(**again, **OPTIONS)
    assert [one.token for one in vispec.audit(family.model, prompt, rest).departures] == [3]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_an_equal_logit_is_a_tie(dtype):
    family = tiny.build("llama")
    family.model.to(dtype)
    prompt = family.prompt(0, seed=3)
    output = family.model.generate(**prompt, **OPTIONS)
    chosen = int(output[0, -1])
    twin = next(token for token in range(chosen + 1, tiny.VISION_END))
    head = family.model.get_output_embeddings().weight
    with torch.no_grad():
        head[twin] = head[chosen]
    output[0, -1] = twin
    found = vispec.audit(family.model, prompt, output)
    last = found.departures[-1]
    assert (last.emitted, last.best, last.gap, last.steps, last.tie) == (twin, chosen, 0.0, 0.0, True)


PROCESSORS = (
    {"repetition_penalty": 1.7},
    {"min_new_tokens": 9, "eos_token_id": list(range(3, 60))},
    {"begin_suppress_tokens": list(range(80, 120)), "suppress_tokens": list(range(20, 80))},
)


@pytest.mark.parametrize("options", PROCESSORS, ids=lambda options: "+".join(options))
def test_it_asks_for_the_choice_after_the_processors(options):
    family = tiny.build("llava")
    prompts = [family.prompt(1, seed=20 + row, text=5 + row) for row in range(2)]
    batch = family.batch(prompts, "right")
    output = vispec.fast_generate(family.model, None, batch, **OPTIONS, **options)
    assert not vispec.audit(family.model, batch, output, **options).departures
    assert vispec.audit(family.model, batch, output, eos_token_id=options.get("eos_token_id")).departures


def test_outputs_that_are_none():
    family = tiny.build("llama")
    prompt = family.prompt(0, seed=3)
    tokens = prompt["input_ids"]
    for wrong in (tokens, tokens + 1, torch.cat([tokens + 1, tokens], dim=1), tokens[0]):
        with pytest.raises(ValueError, match="output must be the prompt"):
            vispec.audit(family.model, prompt, wrong)
    with pytest.raises(ValueError, match="do_sample must be False"):
        vispec.audit(family.model, prompt, torch.cat([tokens, tokens], dim=1), do_sample=True)

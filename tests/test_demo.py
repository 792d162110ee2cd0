"""The shipped model: it loads in one line, sees, and is answered speculatively with its own tokens."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import vispec
from vispec.cli.prompts import make_inputs, open_pictures
from vispec.compare import compare


@pytest.fixture(scope="module")
def loaded():
    return vispec.demo.load()


def inputs_for(processor, sample, picture=None):
    return make_inputs(processor, sample.prompt, [picture] if picture else open_pictures([sample.path]))


def test_the_draft_belongs_to_the_model_and_has_a_reduced_head(loaded):
    assert loaded.draft is not None
    assert loaded.draft.config.num_queries == 2
    assert len(loaded.draft.head_tokens) == 8192


def test_every_sample_has_its_credit(loaded):
    samples = vispec.demo.samples()
    assert len(samples) == 6
    for sample in samples:
        assert sample.path.is_file() and sample.prompt and "credit" in sample.credit.lower()


@pytest.mark.parametrize("number", range(3))
def test_answers_are_identical_and_drafted_tokens_are_accepted(loaded, number):
    model, draft, processor = loaded
    inputs = inputs_for(processor, vispec.demo.samples()[number])
    found = compare(model, draft, inputs, tree=vispec.demo.TREE, max_new_tokens=24, warmup=0)
    assert found.verdict == "identical: yes"
    assert found.tau > 0.5


def test_the_picture_matters(loaded):
    """A grey square is answered otherwise than a photograph: the answer is not the prompt's alone."""
    model, draft, processor = loaded
    sample = vispec.demo.samples()[2]
    options = {"max_new_tokens": 24, "do_sample": False}
    seen = vispec.fast_generate(model, draft, inputs_for(processor, sample), **options)
    grey = inputs_for(processor, sample, Image.new("RGB", (192, 192), (128, 128, 128)))
    assert not torch.equal(vispec.fast_generate(model, draft, grey, **options), seen)

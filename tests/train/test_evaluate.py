"""Acceptance as it is reported, against the engine's own statistics and against a draft that knows the answers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.replay import ReplayDraft
from tests.tiny import VOCABULARY
from tests.train.conftest import COLLECT, EXTENSION, NEW_TOKENS, make_model
from vispec import TreeConfig, ViSpecDraft, fast_generate
from vispec.train import collect, evaluate, open_source
from vispec.train.data import read_dataset
from vispec.train.evaluate import FIRST_TOKENS, Acceptance
from vispec.train.inputs import sample_inputs
from vispec.train.loops import repeated
from vispec.train.plot import check_plotting, plot_figures
from vispec.train.sources import ImageStore
from vispec.train.words import KINDS, content_words, pieces_of, word_kinds


def run(world, draft, **more):
    settings = {"extension": EXTENSION, "max_new_tokens": NEW_TOKENS, **more}
    return evaluate(world.model, world.processor, draft, open_source(world.requests), **settings)


@pytest.fixture
def draft(world):
    torch.manual_seed(1)
    return ViSpecDraft.for_target(world.model)


def test_figures_are_the_engines_own(world, draft):
    found = run(world, draft, seed=5, limit=4)
    samples = read_dataset(world.answers)[0][:4]
    for temperature in (0.0, 1.0):
        accepted, tokens = [], 0
        for sample in samples:
            prompt = {
                name: value[:, : len(sample.prompt)] if value.ndim == 2 else value
                for name, value in sample_inputs(world.processor, ImageStore(world.root), sample).items()
            }
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0} if temperature else {"do_sample": False}
            result = fast_generate(
                world.model,
                draft,
                prompt,
                tree=TreeConfig(),
                seed=5 + sample.index,
                max_new_tokens=NEW_TOKENS,
                return_dict_in_generate=True,
                **options,
            )
            accepted += result.stats.accepted_per_round
            tokens += result.stats.new_tokens
        figures = found["temperatures"][f"{temperature:g}"]
        assert figures["rounds"] == len(accepted) and figures["new_tokens"] == tokens
        assert figures["tau"] == pytest.approx(sum(accepted) / len(accepted))
        assert figures["tokens_per_round"] == figures["tau"] + 1
        first = sum(count > 0 for count in accepted) / len(accepted)
        assert figures["acceptance_by_depth"][0] == pytest.approx(first)
        for groups in (figures["by_part"], figures["by_kind"]):
            assert sum(group["rounds"] for group in groups.values()) == figures["rounds"]
        assert set(figures["by_kind"]) == {"even", "odd"}
    assert found["prompts"] == 4 and not found["skipped"]
    assert json.loads(json.dumps(found)) == found


def test_a_draft_that_knows_every_answer(world):
    samples, _ = read_dataset(world.answers)
    answers = {sample.prompt: list(sample.answer) for sample in samples}
    knowing = ReplayDraft(answers, VOCABULARY, hit_rate=1.0)
    tree = TreeConfig(depth=2, top_k=4, total_tokens=20)
    figures = run(world, knowing, tree=tree, temperatures=(0.0,))["temperatures"]["0"]
    # 24 tokens: one of the prefill, five rounds of four, and one of three that the limit cuts.
    assert all(len(answer) == NEW_TOKENS for answer in answers.values()), "the figures below count whole answers"
    assert figures["rounds"] == 60 and figures["tau"] == pytest.approx((5 * 3 + 2) / 6)
    assert figures["acceptance_by_depth"] == pytest.approx([1, 1, 5 / 6])
    assert figures["by_part"]["first"]["rounds"] == 10 * -(-(FIRST_TOKENS - 1) // 4)


def test_answers_that_loop_or_are_short_are_left_out(world, draft, tmp_path):
    """What counts is what `collect` keeps, here of a model of six words, which repeats itself more and less."""
    model, source = make_model().model, open_source(world.requests)
    model.generation_config.suppress_tokens = [token for token in range(tiny.VOCABULARY) if not 20 <= token < 26]
    config = replace(COLLECT, max_new_tokens=60)
    collect(model, world.processor, source, tmp_path / "all", config)
    written = [sample.answer for sample in read_dataset(tmp_path / "all")[0]]
    limit = sorted(max(repeated(answer), repeated(answer[-32:])) for answer in written)[4] + 1e-9
    collect(model, world.processor, source, tmp_path / "kept", replace(config, max_repeated=limit))
    kept = [sample.answer for sample in read_dataset(tmp_path / "kept")[0]]
    assert 0 < len(kept) < len(written), "some loop and some do not"
    options = {"extension": EXTENSION, "temperatures": (0.0,), "max_new_tokens": 60, "max_repeated": limit}
    found = evaluate(model, world.processor, draft, source, **options)
    figures = found["temperatures"]["0"]
    assert figures["answers"] == len(kept) and figures["new_tokens"] == sum(map(len, kept))
    assert figures["left_out"] == {"looping answer": len(written) - len(kept)}
    # Each answer's first token came from the prefill, each round brought one more than it accepted.
    assert figures["rounds"] * (figures["tau"] + 1) == pytest.approx(figures["new_tokens"] - len(kept))
    assert figures["rounds"] == sum(group["rounds"] for group in figures["by_kind"].values())
    assert figures["new_tokens"] == sum(group["tokens"] for group in figures["by_word"].values())
    assert found["max_repeated"] == limit and found["shortest_answer"] == 1
    with pytest.raises(ValueError, match=r"answer at temperature 0 must count, got .*'short answer': 10"):
        run(world, draft, temperatures=(0.0,), shortest_answer=NEW_TOKENS + 1)


def test_tokens_by_kind_of_word(world):
    """Drafted tokens are those of a round but its last; the tiny tokenizer's words are w0, w1, ..., all alike."""
    samples, _ = read_dataset(world.answers)
    answers = {sample.prompt: list(sample.answer) for sample in samples}
    knowing = ReplayDraft(answers, VOCABULARY, hit_rate=1.0)
    figures = run(world, knowing, tree=TreeConfig(2, 4, 20), temperatures=(0.0,))["temperatures"]["0"]
    words = figures["by_word"]
    assert sum(group["tokens"] for group in words.values()) == figures["new_tokens"] == 240
    drafted = sum(round(group["tokens"] * group["drafted_share"]) for group in words.values())
    assert drafted == sum(sample_count for sample_count in (5 * 3 + 2,) * 10)


class Letters:
    """A tokenizer whose token n is the n-th piece, and whose token 0 is special."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = ["", *pieces]

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return "".join(self.pieces[token] for token in tokens)


def test_kinds_of_words():
    tokenizer = Letters("The", " black", " be", "ar", "'s", " 3", " paws", ".", " It", " sle", "eps")
    tokens = [*range(1, 12), 0]
    pieces = pieces_of(tokenizer, tokens)
    assert pieces == [*tokenizer.pieces[1:], ""]
    named = content_words("A bear's den: the PAWS of one animal.")
    assert named == {"bear's", "den", "paws", "animal"}
    found = word_kinds(pieces, named)
    expected = "function content named named named other named other function content content other"
    assert found == expected.split() and set(found) == set(KINDS)
    # Without a text to compare with, nothing is named.
    assert word_kinds(pieces) == expected.replace("named", "content").split()
    assert word_kinds([]) == [] and word_kinds(["don't", " x_1", "é"]) == ["content", "content", "content"]


def test_named_words_come_from_the_sources_own_answer(world, draft, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "w4 w5", "answer": " ".join(f"w{n}" for n in range(3, 147))}) + "\n")
    found = evaluate(world.model, world.processor, draft, open_source(path), max_new_tokens=8, extension="")
    kinds = found["temperatures"]["0"]["by_word"]
    # "w12" is the letter w and a number: every answer's words are the letter, which the source's own answer holds.
    assert set(kinds) <= {"named", "other"} and kinds["named"]["tokens"] > 0


def test_a_picture_of_the_figures(world, draft, tmp_path):
    pytest.importorskip("matplotlib")
    found = run(world, draft, limit=4)
    plot_figures(found, tmp_path / "figures.png")
    with Image.open(tmp_path / "figures.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    for figures in found["temperatures"].values():
        figures["by_kind"] = {}
    plot_figures(found, tmp_path / "figures.png")


def test_plotting_is_optional(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="--plot needs the package matplotlib: pip install matplotlib"):
        check_plotting()


def test_acceptance_by_depth():
    group = Acceptance()
    group.accepted.update([0, 0, 1, 2, 2, 2, 3, 3])
    assert group.rounds == 8 and group.tau == pytest.approx(13 / 8)
    assert group.by_depth(4) == pytest.approx([6 / 8, 5 / 6, 2 / 5, 0])
    assert Acceptance().tau == 0 and Acceptance().by_depth(2) == [0, 0]


def test_bad_input(world, draft, tmp_path):
    with pytest.raises(ValueError, match="temperatures must be at least 0"):
        run(world, draft, temperatures=(-1.0,))
    with pytest.raises(ValueError, match="max_repeated must be above 0 and at most 1, got 0"):
        run(world, draft, max_repeated=0)
    with pytest.raises(ValueError, match="shortest_answer must be at least 1, got 0"):
        run(world, draft, shortest_answer=0)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "gone.png", "prompt": "w4"}\n{"prompt": "w4"}\n')
    found = evaluate(world.model, world.processor, draft, open_source(path), max_new_tokens=4)
    assert found["prompts"] == 1 and [skip["skipped"] for skip in found["skipped"]] == ["image missing"]
    with pytest.raises(ValueError, match=r"at least one prompt must be usable, got none of 1: .*gone\.png"):
        evaluate(world.model, world.processor, draft, open_source(path), limit=1)

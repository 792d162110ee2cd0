"""The collected answers are the target's own, whatever the batches, and every bad request is counted."""

from __future__ import annotations

import importlib
import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from tests import tiny
from tests.saved import make_processor, make_tokenizer
from tests.train.conftest import COLLECT, EXTENSION, NEW_TOKENS, make_model
from vispec import ViSpecDraft
from vispec.targets import load_target
from vispec.train import CollectConfig, collect, open_source
from vispec.train.collect import _check_answer
from vispec.train.data import read_dataset, read_manifest
from vispec.train.inputs import merge_inputs, sample_inputs
from vispec.train.loops import BreakOff, loops, repeated
from vispec.train.sources import ImageStore, UnusableSample


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_answers_are_plain_generations(world):
    samples, skips = read_dataset(world.answers)
    assert not skips and [sample.index for sample in samples] == list(range(10))
    assert world.totals["answer_tokens"] == sum(len(sample.answer) for sample in samples)
    store = ImageStore(world.root)
    for sample in samples:
        assert sample.text.endswith("w7 w8 w9"), "the extension stands behind the prompt, inside the template"
        inputs = sample_inputs(world.processor, store, replace(sample, answer=()))
        expected = world.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        assert list(sample.prompt + sample.answer) == expected[0].tolist()
        assert sample.ended == (sample.answer[-1] == tiny.EOS)
    assert [len(sample.images) for sample in samples[:3]] == [1, 2, 0]
    assert samples[0].kind == "even"


@pytest.mark.parametrize("temperatures", ((0.0,), (0.8,), (0.7, 0.0, 0.7)))
def test_batches_shards_and_a_draft_change_nothing(world, tmp_path, temperatures):
    config = replace(COLLECT, temperatures=temperatures, max_new_tokens=10, max_repeated=0.6)
    found = []
    draft = ViSpecDraft.for_target(world.model)
    for number, (batch, shard, own) in enumerate(((1, 10, None), (4, 3, None), (3, 10, draft))):
        sized = replace(config, batch_size=batch, shard_size=shard)
        collect(world.model, world.processor, open_source(world.requests), tmp_path / f"{number}", sized, draft=own)
        found.append(read_dataset(tmp_path / f"{number}"))
    assert found[0] == found[1] == found[2]


def test_an_answer_at_each_temperature(world, tmp_path):
    config = replace(COLLECT, temperatures=(0.0, 0.9, 0.9))
    totals = collect(world.model, world.processor, open_source(world.requests), tmp_path / "out", config, limit=4)
    samples, _ = read_dataset(tmp_path / "out")
    greedy = read_dataset(world.answers)[0]
    assert totals["samples"] == 12 and [sample.index for sample in samples] == list(range(12))
    for row in range(4):
        first, second, third = samples[3 * row : 3 * row + 3]
        assert replace(first, index=row) == greedy[row]
        assert first.prompt == second.prompt == third.prompt and second.answer != third.answer != first.answer
    # A later run goes further, to the same answers.
    collect(world.model, world.processor, open_source(world.requests), tmp_path / "out", config, limit=6)
    collect(world.model, world.processor, open_source(world.requests), tmp_path / "once", config, limit=6)
    assert read_dataset(tmp_path / "out") == read_dataset(tmp_path / "once")


def test_looping_answers_are_broken_off_and_skipped(world, tmp_path, monkeypatch):
    """A model of six words repeats itself, here more and there less."""
    source, model = open_source(world.requests), make_model().model
    model.generation_config.suppress_tokens = [token for token in range(tiny.VOCABULARY) if not 20 <= token < 26]
    config = replace(COLLECT, max_new_tokens=60)
    collect(model, world.processor, source, tmp_path / "all", config)
    answers = {sample.index: sample.answer for sample in read_dataset(tmp_path / "all")[0]}
    shares = {index: max(repeated(answer), repeated(answer[-32:])) for index, answer in answers.items()}
    limit = sorted(shares.values())[4] + 1e-9
    assert min(shares.values()) < limit < max(shares.values()), "some loop and some do not"
    module, written = importlib.import_module("vispec.train.collect"), []
    check = module._check_answer
    monkeypatch.setattr(module, "_check_answer", lambda answer, *more: written.append(answer) or check(answer, *more))
    config = replace(config, max_repeated=limit)
    totals = collect(model, world.processor, source, tmp_path / "kept", config)
    samples, skips = read_dataset(tmp_path / "kept")
    assert totals["skipped"] == {"looping answer": len(skips)} and skips
    for sample in samples:
        assert sample.answer == answers[sample.index] and shares[sample.index] <= limit
    assert {skip.index for skip in skips} >= {index for index, share in shares.items() if share > limit}
    short = [answer for answer in written if len(answer) < 60 and answer[-1] != tiny.EOS]
    assert short and all(repeated(answer[-32:]) > limit for answer in short if len(answer) >= 32)


def test_what_a_loop_is():
    assert repeated([1, 2, 3]) == repeated([]) == repeated(range(50)) == 0
    assert repeated([7] * 10) == pytest.approx(6 / 7) and repeated([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    # As a whole it says everything twice; its end alone does not.
    assert loops([*range(40), *range(40)], 0.4) and not loops(list(range(80)), 0.4)
    assert loops([*range(200), *[1, 2, 3] * 9], 0.4) and not loops([*range(200), *[1, 2, 3] * 2], 0.4)
    stop = BreakOff(0.4, placeholders=[9])
    # A picture's placeholders, and a short question behind them.
    assert not stop(torch.tensor([[1] + [9] * 40 + [2, 3, 4, 5, 6]]), None)
    assert stop(torch.tensor([[1] + [9] * 40 + [2, 3] * 12]), None)
    assert not loops([7] * 100, 1.0)


def test_an_answer_that_was_broken_off_is_skipped(world):
    """It may have looped together with its prompt, so that nothing shows in the answer alone."""
    target, config = load_target(world.model), CollectConfig(max_new_tokens=20, max_repeated=0.4)
    with pytest.raises(UnusableSample, match="looping answer: 8 tokens"):
        _check_answer(tuple(range(8)), False, target, config)
    _check_answer(tuple(range(8)), True, target, config)
    _check_answer(tuple(range(20)), False, target, config)


def test_the_sources_own_answers_are_read(world, tmp_path):
    rows = [
        {"image": "0.png", "prompt": "w4", "answer": "w5 w6 w10"},
        {"conversations": [{"from": "human", "value": "w4"}, {"from": "gpt", "value": "w11 w12 w13 w14"}]},
        {"prompt": "w4"},
        {"prompt": "w4", "answer": " ".join(["w9"] * 40)},
        {"prompt": "w4", "answer": " ".join(f"w{number}" for number in range(20, 60))},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "0.png").write_bytes((world.root / "0.png").read_bytes())
    config = replace(COLLECT, read=True, temperatures=(0.0, 0.7), max_repeated=0.3)
    totals = collect(world.model, world.processor, open_source(path), tmp_path / "out", config)
    samples, _ = read_dataset(tmp_path / "out")
    assert totals["skipped"] == {"no answer": 1, "looping answer": 1} and totals["cut_answers"] == 1
    words = world.processor.tokenizer.convert_tokens_to_ids
    assert samples[0].answer == (*words(["w5", "w6", "w10"]), tiny.EOS) and samples[0].ended
    assert samples[1].answer == (*words(["w11", "w12", "w13", "w14"]), tiny.EOS)
    assert len(samples[2].answer) == NEW_TOKENS and not samples[2].ended
    assert tuple(sample_inputs(world.processor, ImageStore(tmp_path), samples[0])["input_ids"][0].tolist()) == (
        samples[0].prompt + samples[0].answer
    )


def test_a_killed_run_goes_on(world, tmp_path, monkeypatch):
    """It dies inside the second shard's generation; the second run makes what the first did not finish."""
    module = importlib.import_module("vispec.train.collect")
    generate, calls = module.fast_generate, []

    def dying(*arguments, **options):
        calls.append(len(arguments[2]["input_ids"]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(module, "fast_generate", dying)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        collect(world.model, world.processor, open_source(world.requests), folder, COLLECT)
    assert read_manifest(folder)["next_index"] == 4
    collect(world.model, world.processor, open_source(world.requests), folder, COLLECT)
    assert contents(folder) == contents(world.answers)
    done = len(calls)
    collect(world.model, world.processor, open_source(world.requests), folder, COLLECT)
    assert len(calls) == done, "a finished data set is not generated again"


def test_bad_requests_are_counted_and_listed(world, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    (tmp_path / "good.png").write_bytes((world.root / "0.png").read_bytes())
    rows = [
        {"image": "gone.png", "prompt": "w4"},
        {"image": "broken.png", "prompt": "w4"},
        {"image": "good.png", "prompt": "w4 <image> <image>"},
        {"image": "good.png", "prompt": " ".join(["w5"] * 600)},
        {"image": "good.png", "prompt": "w4"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("not json\n" + "".join(json.dumps(row) + "\n" for row in rows))
    totals = collect(world.model, world.processor, open_source(path), tmp_path / "out", COLLECT)
    reasons = ["not JSON", "image missing", "image unreadable", "placeholders", "too long"]
    assert totals["samples"] == 1 and totals["skipped"] == dict.fromkeys(reasons, 1)
    assert [skip.skipped for skip in read_dataset(tmp_path / "out")[1]] == reasons
    path.write_text("not json\n")
    with pytest.raises(ValueError, match="at least one request must be usable, got none of 1: {'not JSON': 1}"):
        collect(world.model, world.processor, open_source(path), tmp_path / "none", COLLECT)


def test_cut_short_and_unseeable_answers(world, tmp_path):
    source = open_source(world.requests)
    cut = world.totals["cut_answers"]
    assert cut >= 1
    kept = collect(world.model, world.processor, source, tmp_path / "a", replace(COLLECT, shortest_answer=NEW_TOKENS))
    assert kept["skipped"].get("short answer", 0) + kept["samples"] == 10
    ends = make_model()
    # Whatever it writes first ends its answers.
    ends.model.generation_config.eos_token_id = list(range(3, 100))
    dropped = collect(
        ends.model, world.processor, source, tmp_path / "b", replace(COLLECT, keep_cut=False, shortest_answer=2)
    )
    assert dropped["cut_answers"] == 0 and dropped["skipped"].get("short answer", 0) >= 1
    blind = make_processor(chat=True)
    blind.chat_template = "{{ bos_token }} w4"
    with pytest.raises(ValueError, match="no placeholder|processor"):
        collect(world.model, blind, source, tmp_path / "c", COLLECT, limit=1)


def test_text_only_models_take_text_and_refuse_pictures(world, tmp_path):
    model, tokenizer = tiny.build("llama").model, make_tokenizer()
    rows = [{"prompt": "w4 w5"}, {"image": "0.png", "prompt": "w4"}]
    rows.append({"messages": [{"role": role, "content": "w6"} for role in ("user", "assistant", "user")]})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    totals = collect(model, tokenizer, open_source(path), tmp_path / "out", COLLECT)
    assert totals["skipped"] == {"text-only model": 1, "no chat template": 1}
    (sample,), _ = read_dataset(tmp_path / "out")
    assert sample.text == f"w4 w5 {EXTENSION}" and sample.prompt == (4, 5, 7, 8)
    expected = model.generate(torch.tensor([sample.prompt]), do_sample=False, max_new_tokens=NEW_TOKENS)
    assert list(sample.prompt + sample.answer) == expected[0].tolist()


def test_progress_is_shown(world, tmp_path):
    for terminal in (False, True):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=120)
        collect(
            world.model,
            world.processor,
            open_source(world.requests),
            tmp_path / f"{terminal}",
            COLLECT,
            console=console,
        )
        assert "tokens/s" in text.getvalue() and "0 skipped" in text.getvalue()


def test_other_inputs_than_the_stored_ones(world):
    sample = read_dataset(world.answers)[0][0]
    with pytest.raises(ValueError, match="must give the .* stored tokens"):
        sample_inputs(world.processor, ImageStore(world.root), replace(sample, prompt=sample.prompt[1:]))
    with pytest.raises(UnusableSample, match="image missing"):
        sample_inputs(world.processor, ImageStore(world.root / "elsewhere"), sample)


def test_batches_of_pictures_with_other_sizes():
    first = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    second = {name: torch.ones(1, 5, dtype=torch.int64) for name in first}
    first["pixel_values"], second["pixel_values"] = torch.ones(1, 2, 3), torch.ones(2, 4, 3)
    second["token_kinds"] = torch.ones(1, 5, dtype=torch.int64)
    merged = merge_inputs([first, second])
    assert merged["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert merged["token_kinds"].tolist() == [[0] * 5, [1] * 5]
    assert merged["pixel_values"].shape == (3, 4, 3) and float(merged["pixel_values"].sum()) == 2 * 3 + 24


@pytest.mark.parametrize(
    ("name", "value"),
    (("max_new_tokens", 1), ("batch_size", 0), ("temperatures", (-1.0,)), ("temperatures", ()), ("max_repeated", 0.0)),
)
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=f"collect: {name} must be (at least|above 0)"):
        CollectConfig(**{name: value})

"""The engine's benchmark: its targets have the sizes that its floors are computed from, and its draft keeps pace."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import vispec
from benchmarks import bench_engine, tables
from benchmarks.engine import case, page
from benchmarks.engine.floors import PHASES, Machine, Setting, round_phases, target_pass
from benchmarks.engine.passes import star, verify_seconds
from benchmarks.engine.quantised import Int8Linear, quantise
from benchmarks.engine.targets import SHAPES, TINY_SHAPES, prompts
from tests.test_readme import CIRCUMSTANCES
from vispec import ops
from vispec.targets import load_target
from vispec.targets.fused import FusedDecoder


@pytest.mark.parametrize("name", [*SHAPES, *TINY_SHAPES])
def test_the_floor_counts_the_weights_that_a_pass_reads(name):
    shape = {**SHAPES, **TINY_SHAPES}[name]
    model = shape.build(torch.bfloat16, "meta")
    layers = model.model.language_model.layers
    matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
    assert sum(weight.numel() for weight in matrices) == shape.layer_weights
    assert model.get_output_embeddings().weight.numel() == shape.head_weights
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert shape.cache_elements(3) == 2 * 3 * len(layers) * text.num_key_value_heads * width


def test_rounds_accept_the_tokens_that_the_paced_draft_is_told_to():
    rows = bench_engine.check()
    assert [(row["target"], row["quantised"], row["batch"]) for row in rows] == [
        (name, quantised, batch) for name in TINY_SHAPES for quantised in (None, "int8") for batch in (1, 2)
    ]
    assert all(abs(row["tau"] - row["published_tau"]) < 0.3 for row in rows)
    for row in rows:
        assert set(row["phase_shares"]) == {*PHASES, "pacing", "rest"}
        assert sum(row["phase_shares"].values()) == pytest.approx(1)
        assert row["verify_nodes"] == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_a_wrong_pace_is_found(monkeypatch):
    monkeypatch.setattr(bench_engine, "TINY_SHAPES", {"x": replace(TINY_SHAPES["tiny-llava"], tau=9.0)})
    # No path holds more than four drafted tokens, whatever it is told.
    with pytest.raises(SystemExit, match="x must accept about 9.0 tokens a round"):
        bench_engine.check()


def no_memory(*args: object, **named: object):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_call_without_enough_memory_gives_none_and_lets_go_of_its_tensors():
    held = []

    def run() -> None:
        large = torch.zeros(8)
        held.append(weakref.ref(large))
        no_memory(large)

    assert case.unless_out_of_memory(run) is None
    assert held[0]() is None
    assert case.unless_out_of_memory(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        case.unless_out_of_memory(lambda: 1 // 0)


@pytest.fixture
def on_this_cpu(monkeypatch):
    """The whole of a run with times, on tiny targets and a made-up machine."""
    monkeypatch.setattr(bench_engine, "SHAPES", TINY_SHAPES)
    monkeypatch.setattr(bench_engine, "measured_machine", lambda: (MACHINE, CEILINGS))
    monkeypatch.setattr(bench_engine, "build", lambda shape, dtype, device, how: shape.build(torch.float32, "cpu"))
    monkeypatch.setattr(case, "LONG", 48)
    # A long answer takes five seconds and a short one takes one, in turn.
    times = itertools.cycle([5.0, 1.0])
    monkeypatch.setattr(case, "seconds", lambda run: (run(), next(times))[1])
    monkeypatch.setattr(bench_engine, "LONG", 48)


MACHINE = Machine("made up", 1e9, 1e12)
CEILINGS = {"copy_gigabytes_per_second": 1.0, "matmul_teraflops": 1.0}


def asked(**options) -> argparse.Namespace:
    found = {"targets": ["tiny-llava"], "contexts": [24], "batches": [1], "repeats": 1, "compiled": False}
    return argparse.Namespace(
        **{**found, "quantised": None, "draft_weights": None, "profile": None, "json": None, **options}
    )


def test_a_run_writes_phases_floors_and_what_it_is_compared_with(on_this_cpu, tmp_path):
    (row,) = bench_engine.full_size(asked(json=tmp_path / "engine.json", compiled=True, profile=tmp_path))
    record = json.loads((tmp_path / "engine.json").read_text())
    assert record["rows"] == [row] and record["ceilings"] == CEILINGS
    assert list(row["phases"]) == list(PHASES)
    whole = sum(figures["ms"] for figures in row["phases"].values())
    assert row["phases_round_ms"] == pytest.approx(whole + row["phases_pacing_ms"] + row["phases_rest_ms"])
    parts = round_phases(TINY_SHAPES["tiny-llava"], Setting(24, 24))
    for name, figures in row["phases"].items():
        assert figures["floor_ms"] == pytest.approx(MACHINE.seconds(parts[name]) * 1e3)
        assert figures["times_over_floor"] == pytest.approx(figures["ms"] / figures["floor_ms"])
    floor = sum(figures["floor_ms"] for figures in row["phases"].values())
    assert row["round"]["floor_ms"] == pytest.approx(floor)
    plain = MACHINE.seconds(target_pass(TINY_SHAPES["tiny-llava"], Setting(24, 24), 1)) * 1e3
    assert row["plain_step"]["floor_ms"] == row["verify"][0]["floor_ms"] == pytest.approx(plain)
    assert [each["nodes"] for each in row["verify"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    # Four seconds for 32 tokens, whichever way; tau + 1 of them a round.
    assert row["plain_step"]["ms"] == row["token_ms"] == row["generate_eager_ms"] == 125
    assert row["round"]["ms"] == pytest.approx(125 * row["tokens_a_round"])
    assert row["tokens_a_round"] == pytest.approx(2.5, rel=0.2)
    assert row["tokens_per_second"] == 8 and row["speed_up_over_own_plain"] == 1
    assert row["adaptor"]["queued_in_time"] is row["verify"][8]["queued_in_time"] is True
    # Nothing is captured on a CPU, and the record says so.
    assert (row["replayed_rounds"], row["replayed_round"], row["host_ms_a_round"]) == (0, None, None)
    assert row["generate_eager_ms"] is not None and row["generate_compiled_ms"] is not None
    assert row["out_of_memory"] == []
    assert (tmp_path / "tiny-llava_24_1_calls.json").is_file()
    shown = io.StringIO()
    Console(file=shown, width=120).print(bench_engine.table(row))
    assert all(name in shown.getvalue() for name in (*PHASES, "not captured", "speed-up over generate compiled"))


def test_a_case_that_does_not_fit_is_a_row_and_the_others_are_measured(on_this_cpu, tmp_path, monkeypatch):
    def about(setting):
        return {"context": setting.context, "batch": setting.batch}

    monkeypatch.setattr(bench_engine, "Case", lambda shape, model, setting, *more: setting)
    monkeypatch.setattr(
        bench_engine, "measure", lambda setting, *more: no_memory() if setting.batch == 4 else about(setting)
    )
    rows = bench_engine.full_size(asked(contexts=[48, 24], batches=[1, 4], json=tmp_path / "engine.json"))
    assert [row.get("out_of_memory") for row in rows] == [None, ["vispec"], None, ["vispec"]]
    cases = [(row["target"], row["context"], row["batch"]) for row in rows]
    assert cases == [("tiny-llava", context, batch) for context in (24, 48) for batch in (1, 4)]
    assert json.loads((tmp_path / "engine.json").read_text())["rows"] == rows


def test_a_target_that_does_not_fit_is_a_row(on_this_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_engine, "build", no_memory)
    rows = bench_engine.full_size(asked(targets=["tiny-llava", "tiny-qwen"], json=tmp_path / "engine.json"))
    assert [(row["target"], row["out_of_memory"]) for row in rows] == [(n, ["weights"]) for n in TINY_SHAPES]
    assert json.loads((tmp_path / "engine.json").read_text())["rows"] == rows


def test_a_rival_that_does_not_fit_is_named(on_this_cpu, monkeypatch):
    monkeypatch.setattr(case.Case, "generate", no_memory)
    (row,) = bench_engine.full_size(asked(compiled=True))
    assert row["out_of_memory"] == ["generate_eager", "generate_compiled"]
    assert row["generate_eager_ms"] is row["speed_up_over_generate_compiled"] is None
    assert row["tokens_per_second"] == 8


def test_the_page_shows_a_record(tmp_path):
    figures = {"ms": 1.5, "floor_ms": 1.0, "times_over_floor": 1.5}
    row = {"target": "llava-1.6-7b", "dtype": "bfloat16", "quantised": None, "draft_weights": None}
    row |= {"context": 2048, "batch": 1}
    fits = {
        **row,
        "phases": {name: figures for name in PHASES},
        "phases_rest_ms": 0.25,
        "phases_pacing_ms": 0.5,
        "phases_round_ms": 8.25,
        "replayed_round": {**figures, "ms": 7.0},
        "host_ms_a_round": 0.004,
        "round": {**figures, "ms": 7.5},
        "plain_step": figures,
        "tokens_per_second": 400.4,
        "speed_up_over_own_plain": 2.5,
        "speed_up_over_generate_eager": 9.0,
        "speed_up_over_generate_compiled": None,
    }
    tight = {**row, "target": "llava-1.6-13b", "out_of_memory": ["vispec"]}
    eight = {**fits, "quantised": "int8", "replayed_round": None}
    rounded = {**fits, "draft_weights": "int8", "replayed_round": None}
    lost = {**tight, "context": None, "batch": None, "out_of_memory": ["weights"]}
    record = {"circumstances": CIRCUMSTANCES, "ceilings": CEILINGS, "rows": [fits, eight, rounded, tight]}
    (tmp_path / "engine_h100.json").write_text(json.dumps(record))
    text = tables.rendered(tables.ENGINE.read_text(), tmp_path, tables.ENGINE)
    lines = text.splitlines()
    times = " | ".join(["1.50 ms (1.5x)"] * 5)
    assert f"| llava-1.6-7b | {times} | 0.75 ms | 8.25 ms | 7.00 ms (1.5x) | 4.00 µs |" in lines
    assert any(line.startswith("| llava-1.6-13b | more memory than there is |") for line in lines)
    assert any(line.startswith("| qwen2.5-vl-3b | not yet measured |") for line in lines)
    measured = "7.50 ms (1.5x) | 1.50 ms (1.5x) | 400 | 2.50x | 9.00x |  |"
    assert f"| llava-1.6-7b | bfloat16 | 2048 | 1 | {measured}" in lines
    assert f"| llava-1.6-7b | int8 | 2048 | 1 | {measured}" in lines
    assert f"| llava-1.6-7b | bfloat16, draft's int8 | 2048 | 1 | {measured}" in lines
    assert "| llava-1.6-13b | bfloat16 | 2048 | 1 | more memory than there is |  |  |  |  |  |" in lines
    assert "Floors: bytes at 1 GB/s, matrix operations at 1 TFLOP/s, both measured in the same run." in lines
    assert "not captured" in " ".join(page.phases({"rows": [{**fits, "replayed_round": None}]}))
    assert page.rounds({**record, "rows": [lost]})[2].startswith("| llava-1.6-13b | bfloat16 |  |  | more memory")


def test_a_pass_that_is_not_finite_is_no_figure():
    shape = TINY_SHAPES["tiny-qwen"]
    model = shape.build(torch.float32, "cpu")
    model.get_output_embeddings().weight.data[5, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="a pass over 1 nodes"):
        verify_seconds(model, prompts(shape, 24, 1, "cpu"))


def test_a_star_is_read_as_a_tree():
    """The root sees itself, a child the root and itself; so the root's logits do not depend on the children."""
    tree = star(2, 70, 50, torch.device("cpu"))
    mask = tree.mask()
    assert torch.equal(mask, (torch.eye(70).bool() | (torch.arange(70) == 0)).expand(2, -1, -1))
    assert tree.parents[1].tolist() == [-1, *[0] * 69] and tree.depths[1].tolist() == [0, *[1] * 69]
    assert int(tree.tokens.max()) < 50


def test_an_int8_layer_is_the_linear_layer_within_half_a_step():
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 40)
    linear.weight.data[3] = 0
    own = Int8Linear(linear)
    assert own.weight.dtype is torch.int8 and int(own.weight.abs().max()) == 127
    error = (own.weight.float() * own.scale[:, None] - linear.weight).abs()
    assert bool((error <= linear.weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all())
    rows = torch.randn(2, 5, 48)
    exact = rows @ (own.weight.float() * own.scale[:, None]).T + linear.bias
    assert torch.allclose(own(rows), exact, atol=1e-5)
    half = Int8Linear(torch.nn.Linear(48, 40, bias=False, dtype=torch.bfloat16))
    assert half(rows.bfloat16()).dtype is torch.bfloat16


def quantised(name: str, dtype: torch.dtype, device: str):
    shape = replace(TINY_SHAPES[name], hidden=128, heads=2, groups=1, head_width=64)
    model = shape.build(dtype, device)
    inputs = prompts(shape, 24, 2, device)
    before = model(**inputs).logits
    quantise(model)
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-6), "the weights are no longer the same"
    return model, inputs


@pytest.mark.parametrize("name", TINY_SHAPES)
def test_a_quantised_target_gives_its_own_answer(name):
    model, inputs = quantised(name, torch.float32, "cpu")
    layers = load_target(model).decoder.layers
    kinds = Counter(type(module) for layer in layers for module in layer.modules())
    assert kinds[Int8Linear] == 7 * len(layers) and not kinds[torch.nn.Linear]
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    draft = vispec.ViSpecDraft.for_target(model)
    found = vispec.fast_generate(model, draft, inputs, graphs=True, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", TINY_SHAPES)
def test_the_fused_pass_calls_a_quantised_targets_own_layers(name, kernels, monkeypatch):
    model, inputs = quantised(name, torch.bfloat16, kernels.device)
    calls = Counter()
    fused, linear = FusedDecoder.__call__, Int8Linear.forward
    monkeypatch.setattr(
        FusedDecoder, "__call__", lambda *them, **named: (calls.update(["fused"]), fused(*them, **named))[1]
    )
    monkeypatch.setattr(Int8Linear, "forward", lambda *them: (calls.update(["linear"]), linear(*them))[1])
    draft = vispec.ViSpecDraft.for_target(model)
    with ops.use_backend(None if kernels.name == "cuda" else kernels.name):
        vispec.fast_generate(model, draft, inputs, graphs=True, max_new_tokens=6, do_sample=False)
    # The prefill is the model's own.
    passes = calls["fused"] + 1
    assert passes > 2 and calls["linear"] == passes * 7 * TINY_SHAPES[name].layers

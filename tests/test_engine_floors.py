"""The floors of a round, against numbers worked out by hand and against the modules that do the work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import vispec
from benchmarks import pictures, tables
from benchmarks.engine import page, roofline
from benchmarks.engine.floors import (
    H100_DATA_SHEET,
    H100_IN_PRACTICE,
    PHASES,
    Machine,
    Setting,
    Work,
    adaptor_pass,
    draft_layer_pass,
    head_pass,
    round_phases,
    target_pass,
)
from benchmarks.engine.targets import SHAPES, TINY_SHAPES, Shape
from vispec.drafts.session import DraftRuntime
from vispec.targets import load_target

# Two layers of 8 units, 12 in the MLP, 4 heads of 2, 2 of them for keys; 10 words; 1 token accepted a round.
SMALL = Shape(2, 8, 12, 4, 2, 10, "llava_next", 1.0, 6, head_width=2)
SETTING = Setting(context=5, draft_context=3, batch=3, tree=vispec.TreeConfig(1, 2, 4))


def test_a_machine_takes_the_longer_of_bytes_and_operations_part_by_part():
    machine = Machine("", 10.0, 100.0)
    assert machine.seconds([Work(20, 100), Work(10, 300), Work(5)]) == 2 + 3 + 0.5


def test_a_pass_of_the_target_by_hand():
    layers, attention, head = target_pass(SMALL, SETTING, 4)
    # Queries and output 8 x 8, keys and values 8 x 4, three matrices of the MLP 8 x 12; twice.
    weights = 2 * (2 * 64 + 2 * 32 + 3 * 96)
    assert layers == Work(2 * weights, 2 * 12 * weights)
    # Keys and values of 9 slots, 2 layers, 3 rows; 12 queries and as many outputs of 8.
    assert attention == Work(2 * (2 * 2 * 4 * 9 * 3 + 2 * 2 * 12 * 8), 2 * 12 * 2 * 9 * 8 * 2)
    assert head == head_pass(SMALL, SETTING, 4, 2) == Work(2 * (80 + 12 * 10), 2 * 12 * 80)
    eight_bits = Setting(5, 3, 3, SETTING.tree, weight_bytes=1)
    assert target_pass(SMALL, eight_bits, 4) == [Work(weights, 2 * 12 * weights), attention, head]


def test_a_pass_of_the_draft_by_hand():
    layer, attention = draft_layer_pass(SMALL, SETTING, 2, 4)
    # Four matrices 8 x 8, the MLP, the input map 16 x 8.
    weights = 4 * 64 + 3 * 96 + 128
    assert layer == Work(2 * weights, 2 * 6 * weights)
    eight_bits = replace(SETTING, draft_weight_bytes=1)
    assert draft_layer_pass(SMALL, eight_bits, 2, 4) == [Work(weights, 2 * 6 * weights), attention]
    levels = [round_phases(SMALL, setting)["draft levels"] for setting in (SETTING, eight_bits)]
    saved = sum(work.bytes_moved for work in levels[0]) - sum(work.bytes_moved for work in levels[1])
    assert saved == weights + 2 * 80, "one pass of the layer, two of the head"
    # 7 slots of 3 rows, keys and values; 6 queries and outputs.
    assert attention == Work(2 * (2 * 7 * 8 * 3 + 2 * 6 * 8), 2 * 6 * 2 * 7 * 8)


def test_the_phases_of_a_round_by_hand():
    phases = round_phases(SMALL, SETTING)
    assert list(phases) == list(PHASES)
    reading = Work(2 * 3 * 10)
    first = [head_pass(SMALL, SETTING, 1, 2), reading]
    # One level of two rows behind the first.
    level = [*draft_layer_pass(SMALL, SETTING, 2, 2), head_pass(SMALL, SETTING, 2, 2), Work(2 * reading.bytes_moved)]
    assert phases["draft levels"] == first + level
    assert phases["verify"] == target_pass(SMALL, SETTING, 4)
    assert phases["accept"] == [Work(4 * reading.bytes_moved)]
    # One token of 3 rows, 2 layers: keys and values of 4 numbers, read and written.
    assert phases["commit"] == [Work(2 * 3 * 2 * 2 * 4 * 2)]
    # A path holds the root and two drafted tokens.
    assert phases["draft catch-up"] == draft_layer_pass(SMALL, SETTING, 3, 3)


@pytest.mark.parametrize("name", [*SHAPES, *TINY_SHAPES])
def test_the_drafts_floor_counts_the_weights_that_its_pass_reads(name):
    shape = {**SHAPES, **TINY_SHAPES}[name]
    model = shape.build(torch.bfloat16, "meta")
    draft = vispec.ViSpecDraft.for_target(model)
    read = [weight for weight in draft.layers.parameters() if weight.ndim == 2]
    read.append(DraftRuntime(draft, load_target(model)).inputs.weight)
    layer, _ = draft_layer_pass(shape, SETTING, 1, 0)
    assert layer.bytes_moved == 2 * sum(weight.numel() for weight in read)
    projections = [draft.imadpt.v_proj.weight, draft.imadpt.o_proj.weight]
    queries, products = adaptor_pass(shape, 7)
    assert products.bytes_moved == 2 * sum(weight.numel() for weight in projections)
    assert queries.bytes_moved == 2 * (draft.imadpt.absorbed_queries().numel() + 7 * shape.hidden)


def test_floors_of_a_7b_target_by_hand():
    """LLaVA-1.6 7B at 2048 tokens and 30 nodes: 34.54 MB and 1.02 GFLOP of attention a layer; 91.2 MB of adaptor."""
    shape = SHAPES["llava-1.6-7b"]
    layers, attention, _ = target_pass(shape, Setting(2048, 256), 30)
    assert layers.bytes_moved == 2 * 6_476_005_376
    assert attention.bytes_moved / 32 == pytest.approx(34.54e6, rel=1e-3)
    assert attention.operations / 32 == pytest.approx(1.02e9, rel=5e-3)
    adaptor = adaptor_pass(shape, 2880)
    assert sum(part.bytes_moved for part in adaptor) == pytest.approx(91.2e6, rel=1e-3)
    assert sum(part.operations for part in adaptor) == pytest.approx(3.154e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "milliseconds"),
    [("llava-1.6-7b", 5.76), ("llava-1.6-13b", 10.57), ("qwen2.5-vl-3b", 3.17), ("qwen2.5-vl-7b", 6.96)],
)
def test_a_round_is_near_the_floors_that_were_set_as_targets(name, milliseconds):
    """At 3.0 TB/s; logits, which those left out, are the difference."""
    found = page.floors_of(name, H100_IN_PRACTICE)["round"] * 1e3
    assert milliseconds - 0.005 <= found <= milliseconds * 1.003
    assert page.floors_of(name, H100_DATA_SHEET)["round"] * 1e3 == pytest.approx(found * 3.0 / 3.35, rel=1e-6)


def test_the_page_on_the_engine_says_what_is_computed_and_measured():
    text = tables.ENGINE.read_text()
    assert tables.rendered(text, page=tables.ENGINE) == text, "run python -m benchmarks.tables"
    assert "| llava-1.6-7b | 0.74 ms | 4.28 ms |" in text


def test_the_committed_picture_was_drawn_from_these_numbers():
    picture = Path(tables.ROOT / "docs" / "roofline.svg")
    assert picture.stat().st_size < 100_000
    found = ElementTree.parse(picture).getroot().find(".//{http://purl.org/dc/elements/1.1/}description").text
    assert json.loads(found) == roofline.points(), "run python -m benchmarks.engine.roofline docs/roofline.svg"


def test_a_picture_shows_each_pass_and_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    times = {"plain_step": {"ms": 1}, "phases": {PHASES[0]: {"ms": 2}}, "adaptor": {"ms": 3}}
    row = {"target": "qwen2.5-vl-3b", "context": 2048, "batch": 1, "quantised": None}
    row |= {**times, "verify": [{"nodes": 1, "ms": 4}, {"nodes": 256, "ms": 5}]}
    others = [{**row, "context": 512}, {**row, "batch": 2}, {**row, "quantised": "int8"}]
    tight = {"target": "llava-1.6-7b", "context": 2048, "batch": 1, "quantised": None, "out_of_memory": ["vispec"]}
    others.append(tight)
    sizes = {}
    for name, rows in {"floors": [], "others": others, "measured": [row], "again": [row]}.items():
        roofline.draw(tmp_path / f"{name}.svg", rows)
        sizes[name] = (tmp_path / f"{name}.svg").read_text()
    assert sizes["floors"] == sizes["others"] != sizes["measured"] == sizes["again"]
    # Five points in each of two panels.
    marks = [sizes[name].count("<use ") for name in ("floors", "measured")]
    assert marks[1] - marks[0] == 10
    assert all(name in sizes["floors"] for name in SHAPES)
    roofline.draw(tmp_path / "floors.png", [])
    assert (tmp_path / "floors.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--plot needs the package matplotlib: pip install matplotlib"):
        roofline.draw(tmp_path / "x.svg")

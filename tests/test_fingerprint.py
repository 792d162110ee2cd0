"""A fingerprint tells apart whatever could make a model's code do other work, and nothing else."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from vispec.cache import KeyValueCache
from vispec.decode.fingerprint import Fingerprint
from vispec.ops.backend import use_backend
from vispec.targets import load_target


class Quantised(nn.Parameter):
    """A parameter of a kind of its own, with its scale beside it."""

    def __new__(cls, data: Tensor) -> Quantised:
        made = super().__new__(cls, data)
        made.scale = torch.ones(3)
        return made


class Box:
    def __init__(self, value: object) -> None:
        self.value = value


def one(hidden):
    return hidden


def other(hidden):
    return hidden


class Part(nn.Module):
    """One of everything that modules hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.packed = Quantised(torch.randn(4))
        self.register_buffer("table", torch.randn(4))
        self.register_parameter("bias", None)
        self.inner = nn.Linear(4, 4)
        self.loose = torch.randn(2)
        self.flag, self.number, self.name, self.nothing = True, 1.5, "a", None
        self.names = ["a", "b"]
        self.table_of = {"a": {"b": 1}}
        self.group = {"x", "y"}
        self.box = Box(Box(3))
        self.unlisted = [nn.Linear(2, 2)]
        self.function = one
        self.method = self.box.value.__init__
        self.partial = functools.partial(one, 1, key=2)
        self.functions = {one}
        self.itself = [self]
        self.kind = torch.float32

    def forward(self, hidden):
        return hidden


def assign(path: str, value: object):
    def change(part: Part, patch) -> None:
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, part)
        setattr(owner, name, value() if callable(value) and value.__name__ == "<lambda>" else value)

    change.__name__ = f"{path} = {value if not callable(value) else '...'}"
    return change


def do(what: str, function):
    def change(part: Part, patch) -> None:
        function(part, patch)

    change.__name__ = what
    return change


def fresh_module():
    return nn.Linear(4, 4)


CHANGES = (
    assign("weight", lambda: nn.Parameter(torch.randn(4, 4))),
    assign("inner.weight", lambda: nn.Parameter(torch.randn(4, 4))),
    assign("bias", lambda: nn.Parameter(torch.randn(4))),
    assign("table", lambda: torch.randn(4)),
    assign("loose", lambda: torch.randn(2)),
    assign("packed.scale", lambda: torch.zeros(3)),
    assign("flag", False),
    assign("flag", 1),
    assign("number", 1.25),
    assign("name", "b"),
    assign("nothing", 0),
    assign("new", None),
    assign("names", ["a"]),
    assign("names", ["b", "a"]),
    assign("names", ("a", "b")),
    assign("group", {"x"}),
    assign("kind", torch.float16),
    assign("box.value.value", 4),
    assign("box.value", 3),
    assign("training", False),
    assign("inner", lambda: nn.Identity()),
    do("function", lambda part, patch: setattr(part, "function", other)),
    do("functions", lambda part, patch: setattr(part, "functions", {other})),
    do("partial", lambda part, patch: setattr(part, "partial", functools.partial(one, 1, key=3))),
    do("bound", lambda part, patch: setattr(part, "method", Box(5).__init__)),
    do("dict", lambda part, patch: part.table_of["a"].update(b=2)),
    do("one", lambda part, patch: part.table_of["a"].update(b=True)),
    do("unlisted", lambda part, patch: setattr(part.unlisted[0], "weight", nn.Parameter(torch.randn(2, 2)))),
    do("data", lambda part, patch: setattr(part.weight, "data", torch.randn(4, 4))),
    do("strides", lambda part, patch: setattr(part.weight, "data", part.weight.data.T)),
    do("dtype", lambda part, patch: part.half()),
    do("child", lambda part, patch: part.add_module("more", fresh_module())),
    do("order", lambda part, patch: setattr(part, "inner", nn.Sequential(part.inner))),
    do("class", lambda part, patch: patch.setattr(Part, "forward", lambda self, hidden: 2 * hidden)),
    do("child's class", lambda part, patch: patch.setattr(nn.Linear, "forward", lambda self, hidden: 2 * hidden)),
    do("hook", lambda part, patch: part.inner.register_forward_hook(print)),
    do("hook before", lambda part, patch: part.inner.register_forward_pre_hook(print)),
    do("forward", lambda part, patch: setattr(part.inner, "forward", one)),
    do("matmul", lambda part, patch: patch.setattr(torch, "get_float32_matmul_precision", lambda: "high")),
    do("deterministic", lambda part, patch: patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_shows(change, monkeypatch):
    part = Part()
    before = Fingerprint(part)
    assert before == Fingerprint(part)
    change(part, monkeypatch)
    assert before != Fingerprint(part)


def test_what_a_graph_reads_anew_does_not_show():
    part, keys = Part(), torch.zeros(1, 1, 4, 2)
    root = Box([part, KeyValueCache(torch.zeros(1, dtype=torch.int64), [keys], [keys])])
    before = Fingerprint(root)
    with torch.no_grad():
        for tensor in (part.weight, part.table, part.loose, part.packed.scale):
            tensor.add_(1)
    part.weight.grad = torch.ones(4, 4)
    root.value[1].begin(1)
    assert before == Fingerprint(root)
    assert before != Fingerprint(Box([part])) and before != Fingerprint(part) and before != before._marks


def test_settings_show():
    part = Part()
    before = Fingerprint(part)
    with torch.autocast("cpu", torch.bfloat16):
        assert before != Fingerprint(part)
    with use_backend("reference"):
        assert before != Fingerprint(part)
    assert before == Fingerprint(part)


def test_code_that_no_walk_sees_through_equals_nothing():
    part = Part()
    handle = part.inner.register_forward_hook(print)
    hooked = Fingerprint(part)
    assert hooked != hooked and hooked != Fingerprint(part)
    handle.remove()
    assert Fingerprint(part) == Fingerprint(part)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        everywhere = Fingerprint(part)
    finally:
        handle.remove()
    assert everywhere != everywhere
    part.sparse = torch.eye(3).to_sparse()
    assert Fingerprint(part) != Fingerprint(part)


def test_an_address_that_is_used_again_is_no_identity():
    """A function's memory may go to the next one; only references that are held tell them apart."""
    box = Box(None)

    def made():
        return lambda hidden: hidden

    prints = []
    for _ in range(20):
        box.value = made()
        prints.append(Fingerprint(box))
    assert all(one != two for place, one in enumerate(prints) for two in prints[:place])


def test_nothing_is_kept_alive():
    def closing(over):
        return lambda: over

    part = Part()
    part.closure = closing(part)
    found, alive = Fingerprint(part), weakref.ref(part)
    del part
    gc.collect()
    assert alive() is None
    assert found == found


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_models_own_passes_leave_it_as_it_is(name):
    family = tiny.build(name)
    decoder = load_target(family.model).decoder
    before = Fingerprint(decoder)
    family.model.generate(**family.prompt(0, seed=1), max_new_tokens=3)
    assert Fingerprint(decoder) == before


def test_a_config_is_part_of_it():
    family = tiny.build("llava")
    decoder = family.model.model.language_model
    before = Fingerprint(decoder)
    decoder.config._attn_implementation = "eager"
    assert Fingerprint(decoder) != before

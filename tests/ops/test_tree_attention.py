"""tree_attention: whom a node sees, how well it sums, and what it must never read or write."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.conftest import available
from tests.ops.test_rope_append import tables
from vispec import _native
from vispec.ops import Tail, rope_append, serves_tree_attention, tree_attention, use_backend

HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.sanitize)]


@dataclass
class Case:
    """Sizes of one call. The T nodes stand in the last T of offset + T tail slots."""

    lengths: list[int]
    T: int
    H: int = 2
    G: int = 2
    D: int = 64
    L: int = 400
    offset: int = 0
    spread: float = 2.0  # of the queries: how sharp the weights are

    @property
    def B(self) -> int:
        return len(self.lengths)

    @property
    def S(self) -> int:
        return self.offset + self.T


@dataclass
class Inputs:
    queries: Tensor
    keys: Tensor
    values: Tensor
    ancestors: Tensor
    lengths: Tensor
    seen: Tensor = field(repr=False)  # [B, T, L] bool, made from the chains and not from the words

    def arguments(self) -> tuple[Tensor, ...]:
        return self.queries, self.keys, self.values, self.ancestors, self.lengths


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random trees in the tail, one chain of earlier slots a node; NaN in every slot that no node sees.

    Queries are a view of [B, T, H * D] projections, the caches have gaps between their slots.
    """
    c, generator = case, torch.Generator().manual_seed(seed)
    seen = torch.zeros(c.B, c.T, c.L, dtype=torch.bool)
    words = torch.zeros(c.B, c.T, (c.S + 63) // 64, dtype=torch.int64)
    for b, length in enumerate(c.lengths):
        seen[b, :, :length] = True
        parent = [int(torch.randint(-1, slot, (), generator=generator)) if slot else -1 for slot in range(c.S)]
        for t in range(c.T):
            slot = c.offset + t
            while slot >= 0:
                if length + slot < c.L:
                    seen[b, t, length + slot] = True
                bit = 1 << slot % 64
                words[b, t, slot // 64] |= bit - (1 << 64) if bit >> 63 else bit
                slot = parent[slot]
    queries = torch.randn(c.B, c.T, c.H * c.D, generator=generator).mul_(c.spread).to(dtype)
    caches = torch.randn(2, c.B, c.G, c.L, c.D + 8, generator=generator).to(dtype)
    caches[1] += 0.2
    caches.masked_fill_(~seen.any(1)[None, :, None, :, None], torch.nan)
    caches[..., c.D :] = torch.nan
    keys, values = caches[..., : c.D]
    return Inputs(queries.view(c.B, c.T, c.H, c.D).transpose(1, 2), keys, values, words, torch.tensor(c.lengths), seen)


def poisoned(inputs: Inputs, gap: int = 8) -> Tensor:
    """A [B, H, T, D] view of NaN rows [B, T, H * D + gap]."""
    B, H, T, D = inputs.queries.shape
    rows = torch.full((B, T, H * D + gap), torch.nan, dtype=inputs.queries.dtype)
    return rows[..., : H * D].unflatten(2, (H, D)).transpose(1, 2)


def call(backend, inputs: Inputs, **options) -> Tensor:
    """The output, in memory that starts as NaN."""
    return backend.run(tree_attention, *inputs.arguments(), output=poisoned(inputs), **options)["output"]


def plain(inputs: Inputs, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """PyTorch's own attention over the same slots, zeros where nobody looks."""
    group = inputs.queries.shape[1] // inputs.keys.shape[1]
    keys, values = (
        cache.nan_to_num(0.0).to(dtype).repeat_interleave(group, dim=1) for cache in (inputs.keys, inputs.values)
    )
    return F.scaled_dot_product_attention(
        inputs.queries.to(dtype), keys, values, attn_mask=inputs.seen[:, None], scale=scale
    )


def check(backend, case: Case, dtype: torch.dtype, **options) -> None:
    inputs = make(case, dtype)
    got = call(backend, inputs, offset=case.offset, **options)
    exact = plain(inputs, torch.float64, **options)
    error = (got.double() - exact).abs().max()
    bound = (plain(inputs, dtype, **options).double() - exact).abs().max()
    assert float(error) <= 2 * float(bound), f"{case}: error {error:.3g}, PyTorch's {bound:.3g}"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "case",
    [
        Case([0], T=1, L=40),  # the first token of all
        Case([63, 321], T=30, D=128, L=400),  # one word; a partial and several full tiles
        Case([64, 1, 650], T=5, H=8, G=2, L=700),  # groups of 4; three runs of keys
        Case([65], T=8, offset=16, H=7, G=1, D=80, L=90),  # a draft level: fewer nodes than tail slots
        Case([120], T=9, H=8, G=1, D=96, L=130),  # 72 packed rows: a second, partial row block
        Case([100, 0], T=65, H=1, G=1, L=200),  # two words, more than one row block
        Case([300], T=60, H=4, G=4, L=600),
        Case([30], T=256, H=2, G=1, L=290),  # four words
        Case([300], T=3, offset=253, H=2, G=1, L=600),
        Case([20], T=3, offset=140, H=2, G=1, L=200),  # three
        Case([250], T=4, D=256, L=300),  # the largest head
        Case([70, 3], T=33, H=1, G=1, D=256, L=110),  # and more than 32 packed rows of it
        Case([0, 700, 40], T=2, H=16, G=2, D=128, L=800),  # 16 packed rows: the most of the smallest block
        Case([70], T=1, H=17, G=1, L=130),  # and one more
        Case([4300], T=1, H=1, G=1, L=4400),  # more runs of keys than a warp has lanes
        Case([22], T=8, H=4, G=4, D=128, L=30),  # up to the cache's last slot
        Case([200, 77], T=1, H=7, G=1, D=128, L=320),  # plain decoding, ragged
        Case([260], T=30, L=600, spread=40.0),  # nearly one-hot weights
    ],
    ids=lambda value: f"T{value.T}-H{value.H}-G{value.G}-D{value.D}" if isinstance(value, Case) else None,
)
def test_error_is_at_most_twice_that_of_torch(backend, dtype, case):
    check(backend, case, dtype)


@pytest.mark.parametrize("length", [0, 1, 33, 34, 35, 63, 64, 65, 127, 128, 191, 192, 226, 227, 256, 320, 511, 512])
def test_tiles_and_runs_end_anywhere_in_the_tail(backend, length):
    check(backend, Case([length], T=30, H=1, G=1, L=600), torch.float16)


def test_float32_takes_the_reference(backend):
    inputs = make(Case([70, 0, 33], T=9, H=4, L=90), torch.float32)
    torch.testing.assert_close(call(backend, inputs).double(), plain(inputs, torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_scale(backend, scale):
    check(backend, Case([90], T=7, L=200), torch.float16, scale=scale)


def test_nothing_but_the_output_is_written(backend):
    inputs = make(Case([40, 90], T=6, H=3, G=1, L=120), torch.bfloat16)
    before = [tensor.clone() for tensor in inputs.arguments()]
    output = poisoned(inputs)
    back = backend.run(tree_attention, *inputs.arguments(), output=output)
    for old, new in zip(before, back["positional"], strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
    B, H, T, D = output.shape
    whole = back["output"].as_strided((B, T, H * D + 8), (T * (H * D + 8), H * D + 8, 1), 0)
    assert whole[..., : H * D].isfinite().all() and whole[..., H * D :].isnan().all()


def test_the_stride_of_a_single_element_does_not_count(backend):
    inputs = make(Case([20], T=1, H=1, G=1, L=60), torch.float16)
    expected = call(backend, inputs)
    inputs.queries = inputs.queries.as_strided((1, 1, 1, 64), (3, 1, 5, 1), inputs.queries.storage_offset())
    assert torch.equal(call(backend, inputs), expected)


def test_rows_that_see_nothing_are_zeros(backend):
    """Padding of a tree: no word set. Behind committed slots such a row sees those alone."""
    inputs = make(Case([0, 50], T=70, H=2, G=1, L=150), torch.float16)
    inputs.ancestors[:, [1, 40, 69]] = 0
    got = call(backend, inputs)
    assert bool((got[0, :, [1, 40, 69]] == 0).all()) and bool(got.isfinite().all())
    committed = make(Case([50], T=1, H=2, G=1, L=150), torch.float16)
    committed.queries = inputs.queries[1:, :, 40:41]
    committed.keys, committed.values = inputs.keys[1:], inputs.values[1:]
    committed.seen = torch.arange(150) < torch.full((1, 1, 1), 50)
    expected = plain(committed, torch.float64)
    torch.testing.assert_close(got[1:, :, 40:41].double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("T", "H", "D"), [(3, 2, 64), (30, 2, 64), (4, 2, 256)])
@pytest.mark.parametrize("slot", [5, 21])
def test_what_sees_nan_becomes_nan_and_nothing_else(backend, T, H, D, slot):
    """As in PyTorch, so that a broken model is noticed; in a committed slot all nodes see it."""
    inputs = make(Case([20], T=T, H=H, G=1, D=D, L=600), torch.bfloat16)
    expected = call(backend, inputs)
    inputs.keys[0, 0, slot, 7] = torch.nan
    seen = inputs.seen[0, :, slot]
    got = call(backend, inputs)
    assert bool(got[0][:, seen].isnan().all()) and bool(seen.any()) and bool(seen.all()) == (slot < 20)
    torch.testing.assert_close(got[0][:, ~seen], expected[0][:, ~seen], rtol=0, atol=0)


def test_bits_beyond_the_tail_count_for_nothing(backend):
    inputs = make(Case([20], T=5, L=200), torch.bfloat16)
    expected = call(backend, inputs)
    inputs.ancestors |= -1 << 5
    assert torch.equal(call(backend, inputs), expected)


@pytest.mark.parametrize(("T", "offset"), [(5, 0), (8, 60), (70, 120)])
def test_any_words_are_followed_bit_by_bit(backend, T, offset):
    """Stale ones too, in which nodes see later nodes and not themselves."""
    case = Case([37, 0], T=T, offset=offset, H=4, G=2, L=260)
    inputs = make(case, torch.bfloat16)
    generator = torch.Generator().manual_seed(T)
    inputs.ancestors.random_(generator=generator).bitwise_xor_(inputs.ancestors << 1)
    for b, length in enumerate(case.lengths):
        for cache in (inputs.keys, inputs.values):
            fresh = cache[b, :, length : length + case.S]
            fresh.copy_(torch.randn(fresh.shape, generator=generator))
        bits = inputs.ancestors[b, :, :, None] >> torch.arange(64) & 1
        inputs.seen[b, :, length : length + case.S] = bits.flatten(1)[:, : case.S].bool()
    got = call(backend, inputs, offset=offset)
    exact = plain(inputs, torch.float64)
    bound = (plain(inputs, torch.bfloat16).double() - exact).abs().max()
    assert float((got.double() - exact).abs().max()) <= 2 * float(bound)


@pytest.mark.parametrize("stale", [-1, -(1 << 63), 201, 1 << 40, (1 << 63) - 1])
def test_stale_lengths_are_taken_as_the_nearest_possible(backend, stale):
    """A graph's warm-up may find anything there; the row beside it must not notice."""
    inputs = make(Case([30, 44], T=5, L=200), torch.float16)
    inputs.keys[1], inputs.values[1] = 0.5, 0.25
    inputs.lengths[1] = stale
    got = call(backend, inputs)
    assert torch.equal(got[0], call(backend, make(Case([30, 44], T=5, L=200), torch.float16))[0])
    torch.testing.assert_close(got[1], torch.full_like(got[1], 0.25), rtol=1e-3, atol=0)


@pytest.mark.parametrize("T", [1, 30])
def test_the_same_bits_whatever_the_other_rows_hold(backend, T):
    case = Case([333, 40], T=T, H=4, G=1, L=600)
    inputs = make(case, torch.bfloat16)
    first = call(backend, inputs)
    assert torch.equal(call(backend, inputs), first)
    other = make(Case([333, 570 - T], T=T, H=4, G=1, L=600), torch.bfloat16, seed=5)
    for mine, theirs in zip(inputs.arguments(), other.arguments(), strict=True):
        mine[1] = theirs[1]
    again = call(backend, inputs)
    assert torch.equal(again[0], first[0]) and not torch.equal(again[1], first[1])


def test_a_length_of_zero_and_a_row_of_its_own(backend):
    """A node that sees only itself returns its own value, exactly."""
    inputs = make(Case([0, 0], T=3, H=2, G=2, L=8), torch.bfloat16)
    inputs.ancestors[:] = torch.tensor([1, 2, 4])[:, None]
    assert torch.equal(call(backend, inputs), inputs.values[:, :, :3])


def test_where_there_is_a_kernel():
    """What serves says before the call is what the call needs; the reference alone serves nothing."""
    available("emulated")
    inputs = make(Case([5], T=4, L=32), torch.float16)
    tensors = inputs.queries, inputs.keys, inputs.values

    def served(queries: Tensor = tensors[0], keys: Tensor = tensors[1], values: Tensor = tensors[2]) -> bool:
        return serves_tree_attention(queries, keys, values)

    assert not served()
    with use_backend("reference"):
        assert not served()
    with use_backend("emulated"):
        assert served()
        assert not served(*(tensor.float() for tensor in tensors))
        assert not served(queries=tensors[0].bfloat16())
        assert not served(values=half(1, 2, 32, 80))  # latent attention
        assert not served(values=half(1, 2, 32, 64))  # other strides
        assert not served(queries=half(1, 2, 257, 64))
        assert not served(half(1, 2, 4, 48), half(1, 2, 32, 48), half(1, 2, 32, 48))
        assert not served(queries=half(1, 2, 4, 68)[..., 2:66])
        wide = half(1, 2, 4, 256), half(1, 2, 32, 256), half(1, 2, 32, 256)
        assert served(*wide)


@pytest.fixture
def desktop():
    """The emulated module on a device whose blocks get 99 KiB of shared memory; a launch that asks for more aborts."""
    available("emulated")
    module = _native.emulated("tests")
    module.set_shared_limit(99 << 10)
    yield module
    module.set_shared_limit(227 << 10)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "case",
    [
        Case([100, 31], T=9, H=8, G=2, D=256, L=140),  # 36 packed rows: a second block, of one row tile
        Case([290], T=65, D=256, L=400),  # two words, three row blocks, two runs
        Case([90], T=60, D=128, L=160),
    ],
    ids=lambda value: f"T{value.T}-D{value.D}" if isinstance(value, Case) else None,
)
def test_a_desktop_gpu_serves_every_head(desktop, dtype, case):
    check(available("emulated"), case, dtype)


def test_a_block_is_as_large_as_the_device_allows(desktop):
    """64 rows of head 256 are one block of a large device and two of a small one, hence half as many runs of keys."""
    sizes = {"B": 1, "H": 64, "G": 1, "T": 1, "L": 1 << 20}
    runs = {}
    for kib in (99, 163, 227):
        desktop.set_shared_limit(kib << 10)
        runs[kib] = [
            desktop.tree_attention_workspace_bytes(**sizes, head=head) // (4 * 64 * (head + 2)) for head in (128, 256)
        ]
    assert runs == {99: [264, 132], 163: [264, 132], 227: [264, 264]}


def with_tail(case: Case, dtype: torch.dtype, *, R: int, biases: bool) -> tuple[Inputs, Tail]:
    """The nodes' own keys and values as projections, and NaN in the slots that they are to fill."""
    inputs, generator = make(case, dtype), torch.Generator().manual_seed(1)
    B, H, G, T, D = case.B, case.H, case.G, case.T, case.D

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    for b, length in enumerate(case.lengths):
        inputs.keys[b, :, length + case.offset :] = inputs.values[b, :, length + case.offset :] = torch.nan
    new = draw(2, B, T, G * D + 8)[..., : G * D].unflatten(3, (G, D)).transpose(2, 3)
    cosines, sines = (table.to(dtype) for table in tables(B, T, R, generator))
    bias = (draw(H * D), draw(G * D), draw(G * D)) if biases else (None, None, None)
    return inputs, Tail(new[0], new[1], cosines, sines, *bias)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    ("case", "R"),
    [
        (Case([0], T=1, L=40), 64),
        (Case([63, 321], T=30, D=128, L=400), 128),
        (Case([100, 0, 59], T=65, H=2, G=1, L=200), 32),  # three row blocks, half of the columns
        (Case([65, 3], T=8, offset=24, H=7, G=1, D=80, L=110), 80),  # a draft level behind three others
        (Case([250], T=12, H=4, G=2, D=96, L=700), 96),  # the tail lies in two runs of keys
        (Case([120], T=5, H=4, G=1, D=256, L=128), 256),
        (Case([300, 63], T=2, H=7, G=1, D=128, L=400), 128),  # 14 packed rows: warps share the keys of a tile
        (Case([22, 30], T=8, H=4, G=4, L=32), 64),  # up to the last slot, and beyond it
        (Case([10], T=8, offset=24, H=8, G=1, L=32), 64),  # no new token has a slot
    ],
    ids=lambda value: f"T{value.T}-H{value.H}-D{value.D}" if isinstance(value, Case) else None,
)
def test_a_tail_is_rope_append_and_attention_in_one(backend, dtype, biases, case, R):
    """The same bits in the output and in both caches; the cache's NaN in fresh slots are never read."""
    inputs, tail = with_tail(case, dtype, R=R, biases=biases)
    queries, keys, values, ancestors, lengths = inputs.arguments()
    rotated = torch.full_like(queries, torch.nan)
    done = backend.run(rope_append, queries, tail, keys, values, lengths, output=rotated, offset=case.offset)
    apart = Inputs(done["output"], *done["positional"][2:4], ancestors, lengths, inputs.seen)
    expected = call(backend, apart, offset=case.offset)
    back = backend.run(tree_attention, *inputs.arguments(), output=poisoned(inputs), offset=case.offset, tail=tail)
    pairs = zip((back["output"], *back["positional"][1:3]), (expected, *done["positional"][2:4]), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert bool(back["output"].isfinite().all())


@pytest.mark.parametrize("stale", [-7, 30, 1 << 50])
def test_a_tail_behind_a_stale_length(backend, stale):
    inputs, tail = with_tail(Case([8, 8], T=4, L=16), torch.float16, R=64, biases=True)
    inputs.keys[1], inputs.values[1] = 0, 0
    inputs.lengths[1] = stale
    back = backend.run(tree_attention, *inputs.arguments(), output=poisoned(inputs), tail=tail)
    fresh = (back["positional"][1][1] != 0).any(-1).any(0).nonzero()[:, 0].tolist()
    assert fresh == (list(range(4)) if stale < 0 else [])
    assert bool(back["output"].isfinite().all())


def valid(dtype: torch.dtype = torch.float16) -> dict:
    inputs = make(Case([5, 9], T=4, H=4, G=2, L=32), dtype)
    names = ("queries", "keys", "values", "ancestors", "lengths")
    return dict(zip(names, inputs.arguments(), strict=True)) | {"output": poisoned(inputs, gap=0)}


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": half(4, 4, 64)}, r"queries must be float32, float16 or bfloat16 \[B, H, T, D\], got float16 \[4"),
        ({"queries": half(2, 4, 4, 64).double()}, r"queries must be .*, got float64 \[2, 4, 4, 64\]"),
        ({"queries": half(2, 4, 4, 48)}, "head width D must be one of 64, 80, 96, 128, 256, got 48"),
        ({"queries": half(2, 4, 257, 64)}, "T must be from 1 to 256, got 257"),
        ({"offset": 253}, "offset must be from 0 to 252, got 253"),
        ({"offset": -1}, "offset must be from 0 to 252, got -1"),
        ({"offset": 61}, r"ancestors must be int64 \[B, T, W\] = \[2, 4, 2\], got int64 \[2, 4, 1\]"),
        ({"keys": half(2, 2, 32, 80)}, r"keys must be float16 \[B, G, L, D\] = \[2, 2, 32, 64\], got"),
        ({"values": half(2, 2, 31, 64)}, r"values must be float16 \[B, G, L, D\] = \[2, 2, 32, 64\], got"),
        ({"values": half(2, 2, 32, 64)}, "keys and values must have equal strides"),
        ({"keys": half(2, 3, 32, 64), "values": half(2, 3, 32, 64)}, "H a multiple of G"),
        ({"output": half(2, 4, 4, 64).bfloat16()}, r"output must be float16 \[B, H, T, D\]"),
        ({"lengths": torch.zeros(2)}, r"lengths must be int64 \[B\] = \[2\], got float32 \[2\]"),
        ({"lengths": torch.zeros(4).long()[::2]}, "lengths must be contiguous"),
        ({"queries": half(2, 4, 4, 128)[..., ::2]}, "queries must have a contiguous last dimension"),
        ({"queries": half(2, 4, 4, 68)[..., :64]}, "queries must have .* strides that are multiples of 8"),
        ({"queries": half(2, 4, 4, 72)[..., 4:68]}, "queries must have .* at a multiple of 16 bytes"),
        ({"output": half(2, 4, 4, 65)[..., :64]}, "output must have .* strides that are multiples of 8"),
        ({"tail": 5}, "tail must be a Tail, got int 5"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"scale": float("inf")}, "scale must be positive and finite, got inf"),
    ],
)
def test_errors(change, message):
    arguments = valid() | change
    with pytest.raises(ValueError, match=f"tree_attention: .*{message}"):
        tree_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": half(2, 2, 5, 64)}, r"tail.keys must be float16 \[B, G, T, D\] = \[2, 2, 4, 64\], got"),
        (
            {"cosines": half(2, 4, 24), "sines": half(2, 4, 24)},
            "tail.cosines must have a multiple of 16 columns, got 24",
        ),
        ({"key_bias": torch.zeros(129).half()[1:]}, "tail.key_bias must have .* at a multiple of 16 bytes"),
        (
            {name: half(2, 2, 4, 68)[..., :64] for name in ("keys", "values")},
            "tail.keys must have .* strides that are multiples of 8",
        ),
    ],
)
def test_errors_of_a_tail(change, message):
    tail = Tail(half(2, 2, 4, 64), half(2, 2, 4, 64), half(2, 4, 64), half(2, 4, 64))._replace(**change)
    with pytest.raises(ValueError, match=f"tree_attention: {message}"):
        tree_attention(**valid(), tail=tail)

"""path_attention: as good as tree_attention, and the same bits wherever a path lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.conftest import available
from tests.ops.test_tree_attention import Case, Inputs, make, plain, poisoned
from vispec.ops import PATH_NODES, path_attention

HALF = [torch.float16, torch.bfloat16]


def call(backend, inputs: Inputs, **options) -> Tensor:
    """The output, in memory that starts as NaN: the workspace's too."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    try:
        back = backend.run(path_attention, *inputs.arguments(), output=poisoned(inputs), **options)
    finally:
        torch.use_deterministic_algorithms(False)
    return back["output"]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case([0], T=1, L=40), torch.float16),  # the first token of all
        (Case([63, 321], T=30, D=128, L=400), torch.bfloat16),  # nothing sealed; two runs
        (Case([110, 111, 113], T=5, H=8, G=2, L=130), torch.float16),  # the first tile is sealed for some nodes
        (Case([172, 420], T=8, H=2, G=2, L=440), torch.bfloat16),  # a further tile, in the same run and in another
        (Case([120], T=9, H=8, G=1, D=96, L=140), torch.bfloat16),  # 72 packed rows: a second, partial row block
        (Case([250], T=PATH_NODES, H=7, G=1, D=80, L=298), torch.float16),  # up to the cache's last slot
        (Case([190], T=3, D=256, L=260), torch.bfloat16),  # the largest head: tiles of 32 keys
        (Case([700, 0], T=2, H=4, G=2, L=720, spread=40.0), torch.float16),  # three runs; nearly one-hot weights
        (Case([170, 40], T=12, H=4, G=2, L=200), torch.float32),
        (Case([170], T=12, H=4, G=2, D=16, L=200), torch.bfloat16),  # a width without a kernel
    ],
    ids=str,
)
def test_error_is_at_most_twice_that_of_torch(backend, case, dtype):
    inputs = make(case, dtype)
    exact = plain(inputs, torch.float64)
    error = (call(backend, inputs).double() - exact).abs().max()
    assert float(error) <= 2 * float((plain(inputs, dtype).double() - exact).abs().max())


def test_scale(backend):
    inputs = make(Case([180], T=7, L=200), torch.float16)
    exact = plain(inputs, torch.float64, scale=0.3)
    error = (call(backend, inputs, scale=0.3).double() - exact).abs().max()
    assert float(error) <= 2 * float((plain(inputs, torch.float16, scale=0.3).double() - exact).abs().max())


class Path:
    """A query and the keys and values of its path, to be laid into caches and trees of any kind."""

    def __init__(self, seen: int, dtype: torch.dtype, H: int, G: int, D: int) -> None:
        generator = torch.Generator().manual_seed(seen)
        self.query = (2 * torch.randn(H, D, generator=generator)).to(dtype)
        self.keys, self.values = torch.randn(2, G, seen, D, generator=generator).to(dtype)
        self.seen = seen

    def laid(self, committed: int, T: int, seed: int) -> tuple[Inputs, int, int]:
        """Inputs of two rows that hold the path in one place or another, its row and its node.

        All but `committed` slots lie in the tail, at any of T places in order, between nodes with paths of their own.
        """
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randint(0, 90, (4,), generator=generator).tolist()
        b, (H, D), G = draw[0] % 2, self.query.shape, len(self.keys)
        L = self.seen + T + 8 * draw[1]
        own = sorted(torch.randperm(T, generator=generator)[: self.seen - committed].tolist())
        others = make(Case([draw[2], draw[3]], T=T, H=H, G=G, D=D, L=L), self.query.dtype, seed)
        others.lengths[b] = committed
        words = [1 << node | int(torch.randint(0, 1 << node, (), generator=generator)) for node in range(T)]
        words[own[-1]] = sum(1 << node for node in own)
        others.ancestors[b, :, 0] = torch.tensor(words)
        for store, part in ((others.keys, self.keys), (others.values, self.values)):
            store[b] = torch.randn(G, L, D, generator=generator)
            store[b, :, committed + T :] = torch.nan
            store[b, :, :committed] = part[:, :committed]
            store[b, :, [committed + node for node in own]] = part[:, committed:]
        others.queries[b, :, own[-1]] = self.query
        return others, b, own[-1]


@pytest.mark.parametrize(
    ("seen", "T", "dtype"),
    [
        (9, 9, torch.bfloat16),  # all of it may lie in the tail
        (111, 12, torch.float16),  # the last before a tile is sealed
        (112, 12, torch.bfloat16),  # the first one behind
        (175, 12, torch.bfloat16),  # one tile is sealed, and for deeper nodes one more of its run
        (200, 12, torch.bfloat16),
        (311, PATH_NODES, torch.float16),  # as deep as can be; one more run for other nodes
        (380, 12, torch.bfloat16),  # two runs
        (200, 12, torch.float32),
    ],
)
def test_the_same_bits_wherever_the_path_lies(backend, seen, T, dtype):
    path = Path(seen, dtype, H=4, G=2, D=64)
    found = []
    for seed, share in enumerate((1, T, T // 2, T - 1, 2)):
        inputs, b, node = path.laid(seen - share, T, seed)
        found.append(call(backend, inputs)[b, :, node])
    assert found[0].isfinite().all()
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.parametrize("D", [80, 96, 128, 256])
def test_the_same_bits_for_every_head(backend, D):
    path = Path(180, torch.bfloat16, H=3, G=1, D=D)
    found = []
    for seed, share in enumerate((1, 6)):
        inputs, b, node = path.laid(180 - share, 8, seed)
        found.append(call(backend, inputs)[b, :, node])
    assert torch.equal(*found) and found[0].isfinite().all()


def test_what_a_path_holds_and_in_which_order_does_count(backend):
    """The other tests would pass for an op that reads nothing."""
    path = Path(140, torch.float16, H=4, G=2, D=64)
    inputs, b, node = path.laid(136, 8, 0)
    first = call(backend, inputs)[b, :, node]
    for place in (0, 63, 64, 139):
        changed = Path(140, torch.float16, H=4, G=2, D=64)
        changed.values[:, place] += 8
        changed.keys[:, place] = changed.query[::2]
        inputs, b, node = changed.laid(136, 8, 0)
        assert not torch.equal(call(backend, inputs)[b, :, node], first)


def test_rows_that_see_nothing_are_zeros(backend):
    inputs = make(Case([0, 150], T=8, H=2, G=1, L=170), torch.float16)
    inputs.ancestors[:, 3] = 0
    got = call(backend, inputs)
    assert bool((got[0, :, 3] == 0).all()) and bool((got[1, :, 3] != 0).any()) and bool(got.isfinite().all())


@pytest.mark.parametrize("slot", [5, 149, 152])
def test_what_sees_nan_becomes_nan_and_nothing_else(backend, slot):
    """In a sealed slot, in a committed one of the newest, and in the tail."""
    inputs = make(Case([150], T=9, H=2, G=1, L=180), torch.bfloat16)
    expected = call(backend, inputs)
    inputs.keys[0, 0, slot, 7] = torch.nan
    seen = inputs.seen[0, :, slot]
    got = call(backend, inputs)
    assert bool(got[0][:, seen].isnan().all()) and bool(seen.any()) and bool(seen.all()) == (slot < 150)
    assert torch.equal(got[0][:, ~seen], expected[0][:, ~seen])


def test_keys_at_minus_infinity_count_for_nothing(backend):
    """All sealed ones are: a run that is read finds no weight at all."""
    inputs = make(Case([130], T=3, H=4, G=2, L=150), torch.float16)
    inputs.queries = inputs.queries.abs() + 0.1
    inputs.keys[:, :, :64] = -torch.inf
    inputs.seen[..., :64] = False
    torch.testing.assert_close(call(backend, inputs).double(), plain(inputs, torch.float64), rtol=2e-3, atol=2e-3)


def test_a_node_whose_keys_are_all_at_minus_infinity_gets_zeros(backend):
    inputs = make(Case([130, 20], T=3, H=4, G=2, L=150), torch.float16)
    inputs.queries = inputs.queries.abs() + 0.1
    expected = call(backend, inputs)
    inputs.keys[0] = -torch.inf
    got = call(backend, inputs)
    assert bool((got[0] == 0).all()) and torch.equal(got[1], expected[1])


def test_bits_beyond_the_tail_count_for_nothing(backend):
    inputs = make(Case([120], T=5, L=200), torch.bfloat16)
    expected = call(backend, inputs)
    inputs.ancestors |= -1 << 5
    assert torch.equal(call(backend, inputs), expected)


@pytest.mark.parametrize("stale", [-1, -(1 << 63), 201, 1 << 40, (1 << 63) - 1])
def test_stale_lengths_are_taken_as_the_nearest_possible(backend, stale):
    """A graph's warm-up may find anything there; the row beside it must not notice."""
    inputs = make(Case([130, 144], T=5, L=200), torch.float16)
    expected = call(backend, inputs)
    inputs.keys[1], inputs.values[1] = 0.5, 0.25
    inputs.lengths[1] = stale
    got = call(backend, inputs)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], torch.full_like(got[1], 0.25), rtol=1e-3, atol=0)


def test_nothing_but_the_output_is_written(backend):
    inputs = make(Case([40, 190], T=6, H=3, G=1, L=220), torch.bfloat16)
    before = [tensor.clone() for tensor in inputs.arguments()]
    output = poisoned(inputs)
    back = backend.run(path_attention, *inputs.arguments(), output=output)
    for old, new in zip(before, back["positional"], strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
    B, H, T, D = output.shape
    whole = back["output"].as_strided((B, T, H * D + 8), (T * (H * D + 8), H * D + 8, 1), 0)
    assert whole[..., : H * D].isfinite().all() and whole[..., H * D :].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: setattr(i, "queries", i.queries.double()), "queries must be float32, float16 or bfloat16"),
        (lambda i: setattr(i, "keys", i.keys[..., :48]), r"keys must be float16 \[B, G, L, D\]"),
        (lambda i: setattr(i, "values", i.values.float()), "values must be float16"),
        (lambda i: setattr(i, "values", i.values.contiguous()), "keys and values must have equal strides"),
        (lambda i: setattr(i, "ancestors", i.ancestors.repeat(1, 1, 2)), "ancestors must be int64"),
        (lambda i: setattr(i, "lengths", i.lengths.int()), "lengths must be int64"),
        (lambda i: setattr(i, "queries", i.queries[:, :1]), "output must be float16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    inputs = make(Case([20], T=4, L=60), torch.float16)
    output = poisoned(inputs)
    change(inputs)
    with pytest.raises(ValueError, match=f"path_attention: {message}"):
        path_attention(*inputs.arguments(), output=output)


def test_sizes_and_addresses_that_do_not_fit_are_refused():
    inputs = make(Case([20], T=PATH_NODES + 1, L=90), torch.float16)
    with pytest.raises(ValueError, match="path_attention: T must be from 1 to 48, got 49"):
        path_attention(*inputs.arguments(), output=poisoned(inputs))
    inputs = make(Case([20], T=4, H=3, G=2, L=60), torch.float16)
    with pytest.raises(ValueError, match="H a multiple of G"):
        path_attention(*inputs.arguments(), output=poisoned(inputs))
    inputs = make(Case([20], T=4, L=60), torch.float16)
    with pytest.raises(ValueError, match="scale must be positive and finite, got nan"):
        path_attention(*inputs.arguments(), output=poisoned(inputs), scale=float("nan"))
    backend = available("emulated")
    with pytest.raises(ValueError, match="path_attention: output must have a contiguous last dimension"):
        backend.run(path_attention, *inputs.arguments(), output=poisoned(inputs, gap=1))

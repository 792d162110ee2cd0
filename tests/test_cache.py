"""The key-value cache: what a round commits, what moves on with it, and taking over another's tokens."""

from __future__ import annotations

import pytest
import torch

from tests.tape import poison
from vispec import ops
from vispec.cache import KeyValueCache


def filled(widths: tuple[int, int], slots: int = 12) -> KeyValueCache:
    """Two layers, two rows of 3 and 5 committed tokens; every number says which slot it lies in."""
    places = torch.arange(slots, dtype=torch.float32)[:, None]
    keys, values = ([places.expand(2, 2, -1, width).clone() for _ in range(2)] for width in widths)
    return KeyValueCache(torch.tensor([3, 5]), keys, values)


@pytest.mark.parametrize("known", [True, False], ids=["the host knows the lengths", "fixed"])
@pytest.mark.parametrize("widths", [(4, 4), (6, 3)], ids=["alike", "keys and values of different widths"])
def test_a_commit_moves_rows_and_state_once(widths, known):
    cache = filled(widths)
    if not known:
        cache.fix(12)
    cache.begin(6)
    path, emitted = torch.tensor([[0, 2, 5], [0, 4, -1]]), torch.tensor([[70, 71, 72], [80, 81, -1]])
    positions, remaining, roots = torch.tensor([9, 9]), torch.tensor([20, 20]), torch.tensor([1, 2])
    features = torch.arange(12, dtype=torch.float32).view(2, 6, 1)
    gather = ops.Gather(features, torch.full((2, 3, 1), torch.nan), torch.full((2, 3), -5))
    counts = torch.tensor([3, 2])
    state = {"positions": positions, "remaining": remaining, "roots": roots}
    cache.commit(path, emitted, counts, [3, 2] if known else None, **state, gather=gather)
    assert cache.lengths.tolist() == [6, 7] and cache.host_lengths == ([6, 7] if known else None)
    assert [part.tolist() for part in (positions, remaining, roots)] == [[12, 11], [17, 18], [72, 81]]
    for store in (*cache.keys, *cache.values):
        assert store[0, 1, :, -1].tolist() == [0, 1, 2, 3, 5, 8, 6, 7, 8, 9, 10, 11]
        assert store[1, 1, :, -1].tolist() == [0, 1, 2, 3, 4, 5, 9, 7, 8, 9, 10, 11]
    assert gather.picked.flatten().tolist() == [0, 2, 5, 6, 10, 0]
    assert gather.tokens.tolist() == [[70, 71, 72], [80, 81, 0]]


def test_a_root_alone_moves_nothing_but_the_state(monkeypatch):
    """Plain decoding commits no row that is not in its place, and one that is finished not even that."""
    calls, op = [], ops.commit
    monkeypatch.setattr(
        ops, "commit", lambda tensors, *rest, **named: (calls.append(len(tensors)), op([], *rest, **named))
    )
    cache = filled((4, 4))
    positions, remaining, roots = torch.tensor([9, 9]), torch.tensor([20, 20]), torch.tensor([1, 2])
    for turn in range(2):
        cache.begin(1)
        one = torch.tensor([[0], [-1]])
        cache.commit(one, one + 70, torch.tensor([1, 0]), [1, 0], positions=positions, remaining=remaining, roots=roots)
        assert cache.host_lengths == cache.lengths.tolist() == [4 + turn, 5]
    assert [part.tolist() for part in (positions, remaining, roots)] == [[11, 9], [18, 20], [70, 2]]
    assert calls == [0, 0]


def made(lengths: list[int], capacity: int, layers: int = 2, heads: int = 3, width: int = 4, dtype=torch.float32):
    def stores():
        return [torch.randn(len(lengths), heads, capacity, width).to(dtype) for _ in range(layers)]

    return KeyValueCache(torch.tensor(lengths), stores(), stores())


@pytest.mark.parametrize("capacity", [7, 9, 20])
def test_it_holds_what_the_other_held_and_zeros_behind(capacity):
    own, other = made([2, 5], capacity), made([7, 3], 9)
    memory = [tensor.data_ptr() for tensor in (*own.keys, *own.values, own.lengths)]
    own.fix(capacity)
    for tensor in (*own.keys, *own.values, own.lengths):
        poison(tensor)
    assert own.load(other)
    assert [tensor.data_ptr() for tensor in (*own.keys, *own.values, own.lengths)] == memory
    assert own.host_lengths == [7, 3] == own.lengths.tolist()
    for store, given in zip((*own.keys, *own.values), (*other.keys, *other.values), strict=True):
        assert torch.equal(store[:, :, :7], given[:, :, :7])
        assert not store[:, :, 7:].any()
    own.host_lengths[0] = 1
    assert other.host_lengths == [7, 3]


@pytest.mark.parametrize(
    "other",
    [
        made([7, 3], 9),
        made([2, 3, 1], 9),
        made([2, 3], 9, layers=3),
        made([2, 3], 9, layers=1),
        made([2, 3], 9, heads=2),
        made([2, 3], 9, width=8),
        made([2, 3], 9, dtype=torch.float16),
    ],
    ids=["too long", "rows", "more layers", "fewer layers", "heads", "width", "dtype"],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(other):
    own = made([2, 5], 6)
    before = [tensor.clone() for tensor in (*own.keys, *own.values, own.lengths)]
    assert not own.load(other)
    assert all(map(torch.equal, before, (*own.keys, *own.values, own.lengths)))
    assert own.host_lengths == [2, 5]

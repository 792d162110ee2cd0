"""commit: accepted rows move and nothing else does; states advance, features are gathered."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import DTYPES, INTEGER_POISON, integers
from tests.ops.conftest import available
from vispec.ops import Gather, RowState, commit, commit_reference, pointer_table, use_backend


def caches(count: int, B: int, G: int, L: int, head: int, dtype, *, gaps: bool = False) -> list[torch.Tensor]:
    made = []
    for index in range(count):
        size = (B, G + gaps, L + 2 * gaps, head + 3 * gaps)
        values = (torch.arange(torch.Size(size).numel()) % 251 + index).view(size).to(dtype)
        made.append(values[:, :G, gaps : L + gaps, :head])
    return made


def paths(B: int, D: int, T: int, generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Path, emitted tokens and counts, with poison beyond the counts."""
    path, counts = torch.full((B, D), INTEGER_POISON), torch.zeros(B, dtype=torch.int64)
    emitted = path.clone()
    for b in range(B):
        counts[b] = int(torch.randint(0, D + 1, (), generator=generator))
        others = torch.randperm(T - 1, generator=generator)[: D - 1].sort().values + 1
        full = torch.cat([torch.zeros(1, dtype=torch.int64), others])
        path[b, : counts[b]] = full[: counts[b]]
        emitted[b, : counts[b]] = torch.randint(0, 1 << 40, (int(counts[b]),), generator=generator)
    return path, emitted, counts


def check(backend, tensors, path, counts, starts):
    """Only the move; the tokens are of no consequence."""
    expected = [tensor.clone() for tensor in tensors]
    for tensor, before in zip(expected, tensors, strict=True):
        for b in range(path.shape[0]):
            for j in range(int(counts[b])):
                tensor[b, :, starts[b] + j] = before[b, :, starts[b] + path[b, j]]
    emitted = torch.full_like(path, INTEGER_POISON)
    got = backend.run(commit, tensors, path, emitted, counts, starts)["positional"][0]
    for index, (value, want) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(value, want), index
    reference = [tensor.clone() for tensor in tensors]
    commit_reference(reference, path, emitted, counts, starts)
    assert all(torch.equal(value, want) for value, want in zip(reference, expected, strict=True))


def call(backend, tensors, path, emitted, counts, starts, *, rows=None, gather=None):
    """The tensors, the state and what was gathered, after a call on copies of them that keep their strides."""
    found = {}

    def op(*arguments):
        commit(*arguments[:5], rows=arguments[5], gather=arguments[6])
        found.update(zip(("tensors", "rows", "gather"), (arguments[0], *arguments[5:]), strict=True))

    backend.run(op, tensors, path, emitted, counts, starts, rows, gather)
    return {name: value and [tensor.cpu() for tensor in value] for name, value in found.items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def state(B: int) -> RowState:
    return RowState(*(torch.arange(B) * 5 + 11 * place for place in range(4)))


def strided(features: torch.Tensor, gap: int) -> torch.Tensor:
    """The same [B, T, C] values inside a larger buffer of NaN, `gap` elements before, between and after rows."""
    B, T, C = features.shape
    buffer = torch.full((B, T + 1, C + gap), torch.nan, dtype=features.dtype)
    view = buffer[:, 1:, gap : gap + C]
    view.copy_(features)
    return view


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("gap", [0, 1, 3, 8])
@pytest.mark.parametrize(
    ("count", "B", "D", "T", "C"),
    [(0, 1, 1, 1, 1), (2, 3, 1, 2, 7), (3, 4, 5, 30, 64), (0, 5, 4, 9, 33), (1, 2, 9, 70, 1100)],
)
def test_gathers_and_advances_beside_the_move(backend, generator, dtype, gap, count, B, D, T, C):
    """Features of nodes off the path are NaN; what lies beyond the counts becomes zeros."""
    tensors = caches(count, B, 2, T + 12, 8, dtype)
    path, emitted, counts = paths(B, D, T, generator)
    starts = torch.randint(0, 12, (B, 3), generator=generator)[:, 1]
    features = torch.full((B, T, C), torch.nan, dtype=dtype)
    rows, gather = (
        state(B),
        Gather(strided(features, gap), torch.full((B, D, C), torch.nan, dtype=dtype), integers(B, D)),
    )
    wanted = {"rows": [part.tolist() for part in rows], "tokens": [], "picked": torch.zeros(B, D, C, dtype=dtype)}
    for b, taken in enumerate(counts.tolist()):
        for j in range(taken):
            gather.features[b, path[b, j]] = torch.randn(C, generator=generator).to(dtype)
            wanted["picked"][b, j] = gather.features[b, path[b, j]]
        wanted["tokens"].append(emitted[b, :taken].tolist() + [0] * (D - taken))
        wanted["rows"][0][b] += taken
        wanted["rows"][1][b] += taken
        wanted["rows"][2][b] -= taken
        wanted["rows"][3][b] = int(emitted[b, taken - 1]) if taken else wanted["rows"][3][b]
    moved = call(backend, tensors, path, emitted, counts, starts)["tensors"]
    for used in ((rows, gather), (rows, None), (None, gather)):
        got = call(backend, tensors, path, emitted, counts, starts, rows=used[0], gather=used[1])
        assert all(torch.equal(bits(one), bits(other)) for one, other in zip(got["tensors"], moved, strict=True))
        if used[0]:
            assert [part.tolist() for part in got["rows"]] == wanted["rows"]
        if used[1]:
            assert torch.equal(bits(got["gather"][1]), bits(wanted["picked"]))
            assert got["gather"][2].tolist() == wanted["tokens"]
            assert torch.equal(bits(got["gather"][0]), bits(gather.features))


def test_bits_pass_unchanged(backend):
    """Infinities, the smallest numbers and -0 on the path arrive as they are."""
    odd = torch.tensor([0x7F80, 0xFF80, 0x0001, 0x8000, 0x3F80]).to(torch.int16).view(torch.bfloat16)
    features = odd.repeat(1, 2, 1)
    gather = Gather(features, torch.zeros(1, 1, 5, dtype=torch.bfloat16), integers(1, 1))
    one = torch.ones(1, 1, dtype=torch.int64)
    got = call(backend, [], one, one * 9, one[0], one[0], gather=gather)["gather"]
    assert torch.equal(bits(got[1][0, 0]), bits(odd)) and got[2].tolist() == [[9]]


def test_finished_rows_keep_their_root(backend):
    path, emitted = torch.tensor([[-1, -1], [0, 1]]), torch.tensor([[-1, -1], [7, 8]])
    rows = RowState(*(torch.tensor([40, 50]) for _ in range(4)))
    zero = torch.zeros(2, dtype=torch.int64)
    got = call(backend, [], path, emitted, torch.tensor([0, 2]), zero, rows=rows)["rows"]
    assert [part.tolist() for part in got] == [[40, 52], [40, 52], [40, 48], [40, 8]]


@pytest.mark.sanitize
def test_stale_values_stay_inside(kernels):
    """Before a graph's first replay counts, paths and starts may be anything: no row moves, zeros are gathered."""
    huge = 1 << 50
    path = torch.tensor([[-huge, huge], [-1, 40], [3, 4], [0, 1]])  # one beyond the slots, one beyond the nodes
    emitted, counts, starts = path * 3, torch.tensor([huge, 2, 2, -huge]), torch.tensor([-huge, 10, 11, huge])
    tensors = caches(2, 4, 2, 14, 8, torch.bfloat16)
    features = torch.ones(4, 4, 5)
    got = call(
        kernels,
        tensors,
        path,
        emitted,
        counts,
        starts,
        rows=state(4),
        gather=Gather(features, torch.full((4, 2, 5), torch.nan), integers(4, 2)),
    )
    assert got["gather"][1][:, :, 0].tolist() == [[0, 0], [0, 0], [1, 0], [0, 0]]
    assert [a - b for a, b in zip(got["rows"][0].tolist(), state(4).lengths.tolist(), strict=True)] == [2, 2, 2, 0]
    for value, before in zip(got["tensors"], tensors, strict=True):
        assert torch.equal(value[:2], before[:2]) and torch.equal(value[2:], before[2:])


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(
    ("count", "B", "G", "head", "D", "T"),
    [(1, 1, 1, 1, 1, 2), (2, 1, 3, 8, 5, 30), (5, 4, 2, 17, 4, 9), (3, 2, 1, 64, 9, 70)],
)
def test_moves_the_path(backend, generator, dtype, gaps, count, B, G, head, D, T):
    tensors = caches(count, B, G, T + 12, head, dtype, gaps=gaps)
    path, _, counts = paths(B, D, T, generator)
    check(backend, tensors, path, counts, torch.randint(0, 12, (B,), generator=generator))


def test_length_zero_and_full_cache(backend):
    tensors = caches(2, 2, 2, 8, 4, torch.float32)
    path = torch.tensor([[0, 3, 7], [0, 1, 2]])
    check(backend, tensors, path, torch.tensor([3, 0]), torch.tensor([0, 5]))
    check(backend, tensors, path, torch.tensor([2, 3]), torch.tensor([4, 5]))


def test_large_cache_uses_threads(backend, generator):
    tensors = caches(8, 1, 8, 64, 128, torch.bfloat16)
    path, counts = torch.tensor([[0, 2, 5, 11, 30]]), torch.tensor([5])
    check(backend, tensors, path, counts, torch.tensor([20]))
    # 60 MiB: above the size at which the CPU op shares its work between threads.
    tensors = caches(6 if backend.name == "emulated" else 60, 1, 16, 40, 512, torch.float32)
    check(backend, tensors, path, counts, torch.tensor([5]))


def test_pointer_table():
    tensors = caches(3, 1, 1, 4, 2, torch.float32)
    assert pointer_table(tensors).tolist() == [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize(
    ("path", "count", "start", "message"),
    [
        ([0, 6], 2, 2, r"path must ascend from 0 to 5"),
        ([0, 5], 2, 2, r"path must ascend from 0 to 4"),
        ([0, 0], 2, 2, r"path must ascend from 0 to 4"),
        ([-1, 2], 2, 2, r"path must ascend from 0 to 4"),
        ([0, 1], 3, 2, r"counts must be from 0 to 2"),
        ([0, 1], -1, 2, r"counts must be from 0 to 2"),
        ([0, 1], 1, -2, r"starts not negative"),
    ],
)
def test_bad_paths_change_nothing(name, path, count, start, message):
    """Eight slots; and five nodes of features, where the path leaves those alone."""
    backend = available(name)
    tensors = caches(2, 1, 1, 8, 2, torch.float32)
    gather = Gather(torch.ones(1, 5, 3), torch.zeros(1, 2, 3), integers(1, 2))
    arguments = {"rows": state(1), "gather": None if "to 5" in message else gather}
    before = [tensor.clone() for tensor in [*tensors, *arguments["rows"], *gather]]
    path = torch.tensor([path])
    with use_backend(backend.name), pytest.raises(ValueError, match=f"commit: .*{message}"):
        commit(tensors, path, path, torch.tensor([count]), torch.tensor([start]), **arguments)
    after = [*tensors, *arguments["rows"], *gather]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_errors():
    path, row = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    one, start = torch.zeros(1, 1, 4, 2), torch.zeros(1, dtype=torch.int64)
    rows = RowState(row, row.clone(), row.clone(), row.clone())
    gather = Gather(torch.zeros(1, 3, 5), torch.zeros(1, 2, 5), path.clone())
    cases = [
        (([torch.zeros(4, 2)],), {}, r"tensors must be \[B, G, L, head\].* got float32 \[4, 2\]"),
        (([torch.zeros(2, 1, 4, 2)],), {}, r"tensors\[0\] must be float32 .*got float32 \[2, 1, 4, 2\]"),
        (([one, one.half()],), {}, r"all tensors must be alike; .* float16 \[1, 1, 4, 2\]"),
        (([one], path.float()), {}, r"path must be int64 \[B, D\].*, got float32 \[1, 2\]"),
        (([one], path[0]), {}, r"path must be int64 \[B, D\], got int64 \[2\]"),
        (([one], path[:, :0], path[:, :0]), {}, r"D \(longest path\) must be from 1 .*, got 0"),
        (([one], path, path[:, :1]), {}, r"emitted must be int64 \[B, D\] = \[1, 2\], got int64 \[1, 1\]"),
        (([one], path, path, path[0]), {}, r"counts must be int64 \[B\] = \[1\], got int64 \[2\]"),
        (([one], path, path, row, row.int()), {}, r"starts must be int64 \[B\] = \[1\], got int32 \[1\]"),
        ((), {"rows": rows._replace(lengths=start)}, r"starts must not lie in the memory of rows.lengths"),
        ((), {"rows": rows._replace(roots=path[0])}, r"rows.roots must be int64 \[B\] = \[1\]"),
        ((), {"gather": gather._replace(features=path[None])}, r"gather.features must be floating-point \[B, T, C\]"),
        ((), {"gather": gather._replace(features=one[0])}, r"gather.picked must be float32 .* = \[1, 2, 2\]"),
        ((), {"gather": gather._replace(features=one)}, r"gather.features must be float32 \[B, T, C\]"),
        ((), {"gather": gather._replace(features=torch.zeros(1, 5, 3).mT)}, r"contiguous last dimension"),
        ((), {"gather": gather._replace(features=torch.zeros(1, 0, 5))}, r"gather.features must have nodes"),
        ((), {"gather": gather._replace(picked=torch.zeros(1, 2, 5).half())}, r"gather.picked must be float32"),
        ((), {"gather": gather._replace(tokens=path.float())}, r"gather.tokens must be int64 \[B, D\]"),
    ]
    valid = ([one], path, path, row, start)
    for changed, named, message in cases:
        with pytest.raises(ValueError, match=f"commit: {message}" if "last" not in message else message):
            commit(*changed, *valid[len(changed) :], **named)
    commit(*valid, rows=rows, gather=gather)

"""commit: accepted rows move, nothing else does."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import DTYPES, INTEGER_POISON
from vispec.ops import commit, commit_reference, pointer_table


def caches(count: int, B: int, G: int, L: int, head: int, dtype, *, gaps: bool = False) -> list[torch.Tensor]:
    made = []
    for index in range(count):
        size = (B, G + gaps, L + 2 * gaps, head + 3 * gaps)
        values = (torch.arange(torch.Size(size).numel()) % 251 + index).view(size).to(dtype)
        made.append(values[:, :G, gaps : L + gaps, :head])
    return made


def paths(B: int, D: int, T: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
    path, counts = torch.full((B, D), INTEGER_POISON), torch.zeros(B, dtype=torch.int64)
    for b in range(B):
        counts[b] = int(torch.randint(0, D + 1, (), generator=generator))
        others = torch.randperm(T - 1, generator=generator)[: D - 1].sort().values + 1
        full = torch.cat([torch.zeros(1, dtype=torch.int64), others])
        path[b, : counts[b]] = full[: counts[b]]
    return path, counts


def check(backend, tensors, path, counts, lengths):
    expected = [tensor.clone() for tensor in tensors]
    for tensor, before in zip(expected, tensors, strict=True):
        for b in range(path.shape[0]):
            for j in range(int(counts[b])):
                tensor[b, :, lengths[b] + j] = before[b, :, lengths[b] + path[b, j]]
    got = backend.run(commit, tensors, path, counts, lengths)["positional"][0]
    for index, (value, want) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(value, want), index
    reference = [tensor.clone() for tensor in tensors]
    commit_reference(reference, path, counts, lengths)
    assert all(torch.equal(value, want) for value, want in zip(reference, expected, strict=True))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(
    ("count", "B", "G", "head", "D", "T"),
    [(1, 1, 1, 1, 1, 2), (2, 1, 3, 8, 5, 30), (5, 4, 2, 17, 4, 9), (3, 2, 1, 64, 9, 70)],
)
def test_moves_the_path(backend, generator, dtype, gaps, count, B, G, head, D, T):
    tensors = caches(count, B, G, T + 12, head, dtype, gaps=gaps)
    path, counts = paths(B, D, T, generator)
    lengths = torch.randint(0, 12, (B,), generator=generator)
    check(backend, tensors, path, counts, lengths)


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
    ("path", "count", "length", "message"),
    [
        ([0, 6], 2, 2, r"path must ascend from 0 to 5 \(L=8, length 2\)"),
        ([0, 0], 2, 2, r"path must ascend from 0 to 5"),
        ([-1, 2], 2, 2, r"path must ascend from 0 to 5"),
        ([0, 1], 3, 2, r"counts must be from 0 to 2"),
        ([0, 1], -1, 2, r"counts must be from 0 to 2"),
        ([0, 1], 1, -2, r"lengths not negative"),
    ],
)
def test_bad_paths_change_nothing(name, path, count, length, message):
    from vispec import _native
    from vispec.ops import use_backend

    if name == "native" and _native.extension is None:
        pytest.skip("the native extension is not built")
    tensors = caches(2, 1, 1, 8, 2, torch.float32)
    before = [tensor.clone() for tensor in tensors]
    with use_backend(name), pytest.raises(ValueError, match=f"commit: .*{message}"):
        commit(tensors, torch.tensor([path]), torch.tensor([count]), torch.tensor([length]))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_errors():
    path, row = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    one = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="commit: tensors must hold at least one tensor"):
        commit([], path, row, row)
    with pytest.raises(ValueError, match=r"commit: tensors must be \[B, G, L, head\].* got float32 \[4, 2\]"):
        commit([torch.zeros(4, 2)], path, row, row)
    with pytest.raises(ValueError, match=r"commit: all tensors must be alike; .* float16 \[1, 1, 4, 2\]"):
        commit([one, one.half()], path, row, row)
    with pytest.raises(ValueError, match=r"commit: path must be int64 \[B, D\].*, got float32 \[1, 2\]"):
        commit([one], path.float(), row, row)
    with pytest.raises(ValueError, match=r"commit: counts must be int64 \[B\] = \[1\], got int64 \[2\]"):
        commit([one], path, torch.zeros(2, dtype=torch.int64), row)

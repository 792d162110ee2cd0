"""Inputs that take the kernels' rarely used ways, against the reference: emulated, and CUDA if any."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import floats, integers
from vispec.ops import accept, build_tree, commit, grow_level, int8_linear, tree_attention
from vispec.ops.accept import Sampling

CHUNK = 4096  # columns of a block of accept
LIST = 2048  # tokens of one bin that accept_filter keeps in shared memory
SHORT_LIST = 512  # likely tokens of a row that accept_list finds room for
GROUPS = 8  # warps of a block of accept, each of which leaves its best
GROW_CHUNK = 8192  # columns of a block of grow_level


def grown(backend, logits: torch.Tensor, K: int) -> dict:
    (B, R, _), N = logits.shape, logits.shape[1] * K
    places = {
        "candidate_tokens": integers(B, N),
        "candidate_scores": floats(B, N),
        "candidate_parents": integers(B, N),
        "next_frontier": integers(B, K),
        "next_rows": integers(B, K),
        "next_tokens": integers(B, K),
        "next_scores": floats(B, K),
        "arrivals": torch.zeros(B, dtype=torch.int32),
    }
    scores = -torch.arange(R).float().repeat(B, 1)
    return backend.run(grow_level, logits, scores, torch.arange(R).repeat(B, 1), offset=0, **places)


def drawn(backend, logits: torch.Tensor, **settings: float) -> dict:
    (B, T, _), D = logits.shape, 2
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    sampling = Sampling(
        torch.full((B,), values["temperature"]),
        torch.full((B,), int(values["top_k"])),
        torch.full((B,), values["top_p"]),
        torch.full((B,), values["min_p"]),
        torch.arange(B) * 7919,
    )
    places = {"path": integers(B, D), "emitted": integers(B, D), "log_probabilities": floats(B, D)}
    places |= {"counts": integers(B), "status": integers(B), "finished": torch.zeros(B).long()}
    chain = torch.arange(-1, T - 1).repeat(B, 1)
    return backend.run(
        accept,
        logits,
        torch.zeros(B, T).long(),
        chain,
        torch.arange(B) * 1000,
        end_tokens=integers(0),
        remaining=torch.full((B,), 9),
        sampling=sampling,
        **places,
    )


def same(a: dict, b: dict) -> None:
    for name, value in a.items():
        if name == "positional":
            continue
        if value.dtype.is_floating_point:
            torch.testing.assert_close(value, b[name], rtol=1e-5, atol=1e-6, equal_nan=True)
        else:
            assert torch.equal(value, b[name]), name


@pytest.mark.sanitize
@pytest.mark.parametrize("V", [LIST - 1, LIST, LIST + 1, 2 * LIST + 77])
@pytest.mark.parametrize("settings", [{"top_p": 0.3}, {"top_k": 700}, {"top_k": 900, "top_p": 0.5}])
def test_a_bin_longer_than_the_list(kernels, oracle, V, settings):
    """All tokens tied, or within one bin of 1/32: the selection must read the row itself."""
    generator = torch.Generator().manual_seed(V)
    near = torch.rand(16, 1, V, generator=generator) / 40
    for logits in (torch.ones(16, 1, V), near):
        same(drawn(kernels, logits, **settings), drawn(oracle, logits, **settings))


def same_draws(kernels, oracle, row: torch.Tensor, **settings: float) -> None:
    """24 draws from one row [V]: a token too many or too few moves nearly all of them."""
    logits = row.expand(24, 1, -1)
    same(drawn(kernels, logits, **settings), drawn(oracle, logits, **settings))


def scattered(V: int, values: torch.Tensor, fill: float, seed: int = 0) -> torch.Tensor:
    """A row [V] of `fill` with `values` at random columns."""
    columns = torch.randperm(V, generator=torch.Generator().manual_seed(seed))[: len(values)]
    return torch.full((V,), fill).index_put((columns,), values.float())


@pytest.mark.sanitize
@pytest.mark.parametrize("V", [SHORT_LIST - 1, SHORT_LIST, SHORT_LIST + 1, 2 * CHUNK + 9])
@pytest.mark.parametrize("count", [SHORT_LIST - 1, SHORT_LIST, SHORT_LIST + 1])
@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_k": 15, "top_p": 0.6}, {"top_p": 0.4}, {"top_p": 0.0}])
def test_as_many_tied_tokens_as_fit(kernels, oracle, V, count, settings):
    """All those tied with the k-th stay; one more than the list holds, and the row is read instead."""
    row = scattered(V, torch.full((min(count, V),), 2.0), -3.0)
    same_draws(kernels, oracle, row, **settings)


@pytest.mark.parametrize("k", [2 * GROUPS - 1, 2 * GROUPS, 2 * GROUPS + 1])
@pytest.mark.parametrize("lay", ["spread", "together", "few"])
def test_as_many_wanted_as_warps(kernels, oracle, k, lay):
    """The likely tokens in all warps' columns, all in those of one, or fewer than are wanted."""
    V, values = 2 * CHUNK, torch.arange(60) / 7
    row = scattered(V, values, -torch.inf if lay == "few" else -9.0, seed=k)
    if lay == "together":
        row = row.sort().values.roll(100)
    if lay == "few":
        row = scattered(V, values[: k - 1], -torch.inf)
    for settings in ({"top_k": k}, {"top_k": k, "top_p": 0.7}, {"top_k": k, "min_p": 0.1}):
        same_draws(kernels, oracle, row, **settings)


def tying_temperature(value: float) -> float:
    """A temperature at which `value` and the float32 below it have one score."""
    temperatures = torch.linspace(1.5, 2.5, 1000)
    pair = torch.tensor([value, value]).nextafter(torch.tensor([torch.inf, -torch.inf]))
    pair[0] = value
    tied = pair[0] / temperatures == pair[1] / temperatures
    return float(temperatures[tied][0])


@pytest.mark.parametrize("value", [15.875, -15.875, 1.984375, -0.9921875])
@pytest.mark.parametrize("settings", [{"top_k": 16}, {"top_k": 16, "top_p": 0.8}])
def test_other_logits_with_the_score_of_the_kth(kernels, oracle, value, settings):
    """Division by the temperature rounds: lower logits tie with the k-th, and stay."""
    lower = torch.tensor(value).nextafter(torch.tensor(-torch.inf))
    row = scattered(2 * CHUNK, torch.cat([torch.full((300,), value), lower.expand(150)]), value - 30, seed=1)
    same_draws(kernels, oracle, row, temperature=tying_temperature(value), **settings)
    best = torch.full((2 * CHUNK,), value - 30)
    best[256 * torch.arange(16)] = value  # one for every warp: the k-th is the limit itself
    best[torch.arange(100) * 7 + 3] = lower
    same_draws(kernels, oracle, best, temperature=tying_temperature(value), **settings)


@pytest.mark.parametrize("value", [15.875, -15.875])
@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.53, 0.55, 0.57, 0.7])
def test_logits_around_the_limit_of_the_list(kernels, oracle, value, top_p):
    """Every warp's best is the limit; scores tie across the logit below which nothing is looked at."""
    generator = torch.Generator().manual_seed(5)
    row = torch.full((2 * CHUNK,), value - 40)
    row[::128] = value
    lowest = torch.tensor(value - abs(value) * 2**-20)
    bits = lowest.view(torch.int32) + torch.randint(-6, 7, (400,), generator=generator).int()
    columns = torch.randperm(2 * CHUNK, generator=generator)
    row[columns[columns % 128 != 0][:400]] = bits.view(torch.float32)
    same_draws(kernels, oracle, row, temperature=tying_temperature(float(lowest)), top_p=top_p)


@pytest.mark.parametrize("top_p", [0.001, 0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.99, 0.999999])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_the_mass_is_cut_inside_the_list_and_below_it(kernels, oracle, spread, top_p):
    row = torch.randn(3 * CHUNK + 5, generator=torch.Generator().manual_seed(9)) * spread
    same_draws(kernels, oracle, row, top_p=top_p)
    same_draws(kernels, oracle, row.bfloat16(), top_p=top_p, top_k=24)
    same_draws(kernels, oracle, row.half(), top_p=top_p, temperature=0.6, min_p=0.001)


@pytest.mark.parametrize("temperature", [1e-3, 1e20, 1e38])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scores_at_the_ends_of_float32(kernels, oracle, temperature, scale):
    """Where no logit shows to be below a score, the row is read; where all scores are one, all are kept."""
    generator = torch.Generator().manual_seed(2)
    for row in (torch.randn(CHUNK + 9, generator=generator), torch.randint(-3, 1, (CHUNK + 9,), generator=generator)):
        for settings in ({"top_k": 7}, {"top_p": 0.4}, {"top_k": 3, "top_p": 0.9}):
            same_draws(kernels, oracle, row * scale, temperature=temperature, **settings)


def test_rows_with_and_without_cuts_side_by_side(kernels, oracle):
    """Nothing of one row's list reaches another's, and a walk goes on from one to the next."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, 3, CHUNK + 70, generator=generator) * 3
    logits[:, :2, 0] = 9.0
    for settings in ({"top_k": 3}, {"top_p": 0.9}, {"top_k": 600}, {"top_p": 0.2, "top_k": 8}):
        same(drawn(kernels, logits, **settings), drawn(oracle, logits, **settings))


@pytest.mark.parametrize("V", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9, "min_p": 0.01}])
def test_the_mass_lies_at_the_edges_of_chunks(kernels, oracle, V, settings):
    """A handful of likely tokens around each boundary, the rest impossible."""
    edges = [c + i for c in range(0, V, CHUNK) for i in range(-2, 3)] + [V - 1]
    columns = torch.tensor(sorted({column for column in edges if 0 <= column < V}))
    logits = torch.full((32, 1, V), -torch.inf)
    logits[:, :, columns] = torch.arange(len(columns)).float() % 3
    same(drawn(kernels, logits, **settings), drawn(oracle, logits, **settings))


def test_weightless_tokens_are_never_drawn(kernels, oracle):
    """Tokens 32 below the best have no bin: top-k beyond the others must not trip over them."""
    logits = torch.full((32, 1, 500), -40.0)
    logits[:, :, ::50] = torch.arange(10).float()
    for top_k in (9, 10, 11, 499):
        settings = {"top_k": top_k, "top_p": 0.999}
        got = drawn(kernels, logits, **settings)
        same(got, drawn(oracle, logits, **settings))
        assert (got["emitted"][:, 0] % 50 == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("K", [1, 16, 64])
def test_all_good_columns_read_by_few_threads(kernels, oracle, dtype, K):
    """As many columns above the threshold as there can be: all of K - 1 groups of four threads, one of another."""
    column = torch.arange(GROW_CHUNK)
    group = column // (16 // dtype.itemsize) % 512 // 4
    logits = torch.where(group < K - 1, 2.0, -1.0).to(dtype).repeat(2, 2, 1)
    logits[:, :, (group == K - 1).nonzero()[0]] = 1.0
    logits[1] = 0.5  # all tied
    same(grown(kernels, logits, K), grown(oracle, logits, K))
    buffer = torch.full((4 * GROW_CHUNK + 4,), torch.nan, dtype=dtype)
    apart = buffer.as_strided(logits.shape, (2 * GROW_CHUNK + 1, GROW_CHUNK + 1, 1), 1)  # columns beside the vectors
    apart.copy_(logits)
    same(grown(kernels, apart, K), grown(oracle, apart, K))


@pytest.mark.parametrize("V", [GROW_CHUNK - 1, GROW_CHUNK, GROW_CHUNK + 1, GROW_CHUNK + 15, 3 * GROW_CHUNK])
def test_the_best_lie_at_the_edges_of_chunks(kernels, oracle, V):
    """Tied columns on both sides of each boundary, and a last chunk with fewer columns than K."""
    edges = [c + i for c in range(0, V + 1, GROW_CHUNK) for i in (-2, -1, 0, 1)]
    columns = torch.tensor([column for column in edges if 0 <= column < V])
    logits = torch.full((1, 3, V), -8.0)
    logits[0, 0, columns] = 1.0
    logits[0, 1, columns] = torch.arange(len(columns)) % 2 / 2
    logits[0, 2] = -torch.inf
    got = grown(kernels, logits, 16)
    same(got, grown(oracle, logits, 16))
    assert got["candidate_tokens"][0, : len(columns)].tolist() == columns.tolist()[:16]


@pytest.mark.parametrize(("R", "V", "K"), [(23, 20000, 64), (1, 300_000, 40), (1, 262_144, 5), (70, 8300, 16)])
def test_more_entries_than_the_merge_takes_at_once(kernels, oracle, R, V, K):
    """Several turns over the frontier rows, one row that alone holds more, and the larger chunks of a wide row."""
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(1, R, V, generator=generator).half()
    same(grown(kernels, logits, K), grown(oracle, logits, K))


def test_a_row_grows_alike_in_every_batch(kernels):
    """Chunks and the order in which they are merged depend on V alone: the same bits beside any other rows."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 5, 33_000, generator=generator).bfloat16() * 3
    together = grown(kernels, logits, 8)["candidate_scores"].view(3, 5, 8)
    for b in range(3):
        alone = grown(kernels, logits[b : b + 1, :1], 8)["candidate_scores"]
        assert torch.equal(alone[0], together[b, 0])


@pytest.mark.parametrize("other", [5, GROW_CHUNK + 5, 2 * GROW_CHUNK + 5])
def test_a_nearly_sure_token_is_not_quite_sure(kernels, other):
    """What the rest of a row adds is not lost beside 1, in the best column's chunk or in another."""
    logits = torch.full((1, 1, 3 * GROW_CHUNK), -torch.inf)
    logits[0, 0, [GROW_CHUNK, other]] = torch.tensor([0.0, -20.0])
    scores = grown(kernels, logits, 2)["candidate_scores"][0].double()
    exact = torch.tensor([0.0, -20.0]).double() - torch.tensor(-20.0).double().exp().log1p()
    torch.testing.assert_close(scores, exact, rtol=1e-6, atol=0)
    kept = drawn(kernels, logits, top_k=1)["log_probabilities"][0, 0].double()
    torch.testing.assert_close(kept, exact[0], rtol=1e-6, atol=0)


def test_vocabulary_limit_of_grow_level(kernels):
    with pytest.raises(ValueError, match="grow_level: .*V at most 524287, .*got K=2, V=524288"):
        grown(kernels, torch.zeros(1, 1, 1 << 19, dtype=torch.float16), 2)


@pytest.mark.sanitize
@pytest.mark.parametrize("V", [16, 17, 63, 129, 1025])
def test_fewer_columns_than_threads(kernels, oracle, V):
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(2, 3, V, generator=generator)
    same(grown(kernels, logits, 16), grown(oracle, logits, 16))


@pytest.mark.sanitize
@pytest.mark.parametrize("N", [31, 32, 33, 1100])
def test_candidates_beyond_a_word_and_beyond_the_threads(kernels, oracle, N):
    generator = torch.Generator().manual_seed(N)
    parents = torch.stack([(torch.arange(N) - 5) // 2, torch.arange(N) - 1]).clamp(min=-1)
    scores = torch.stack([-(torch.arange(N) // 3).float(), -torch.arange(N) / 100])
    T = min(N + 1, 256)
    places = {name: integers(2, T) for name in ("tokens", "parents", "depths")}
    places |= {"ancestors": integers(2, T, (T + 63) // 64), "scores": floats(2, T)}
    tokens = torch.randint(0, 999, (2, N), generator=generator)
    inputs = (torch.tensor([1, 2]), tokens, scores, parents)
    same(kernels.run(build_tree, *inputs, **places), oracle.run(build_tree, *inputs, **places))


@pytest.mark.sanitize
@pytest.mark.parametrize("count", [7, 8, 9, 11, 17])
@pytest.mark.parametrize("head", [5, 8, 20, 64])
def test_paths_longer_than_a_batch(kernels, oracle, count, head):
    """More rows than a thread holds at once, columns of 2 to 16 bytes, old entries past counts."""
    generator = torch.Generator().manual_seed(count)
    cache = torch.randn(2, 3, 40, head, generator=generator).bfloat16()
    steps = torch.randint(1, 3, (2, count), generator=generator)
    path = torch.full((2, count + 2), -1)
    path[:, :count] = steps.cumsum(dim=1) - steps[:, :1]
    counts, starts = torch.tensor([count, count - 2]), torch.tensor([0, 40 - int(path.max()) - 1])
    tensors = [cache, cache + 1]
    got, want = (side.run(commit, tensors, path, path, counts, starts) for side in (kernels, oracle))
    for ours, theirs in zip(got["positional"][0], want["positional"][0], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("H", [1, 17])
@pytest.mark.parametrize(
    "slots",
    [
        (0, 300, 600),  # runs of keys
        (0, 20, 40),  # a tile's keys, which four warps share where there are few rows, in one run
    ],
)
def test_keys_merge_in_ascending_order(kernels, H, slots):
    """Three keys of equal weight and values 2^24, 1, -2^24: the 1 is lost beside the first alone."""
    L, D = 768, 64
    queries, keys = torch.zeros(1, H, 1, D, dtype=torch.bfloat16), torch.zeros(1, 1, L, D, dtype=torch.bfloat16)
    values, output = torch.zeros_like(keys), torch.full_like(queries, torch.nan)
    values[0, 0, slots, 0] = torch.tensor([2.0**24, 1.0, -(2.0**24)], dtype=torch.bfloat16)
    values[0, 0, slots[1], 1] = 768.0  # another column: all keys are there
    ancestors, lengths = torch.ones(1, 1, 1, dtype=torch.int64), torch.tensor([L - 1])
    found = kernels.run(tree_attention, queries, keys, values, ancestors, lengths, output=output, scale=1.0)
    assert found["output"][0, :, 0, :2].tolist() == [[0.0, 1.0]] * H


def projected(backend, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[M, N] by int8_linear with scales of their own."""
    M, N = rows.shape[0], weight.shape[0]
    output, scales = rows.new_full((M, N), torch.nan), torch.linspace(0.01, 0.02, N)
    return backend.run(int8_linear, rows, weight, scales, output=output)["output"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_is_projected_alike_in_every_batch(kernels, dtype):
    """The sums' order depends on the columns alone: the same bits in blocks of 8, 16 or 32 rows, again, and from rows
    that start anywhere."""
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(37, 1104, generator=generator).to(dtype)
    weight = torch.randint(-128, 128, (43, 1104), generator=generator).to(torch.int8)
    together = projected(kernels, rows, weight)
    assert torch.equal(projected(kernels, rows, weight), together)
    for first, count in ((0, 1), (30, 7), (8, 8), (3, 9), (20, 16), (5, 17)):
        assert torch.equal(projected(kernels, rows[first : first + count], weight), together[first : first + count])
    apart = torch.full((37 * 1107 + 1,), torch.nan, dtype=dtype).as_strided(rows.shape, (1107, 1), 1)
    apart.copy_(rows)
    assert torch.equal(projected(kernels, apart, weight), together)


def test_a_weight_that_starts_beside_the_vectors(kernels):
    weight = torch.zeros(6 * 32 + 1, dtype=torch.int8)[1:].view(6, 32)
    with pytest.raises(
        ValueError, match="int8_linear: .*weight start at a multiple of 16 bytes, .*C=32 and a start 1 "
    ):
        projected(kernels, torch.zeros(2, 32), weight)

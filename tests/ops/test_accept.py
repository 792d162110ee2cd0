"""accept: the walk, its limits, and the draws of every backend against the reference."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.ops.cases import DTYPES, INTEGER_POISON, depths_of, floats, integers, random_tree, with_gaps
from vispec import _native
from vispec.ops import Sampling, accept, accept_reference, use_backend

NAMES = ("path", "emitted", "counts", "status", "finished")


def outputs(B: int, D: int, finished=None) -> dict:
    return {
        "finished": torch.zeros(B, dtype=torch.int64) if finished is None else finished.clone(),
        "path": integers(B, D),
        "emitted": integers(B, D),
        "counts": integers(B),
        "status": integers(B),
    }


def sampling_of(B: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1) -> Sampling:
    return Sampling(
        torch.full((B,), float(temperature)),
        torch.full((B,), top_k, dtype=torch.int64),
        torch.full((B,), float(top_p)),
        torch.full((B,), float(min_p)),
        torch.arange(seed, seed + B),
    )


def check(
    backend,
    logits,
    tokens,
    parents,
    *,
    D=None,
    lengths=None,
    end=(),
    remaining=None,
    finished=None,
    sampling=None,
    log_probabilities=False,
):
    """Run the backend and the reference: everything must be equal, sampled tokens too. Log-probabilities are
    compared with float64, and must change nothing else."""
    B, T, _ = logits.shape
    D = int(depths_of(parents).max()) + 1 if D is None else D
    inputs = {
        "end_tokens": torch.tensor(end, dtype=torch.int64),
        "remaining": torch.full((B,), 1000) if remaining is None else remaining,
        "sampling": sampling,
    }
    lengths = torch.arange(B) * 7 + 3 if lengths is None else lengths
    expected = outputs(B, D, finished)
    accept_reference(logits, tokens, parents, lengths, **inputs, **expected)
    asked = {"log_probabilities": floats(B, D)} if log_probabilities else {}
    got = backend.run(accept, logits, tokens, parents, lengths, **inputs, **asked, **outputs(B, D, finished))
    for name in NAMES:
        assert torch.equal(got[name], expected[name]), (name, got[name], expected[name])
    if log_probabilities:
        check_log_probabilities(logits, got)
    return got


def check_log_probabilities(logits, got) -> None:
    """At most twice the error of torch's own float32 log-softmax, and one step of a float32; 0 beyond counts."""
    B, D = got["path"].shape
    for b in range(B):
        count = int(got["counts"][b])
        nodes, tokens = got["path"][b, :count], got["emitted"][b, :count, None]
        rows, ours = logits[b, nodes], got["log_probabilities"][b]
        exact = rows.double().log_softmax(-1).gather(1, tokens)[:, 0]
        torchs = rows.float().log_softmax(-1).gather(1, tokens)[:, 0]
        assert ours[count:].tolist() == [0.0] * (D - count)
        allowed = 2 * (torchs - exact).abs() + 2.0**-23 * exact.abs().clamp(min=1)
        assert bool(((ours[:count] - exact).abs() <= allowed).all()), (ours[:count], exact)


def leaning(tokens, parents, V: int, generator, strength: float) -> torch.Tensor:
    """Logits under which a node often chooses one of its children."""
    B, T = tokens.shape
    logits = torch.randn(B, T, V, generator=generator)
    for b in range(B):
        for node in range(1, T):
            logits[b, parents[b, node], tokens[b, node]] += strength
    return logits


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "V"),
    [(1, 1, 1), (1, 1, 7), (2, 5, 16), (3, 30, 513), (1, 60, 1000), (4, 65, 33), (1, 256, 50)],
)
def test_greedy_matches_reference(backend, generator, dtype, B, T, V):
    tokens, parents = random_tree(B, T, V, generator)
    logits = leaning(tokens, parents, V, generator, 4.0).to(dtype)
    check(backend, logits, tokens, parents)
    check(backend, with_gaps(logits), tokens, parents)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5, "top_k": 5},
        {"top_k": 1},
        {"top_p": 0.7},
        {"top_p": 0.0},
        {"top_p": 0.999, "top_k": 40},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.6, "min_p": 0.05},
    ],
)
def test_sampled_matches_reference(backend, generator, dtype, settings):
    for B, T, V in ((1, 1, 1), (3, 20, 65), (2, 5, 1003)):
        tokens, parents = random_tree(B, T, V, generator)
        logits = leaning(tokens, parents, V, generator, 3.0).to(dtype)
        for seed in range(3):
            check(
                backend,
                logits,
                tokens,
                parents,
                sampling=sampling_of(B, **settings, seed=seed * 1000),
            )


def test_tied_logits_sampled(backend, generator):
    """Ties at every threshold: the tie rules decide."""
    for V in (30, 700):
        tokens, parents = random_tree(2, 12, V, generator)
        logits = torch.randint(-2, 3, (2, 12, V), generator=generator).float()
        for seed, settings in enumerate(({"top_k": 7}, {"top_p": 0.45}, {"top_k": 20, "top_p": 0.5}, {"min_p": 0.3})):
            check(
                backend,
                logits,
                tokens,
                parents,
                sampling=sampling_of(2, **settings, seed=seed * 99),
            )


def test_settings_differ_by_row(backend, generator):
    B, T, V = 5, 15, 200
    tokens, parents = random_tree(B, T, V, generator)
    logits = leaning(tokens, parents, V, generator, 3.0)
    sampling = Sampling(
        torch.tensor([0.5, 1.0, 1.5, 1e-3, 100.0]),
        torch.tensor([0, 3, 500, 0, 1 << 40]),
        torch.tensor([1.0, 0.9, 0.5, 0.1, 0.99]),
        torch.tensor([0.0, 0.1, 0.0, 0.5, 0.01]),
        torch.tensor([0, -1, 1 << 62, 5, -(1 << 63)]),
    )
    check(
        backend,
        logits,
        tokens,
        parents,
        sampling=sampling,
        lengths=torch.tensor([0, 1, 1 << 33, 77, 4095]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [32064, 151936])
def test_large_vocabulary(backend, generator, dtype, V):
    tokens, parents = random_tree(1, 3, V, generator)
    logits = leaning(tokens, parents, V, generator, 14.0).to(dtype)
    check(backend, logits, tokens, parents)
    for settings in (
        {},
        {"top_k": 50, "top_p": 0.9},
        {"top_p": 0.95, "temperature": 0.7},
        {"top_k": 30000},
    ):
        check(backend, logits, tokens, parents, sampling=sampling_of(1, **settings))


def test_argmax_takes_the_lowest_index(backend):
    logits = torch.zeros(1, 2, 40)
    logits[0, 0, [5, 17, 39]] = 2.0
    logits[0, 1] = -torch.inf
    logits[0, 1, [8, 9]] = -1e30
    tokens, parents = torch.tensor([[0, 5]]), torch.tensor([[-1, 0]])
    assert check(backend, logits, tokens, parents)["emitted"].tolist() == [[5, 8]]
    zeros = torch.tensor([[[-1.0, -0.0, 0.0]]])
    assert check(backend, zeros, tokens[:, :1], parents[:, :1])["emitted"].tolist() == [[1]]


def chain(B: int, T: int, V: int):
    """A tree that is one path, and logits which accept all of it."""
    tokens = torch.arange(T).repeat(B, 1)
    parents = torch.arange(-1, T - 1).repeat(B, 1)
    logits = torch.full((B, T, V), -5.0)
    for t in range(T):
        logits[:, t, t + 1] = 5.0
    return logits, tokens, parents


def test_end_token_inside_the_path(backend):
    logits, tokens, parents = chain(1, 6, 12)
    got = check(backend, logits, tokens, parents, end=(9, 3))
    assert got["emitted"].tolist() == [[1, 2, 3, -1, -1, -1]]
    assert got["path"].tolist() == [[0, 1, 2, -1, -1, -1]]
    assert (got["counts"].item(), got["finished"].item()) == (3, 1)
    assert check(backend, logits, tokens, parents, end=(6,))["finished"].item() == 1
    assert check(backend, logits, tokens, parents, end=(7, 0))["finished"].item() == 0


def test_remaining_inside_the_path(backend):
    logits, tokens, parents = chain(5, 6, 12)
    got = check(backend, logits, tokens, parents, remaining=torch.tensor([0, 1, 3, 6, 7]))
    assert got["counts"].tolist() == [0, 1, 3, 6, 6]
    assert got["finished"].tolist() == [1, 1, 1, 1, 0]
    assert check(backend, logits, tokens, parents, remaining=torch.full((5,), -2))["counts"].tolist() == [0] * 5


def test_finished_rows_emit_nothing(backend):
    logits, tokens, parents = chain(3, 4, 9)
    logits[1] = torch.nan
    got = check(backend, logits, tokens, parents, finished=torch.tensor([0, 1, 1]))
    assert got["counts"].tolist() == [4, 0, 0] and got["status"].tolist() == [0, 0, 0]


def test_short_path_buffer(backend):
    logits, tokens, parents = chain(2, 6, 12)
    assert check(backend, logits, tokens, parents, D=2)["counts"].tolist() == [2, 2]
    assert check(backend, logits, tokens, parents, D=9)["counts"].tolist() == [6, 6]


def test_lower_of_two_equal_siblings(backend):
    logits = torch.zeros(1, 4, 9)
    logits[0, 0, 4] = 1
    tokens, parents = torch.tensor([[0, 2, 4, 4]]), torch.tensor([[-1, 0, 0, 0]])
    assert check(backend, logits, tokens, parents)["path"].tolist() == [[0, 2]]


@pytest.mark.sanitize
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_status(backend, dtype, value, sampled):
    logits, tokens, parents = chain(4, 4, 700)
    logits, sampling = logits * 10, sampling_of(4) if sampled else None
    logits[0, 2, 600] = value
    logits[1, 0, 0] = value
    logits[2, 3] = -torch.inf
    logits[3, 1, 5] = -torch.inf
    got = check(backend, logits.to(dtype), tokens, parents, sampling=sampling)
    assert got["status"].tolist() == [1, 1, 1, 0]
    assert got["counts"].tolist() == [0, 0, 0, 4]
    assert got["finished"].tolist() == [0] * 4
    # The same values where the walk does not come are of no consequence.
    tokens[:, 1] = 699
    got = check(backend, logits.to(dtype), tokens, parents, sampling=sampling)
    assert got["status"].tolist() == [0, 1, 0, 0]


def test_overflow_by_temperature_is_a_status(backend):
    logits = torch.full((2, 1, 5), 3.0)
    logits[1] = -3.0
    got = check(
        backend,
        logits,
        torch.zeros(2, 1, dtype=torch.int64),
        torch.full((2, 1), -1),
        sampling=sampling_of(2, temperature=1e-39),
    )
    assert got["status"].tolist() == [1, 1]


@pytest.mark.parametrize("sampled", [False, True])
def test_stale_rows_stay_inside(kernels, generator, sampled):
    """Before a graph's first replay trees, lengths and limits may be anything; the rows beside them notice nothing."""
    B, T, V, D = 6, 40, 70, 7
    far = torch.iinfo(torch.int64)
    tokens, parents = random_tree(B, T, V, generator)
    logits = leaning(tokens, parents, V, generator, 4.0)
    logits[1, :, 5] = 9.0  # the walk goes where a token 5 is
    inputs = {"lengths": torch.tensor([3, far.max, far.min, far.max - 1, -1, 8])}
    inputs["remaining"] = torch.tensor([90, far.max, 90, far.min, far.max, 90])
    finished = torch.tensor([0, 0, 0, 0, far.min, 0])
    sampling = sampling_of(B, temperature=0.5) if sampled else None
    places = outputs(B, D, finished) | {"log_probabilities": floats(B, D), "end_tokens": integers(1)}
    clean = kernels.run(accept, logits, tokens, parents, sampling=sampling, **inputs, **places)
    parents[1:5] = torch.randint(-T, 2 * T, (4, T), generator=generator)
    parents[1, ::2] = torch.arange(0, T, 2)  # a node that is its own parent
    parents[2, ::3] = torch.tensor([far.min, far.max]).repeat(7)
    tokens[1, ::2] = 5
    tokens[2:5] = torch.randint(far.min, far.max, (3, T), generator=generator)
    got = kernels.run(accept, logits, tokens, parents, sampling=sampling, **inputs, **places)
    for name in (*NAMES, "log_probabilities"):
        assert torch.equal(got[name][[0, 5]], clean[name][[0, 5]]), name
    assert got["counts"].tolist()[3:5] == [0, 0]
    for b in (1, 2):
        count = int(got["counts"][b])
        assert 1 <= count <= D and int(got["status"][b]) == 0
        assert bool((got["path"][b, :count] >= 0).all()) and bool((got["path"][b, :count] < T).all())
        assert bool((got["emitted"][b, :count] >= 0).all()) and bool((got["emitted"][b, :count] < V).all())
        assert bool(got["log_probabilities"][b].isfinite().all())


@pytest.mark.sanitize
@pytest.mark.parametrize("V", [10, 5000])
def test_settings_out_of_range_draw_tokens_of_the_row(kernels, generator, V):
    """The CPU refuses them; a GPU cannot look before it starts."""
    nan, inf = torch.nan, torch.inf
    wrong = {"temperature": [nan, 0.0, -1.0, inf, -inf], "min_p": [nan, 2.0, inf, -1.0, -inf]}
    wrong |= {"top_p": [nan, 2.0, inf, -1.0, -inf], "top_k": [-1, -(1 << 63), (1 << 63) - 1]}
    rows = [{"top_k": 3, name: value} for name, values in wrong.items() for value in values]
    rows += [{"top_p": 0.5} | row for row in rows]
    B, defaults = len(rows), {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    settings = [
        torch.tensor([(defaults | row)[name] for row in rows], dtype=torch.int64 if name == "top_k" else torch.float32)
        for name in defaults
    ]
    sampling = Sampling(*settings, torch.arange(B))
    logits = torch.randn(B, 1, V, generator=generator)
    logits[:, :, 3::2] = -inf
    tree = torch.zeros(B, 1, dtype=torch.int64)
    inputs = {"lengths": tree[:, 0], "remaining": torch.full((B,), 9), "end_tokens": integers(0)}
    places = outputs(B, 1) | {"log_probabilities": floats(B, 1)}
    got = kernels.run(accept, logits, tree, tree - 1, sampling=sampling, **inputs, **places)
    unusable = torch.tensor(["temperature" in row for row in rows])
    assert torch.equal(got["status"] == 1, unusable) and torch.equal(got["counts"] == 0, unusable)
    drawn = got["emitted"][~unusable]
    assert bool(((drawn % 2 == 0) | (drawn == 1)).all()) and bool((drawn >= 0).all()) and bool((drawn < V).all())
    assert bool(got["log_probabilities"].isfinite().all())


def test_no_disagreement_in_many_draws(backend, generator):
    """Thousands of draws, one node each: not one token may differ from the reference's."""
    B, V = (100, 300) if backend.name == "emulated" else (1000, 777)
    settings = Sampling(
        torch.rand(B, generator=generator) * 2 + 0.05,
        torch.randint(0, 60, (B,), generator=generator),
        torch.rand(B, generator=generator),
        torch.rand(B, generator=generator) * 0.2,
        torch.randint(-(1 << 62), 1 << 62, (B,), generator=generator),
    )
    no_tree = torch.zeros(B, 1, dtype=torch.int64)
    for turn in range(5):
        logits = torch.randn(B, 1, V, generator=generator) * (turn + 1)
        lengths = torch.randint(0, 1 << 40, (B,), generator=generator)
        turned = settings._replace(top_p=torch.ones(B)) if turn % 2 else settings
        check(backend, logits, no_tree, no_tree - 1, sampling=turned, lengths=lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "V"), [(1, 1, 1), (3, 20, 7), (2, 9, 513), (1, 4, 32064), (1, 3, 151936)])
def test_log_probabilities(backend, generator, dtype, B, T, V):
    """Of the raw logits, whatever the temperature and the filters."""
    tokens, parents = random_tree(B, T, V, generator)
    logits = leaning(tokens, parents, V, generator, 3.0 if V < 1000 else 12.0).to(dtype)
    greedy = check(backend, logits, tokens, parents, log_probabilities=True)
    assert int(greedy["counts"].max()) > 1 or T == 1
    for settings in ({"temperature": 1.7}, {"temperature": 0.4, "top_k": 3, "top_p": 0.8}):
        sampling = sampling_of(B, **settings)
        check(backend, with_gaps(logits), tokens, parents, D=9, sampling=sampling, log_probabilities=True)


def test_log_probabilities_beyond_counts(backend):
    """Finished rows, rows cut short and rows that failed half-way hold zeros behind what they emitted."""
    logits, tokens, parents = chain(5, 6, 12)
    logits[1] = torch.nan
    logits[3, 3, 2] = torch.nan
    logits[4, 5] = torch.nan  # not visited: the walk ends before
    arguments = {"finished": torch.tensor([0, 1, 0, 0, 0]), "remaining": torch.tensor([9, 9, 2, 9, 4]), "D": 7}
    got = check(backend, logits, tokens, parents, log_probabilities=True, **arguments)
    assert got["counts"].tolist() == [6, 0, 2, 0, 4]
    assert got["status"].tolist() == [0, 0, 0, 1, 0]
    assert not got["log_probabilities"].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities_of_extreme_rows(backend, dtype):
    """Masked tokens, a sure one, an even row, the largest numbers: finite, or -inf where no float32 is lower."""
    largest = torch.finfo(dtype).max
    logits = torch.full((5, 1, 600), -torch.inf)
    logits[0, 0, 599] = 3.0
    logits[1, 0, [0, 300]] = torch.tensor([-30.0, 0.0])
    logits[2] = 0.5
    logits[3, 0, :2] = torch.tensor([-largest, largest])
    logits[4, 0, :2] = -largest
    tokens, parents = torch.zeros(5, 1, dtype=torch.int64), torch.full((5, 1), -1)
    got = check(backend, logits.to(dtype), tokens, parents, log_probabilities=True)["log_probabilities"]
    assert got[0].item() == 0.0 and got[3].item() == 0.0
    # Drawn at a temperature that makes both likely, the lower one has no probability worth a float32.
    seen = set()
    for seed in range(12):
        sampling = sampling_of(5, temperature=largest, seed=seed * 5)
        arguments = {"emitted": integers(5, 1), "log_probabilities": floats(5, 1)}
        arguments |= {name: integers(5) for name in ("counts", "status")} | {"path": integers(5, 1)}
        arguments |= {"finished": torch.zeros(5).long(), "remaining": torch.ones(5).long()}
        ends = integers(0)
        drawn = backend.run(
            accept, logits.to(dtype), tokens, parents, tokens[:, 0], end_tokens=ends, sampling=sampling, **arguments
        )
        assert not drawn["log_probabilities"].isnan().any()
        if drawn["emitted"][3].item() == 0:
            seen.add(drawn["log_probabilities"][3].item())
    assert seen == {-131008.0 if dtype is torch.float16 else -torch.inf}


def test_draws_depend_on_position_only(backend, generator):
    """The same logits and seed give the same tokens, whatever the tree and the neighbours."""
    V, D = 50, 6
    by_depth = torch.randn(D, V, generator=generator) * 2
    drawn = []
    for T, B in ((1, 1), (8, 1), (40, 3)):
        tokens, parents = random_tree(B, T, V, generator)
        logits = by_depth[depths_of(parents).clamp(max=D - 1)]
        sampling = sampling_of(B, temperature=0.9, top_k=20, seed=11)
        sampling.seeds.fill_(11)
        got = check(backend, logits, tokens, parents, lengths=torch.full((B,), 123), sampling=sampling)
        drawn += [row[: int(count)].tolist() for row, count in zip(got["emitted"], got["counts"], strict=True)]
    longest = max(drawn, key=len)
    assert all(row == longest[: len(row)] for row in drawn)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_every_instruction_set(level):
    """Each compiled variant of the CPU loops that this process does not use, in one of its own."""
    if _native.extension is None:
        pytest.skip("the native extension is not built")
    if os.environ.get("VISPEC_CPU") or _native.build_info()["instructions"] == level:
        pytest.skip("the variant that the other tests run")
    environment = {**os.environ, "VISPEC_CPU": level}
    script = "from vispec.ops import build_info; print(build_info()['instructions'])"
    probe = [sys.executable, "-c", script]
    done = subprocess.run(probe, env=environment, capture_output=True, text=True, check=True)
    if done.stdout.strip() != level:
        pytest.skip(f"this machine has no {level}")
    words = "ties float16 bits error log_probabilities settings status unusable reference".split()
    chosen = f"native and ({' or '.join(words)})"
    folder = os.path.dirname(__file__)
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run([*tests, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def valid() -> dict:
    return {
        "logits": torch.zeros(2, 3, 10),
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "parents": torch.zeros(2, 3, dtype=torch.int64),
        "lengths": torch.zeros(2, dtype=torch.int64),
        "end_tokens": torch.zeros(1, dtype=torch.int64),
        "remaining": torch.ones(2, dtype=torch.int64),
        **outputs(2, 4),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"path": torch.zeros(2, 5)},
            r"path must be int64 \[B, D\] = \[2, 5\], got float32 \[2, 5\]",
        ),
        (
            {"emitted": integers(2, 5)},
            r"emitted must be int64 \[B, D\] = \[2, 4\], got int64 \[2, 5\]",
        ),
        ({"logits": torch.zeros(2, 10)}, r"logits must be .* \[B, T, V\], got float32 \[2, 10\]"),
        (
            {"logits": torch.zeros(2, 3, 10, dtype=torch.int64)},
            r"logits must be .*, got int64 \[2, 3, 10\]",
        ),
        ({"end_tokens": torch.zeros(1)}, r"end_tokens must be int64 \[E\], got float32 \[1\]"),
        (
            {"log_probabilities": torch.zeros(2, 5)},
            r"log_probabilities must be float32 \[B, D\] = \[2, 4\], got float32 \[2, 5\]",
        ),
        ({"end_tokens": 7}, r"end_tokens must be int64 \[E\], got int 7"),
        ({"lengths": integers(3)}, r"lengths must be int64 \[B\] = \[2\], got int64 \[3\]"),
        ({"logits": torch.zeros(1, 1, 1).expand(2, 3, 1 << 19)}, r".*contiguous"),
        ({"sampling": (1.0, 0, 1.0, 0.0, 1)}, r"sampling must be a Sampling or None, got tuple"),
        (
            {"sampling": sampling_of(3)},
            r"sampling.temperature must be float32 \[B\] = \[2\], got float32 \[3\]",
        ),
        (
            {"sampling": sampling_of(2)._replace(top_p=integers(2))},
            r"sampling.top_p must be float32",
        ),
    ],
)
def test_errors(change, message):
    arguments = {**valid(), **change}
    with pytest.raises(ValueError, match=f"accept: {message}"):
        accept(**arguments)


def test_vocabulary_limit():
    with pytest.raises(ValueError, match=r"accept: V \(vocabulary\) must be from 1 to 524287, got 524288"):
        accept(**{**valid(), "logits": torch.zeros(2, 3, 1 << 19, dtype=torch.float16)})


@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"temperature": float("inf")}, "temperature must be above 0"),
        ({"top_p": 1.5}, "top_p must be from 0 to 1"),
        ({"top_p": float("nan")}, "top_p must be from 0 to 1"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1"),
        ({"top_k": -3}, "top_k must be 0"),
    ],
)
def test_sampling_values(name, settings, message):
    if name == "native" and _native.extension is None:
        pytest.skip("the native extension is not built")
    arguments = {**valid(), "sampling": sampling_of(2, **settings)}
    with use_backend(name), pytest.raises(ValueError, match=f"accept: {message}.* in row 0"):
        accept(**arguments)
    assert bool((arguments["path"] == INTEGER_POISON).all())

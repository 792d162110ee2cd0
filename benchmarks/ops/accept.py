"""Verification of a tree of 30 nodes: greedy, with a temperature, with top-k and top-p, and with top-p alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.case import Baseline, Case, Problem, WrongAnswer, eager_and_compiled, same
from vispec import ops

NAMES = ("path", "emitted", "counts", "status", "finished")
END_TOKEN = 0
# Probability of the best child at every node that has one, so that the walk goes down.
CHILD_PROBABILITY = 0.8


def walk(choices: Tensor, tokens: Tensor, parents: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """The path and the tokens [B, D] that follow a choice at every node, -1 beyond; no synchronisation."""
    B, T = tokens.shape
    rows, later = torch.arange(B, device=tokens.device), torch.arange(T, device=tokens.device) > 0
    node = torch.zeros(B, dtype=torch.int64, device=tokens.device)
    walking = torch.ones(B, dtype=torch.bool, device=tokens.device)
    path, emitted = [], []
    for _ in range(D):
        token = choices[rows, node]
        path.append(torch.where(walking, node, -1))
        emitted.append(torch.where(walking, token, -1))
        child = (parents == node[:, None]) & (tokens == token[:, None]) & later
        walking = walking & child.any(dim=1)
        node = child.int().argmax(dim=1)
    return torch.stack(path, dim=1), torch.stack(emitted, dim=1)


def plain_greedy(logits: Tensor, tokens: Tensor, parents: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """argmax of every row, then the walk."""
    return walk(logits.argmax(dim=-1), tokens, parents, D)


def plain_sampling(
    logits: Tensor, tokens: Tensor, parents: Tensor, D: int, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """The filters as transformers applies them, a draw from every row, then the walk."""
    scores = logits.float() / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(dim=-1)
        removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        removed[..., -1] = False
        scores = scores.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    choices = scores.softmax(dim=-1).flatten(0, 1).multinomial(1).view(tokens.shape)
    return walk(choices, tokens, parents, D)


def tree(T: int, K: int, D: int, V: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and parents [T] of a tree with at most K children a node and D nodes a path; siblings differ."""
    device = generator.device
    parents, depths, children = [-1], [0], [0]
    for node in range(1, T):
        free = [other for other in range(node) if depths[other] + 1 < D and children[other] < K]
        # The deepest of three: the tree then has long branches, as a draft's has.
        picks = torch.randint(0, len(free), (3,), generator=generator, device=device).tolist()
        parent = max((free[pick] for pick in picks), key=lambda other: depths[other])
        parents.append(parent)
        depths.append(depths[parent] + 1)
        children.append(0)
        children[parent] += 1
    tokens = 1 + torch.randperm(V - 1, generator=generator, device=device)[:T]
    return tokens, torch.tensor(parents, device=device)


def make(
    device: torch.device,
    generator: torch.Generator,
    *,
    T: int,
    V: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Problem:
    D = 5
    tokens, parents = (values[None] for values in tree(T, 8, D, V, generator))
    logits = 2 * torch.randn(1, T, V, generator=generator, device=device)
    logits[..., END_TOKEN] = -torch.inf
    # The first child of a node gets most of the mass of its row.
    odds = CHILD_PROBABILITY / (1 - CHILD_PROBABILITY)
    for node in reversed(range(1, T)):
        row = logits[0, int(parents[0, node])]
        row[tokens[0, node]] = row.logsumexp(dim=0) + torch.log(torch.tensor(odds))
    logits = logits.bfloat16()

    def row_of(value: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([value], dtype=dtype, device=device)

    lengths = row_of(2048, torch.int64)
    limits = {"end_tokens": row_of(END_TOKEN, torch.int64), "remaining": row_of(1 << 30, torch.int64)}
    sampling = None
    if temperature:
        sampling = ops.Sampling(
            temperature=row_of(temperature, torch.float32),
            top_k=row_of(top_k, torch.int64),
            top_p=row_of(top_p, torch.float32),
            min_p=row_of(0.0, torch.float32),
            seeds=row_of(1234, torch.int64),
        )

    def destinations() -> dict[str, Tensor]:
        shapes = {"path": (1, D), "emitted": (1, D), "counts": (1,), "status": (1,), "finished": (1,)}
        return {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}

    written = destinations()

    def restore() -> None:
        """Poisons all but the flag, which is read as well."""
        for name, tensor in written.items():
            tensor.fill_(0 if name == "finished" else -7)

    expected = _expected(logits, tokens, parents, lengths, limits, sampling, destinations())

    def error() -> float:
        for name in NAMES:
            same(name, written[name], expected[name])
        if int(written["finished"]) or int(written["counts"]) < 1:
            raise WrongAnswer("the case itself is wrong: it must emit tokens and leave its row unfinished")
        return 0.0

    def error_of_plain(answer: tuple[Tensor, Tensor]) -> float:
        path, emitted = answer
        if sampling is None:
            same("path", path, expected["path"])
            same("emitted", emitted, expected["emitted"])
        else:
            _possible(logits, path, emitted, sampling)
        return 0.0

    nodes = (logits, tokens, parents, D)
    if sampling is None:
        baselines = eager_and_compiled("PyTorch", plain_greedy, nodes, error_of_plain)
    else:
        arguments = (*nodes, temperature, top_k, top_p)
        baselines = eager_and_compiled("PyTorch", plain_sampling, arguments, error_of_plain)
        flashinfer = _flashinfer(*arguments)
        baselines.append(Baseline("FlashInfer", flashinfer, error_of_plain, compiles=True))
    return Problem(
        run=lambda: ops.accept(logits, tokens, parents, lengths, sampling=sampling, **limits, **written),
        outputs=list(written.values()),
        error=error,
        error_bound=0.0,
        bytes_moved=logits.nbytes + 16 * T + 16 * D,
        baselines=baselines,
        restore=restore,
    )


def _expected(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    lengths: Tensor,
    limits: dict[str, Tensor],
    sampling: ops.Sampling | None,
    destinations: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The outputs by float64 where the choice is the argmax, else by the reference's integers, on the CPU."""
    host = {name: tensor.cpu() for name, tensor in destinations.items()}
    if sampling is not None:
        settings = ops.Sampling(*(setting.cpu() for setting in sampling))
        arguments = (tensor.cpu() for tensor in (logits, tokens, parents, lengths))
        here = {name: tensor.cpu() for name, tensor in limits.items()}
        ops.accept_reference(*arguments, sampling=settings, **here, **host)
        return host
    # A stable sort gives the lowest index of the largest values.
    best = [int(row.double().sort(descending=True, stable=True).indices[0]) for row in logits[0].cpu()]
    path = [0]
    while len(path) < host["path"].shape[1]:
        children = [
            node
            for node in range(1, tokens.shape[1])
            if parents[0, node] == path[-1] and tokens[0, node] == best[path[-1]]
        ]
        if not children:
            break
        path.append(children[0])
    host["path"].fill_(-1)[0, : len(path)] = torch.tensor(path)
    host["emitted"].fill_(-1)[0, : len(path)] = torch.tensor([best[node] for node in path])
    host["counts"].fill_(len(path))
    return host


def _possible(logits: Tensor, path: Tensor, emitted: Tensor, sampling: ops.Sampling) -> None:
    """Another generator draws other tokens: require that the filters leave them in."""
    for node, token in zip(path[0].tolist(), emitted[0].tolist(), strict=True):
        if node < 0:
            return
        scores = logits[0, node].float() / sampling.temperature
        rank = int((scores > scores[token]).sum())
        above = float(scores.softmax(dim=-1)[scores > scores[token]].sum())
        if sampling.top_k and rank >= int(sampling.top_k):
            raise WrongAnswer(f"a token of rank {rank} was drawn with top_k={int(sampling.top_k)}")
        # After top-k the mass is renormalised, which only takes more tokens out.
        if above > float(sampling.top_p) + 1e-3:
            raise WrongAnswer(f"a token beyond the mass {above:.4f} was drawn with top_p={float(sampling.top_p):g}")


def _flashinfer(
    logits: Tensor, tokens: Tensor, parents: Tensor, D: int, temperature: float, top_k: int, top_p: float
) -> Callable[[], Callable[[], Any]]:
    def prepare() -> Callable[[], Any]:
        from flashinfer import sampling

        def call() -> tuple[Tensor, Tensor]:
            scores = logits[0].float() / temperature
            if top_k or top_p < 1:
                choices = sampling.top_k_top_p_sampling_from_logits(scores, top_k or scores.shape[-1], top_p)
            else:
                choices = sampling.sampling_from_logits(scores)
            return walk(choices.long().view(tokens.shape), tokens, parents, D)

        return call

    return prepare


def _cases() -> list[Case]:
    ways = {
        "greedy": {},
        "temperature 0.8": {"temperature": 0.8},
        "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
        # The leaves' rows are flat: thousands of tokens share their mass, and one block must read each row.
        "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    }
    targets = {"greedy": 4, "temperature 0.8": 6, "top-k 50, top-p 0.9": 12}
    return [
        Case(
            "accept",
            f"{way}, 30 nodes, V={V}",
            make,
            {"T": 30, "V": V, **settings},
            {"T": 12, "V": 700, **settings},
            cold=False,
            target_microseconds=targets.get(way) if V > 100_000 else None,
        )
        for V in (32064, 152064)
        for way, settings in ways.items()
    ]


CASES = _cases()

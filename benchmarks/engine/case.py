"""One target at one context and batch: its answers in every way, and what each of them costs."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

import vispec
from benchmarks.engine.clocks import HostClock, PhaseClock, ReplayClock, clock_of, trace
from benchmarks.engine.floors import PHASES, Machine, Setting, Work, adaptor_pass, round_phases, target_pass
from benchmarks.engine.passes import adaptor_seconds, verify_seconds
from benchmarks.engine.replay import PacedDraft
from benchmarks.engine.targets import Shape, prompts

SHORT, LONG = 16, 112  # new tokens of the two answers
PHASE_TOKENS = 48
Found = TypeVar("Found")


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of a call until the device is done."""
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def per_token(answer: Callable[[int], Any], repeats: int) -> float:
    """Seconds that one more token costs."""
    # The long one first: what is allocated or compiled for its length also serves the short one.
    for tokens in (LONG, SHORT):
        answer(tokens)
    found = [(seconds(lambda: answer(LONG)) - seconds(lambda: answer(SHORT))) / (LONG - SHORT) for _ in range(repeats)]
    return statistics.median(found)


def unless_out_of_memory(run: Callable[[], Found]) -> Found | None:
    """What the call returns, or None where the GPU's memory was not enough; what it had taken is free again."""
    try:
        return run()
    except torch.OutOfMemoryError:
        # Its traceback holds the tensors; it is gone behind this block.
        pass
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


class Case:
    """One target, one setting.

    The draft is told what verification says, and then proposes it.
    """

    def __init__(
        self, shape: Shape, model: PreTrainedModel, setting: Setting, tokens: int, draft_weights: str | None = None
    ) -> None:
        self.shape, self.model, self.setting = shape, model, setting
        self.tokens = tokens
        self.inputs = prompts(shape, setting.context, setting.batch, str(model.device))
        self.real = vispec.ViSpecDraft.for_target(model)
        self.real.weights = draft_weights
        self.draft = PacedDraft(self.real, self._true_answers(), shape.tau, setting.tree)

    def _true_answers(self) -> Tensor:
        """What verification says, [B, tokens]: with trees of the measured size, so that near-ties fall alike."""
        junk = torch.zeros(self.setting.batch, 2, dtype=torch.int64, device=self.model.device)
        draft = PacedDraft(self.real, junk, 0.0, self.setting.tree)
        found = self._answer(draft, self.tokens, tree=self.setting.tree)
        return found[:, self.inputs["input_ids"].shape[1] :]

    def _answer(self, draft: PacedDraft | None, tokens: int, **options: Any) -> Any:
        options = {"max_new_tokens": tokens, "do_sample": False, **options}
        return vispec.fast_generate(self.model, draft, self.inputs, **options)

    def speculate(self, tokens: int) -> vispec.GenerationStats:
        """Our answer, in rounds that run ahead of the host."""
        options = {"tree": self.setting.tree, "graphs": True, "return_dict_in_generate": True}
        return self._answer(self.draft, tokens, **options).stats

    def plain(self, tokens: int) -> Tensor:
        """Plain decoding on the same engine."""
        return self._answer(None, tokens)

    def generate(self, tokens: int, **options: Any) -> Tensor:
        """Hugging Face's answer."""
        return self.model.generate(**self.inputs, max_new_tokens=tokens, do_sample=False, **options)

    def phases(self) -> PhaseClock:
        """The phases of one answer's rounds, run call by call."""
        clock = PhaseClock(clock_of(self.model.device))
        self._watch(clock)
        return clock

    def _watch(self, clock: PhaseClock) -> None:
        self.draft.pacing = clock.pacing
        vispec.release(self.model)
        try:
            with clock.watching():
                self.speculate(min(self.tokens, PHASE_TOKENS))
        finally:
            self.draft.pacing = nullcontext
            vispec.release(self.model)

    def profile(self, folder: Path, name: str) -> list[Path]:
        """Writes a few rounds call by call, with the phases' names, and on a GPU a few that are replayed."""
        device = self.model.device
        calls, replayed = (folder / f"{name}_{kind}.json" for kind in ("calls", "replayed"))
        with trace(calls, device) as on_round:
            # Without events, and without holding the device back: the trace shows launches as they are.
            self._watch(PhaseClock(HostClock(), on_round))
        if device.type != "cuda":
            return [calls]
        with trace(replayed, device) as on_round, ReplayClock(on_round).watching():
            self.speculate(self.tokens)
        return [calls, replayed]


def measure(case: Case, machine: Machine | None, repeats: int, compiled: bool) -> dict[str, Any]:
    """One row of figures; without a machine (no GPU) only what needs no clock, and shares of a round."""
    replays = ReplayClock()
    with replays.watching():
        stats = case.speculate(case.tokens)
    tree = case.setting.tree
    row: dict[str, Any] = {
        "context": case.setting.context,
        "batch": case.setting.batch,
        "tree": {"depth": tree.depth, "top_k": tree.top_k, "total_tokens": tree.total_tokens},
        "published_tau": case.shape.tau,
        "tau": stats.tau,
        "rounds": stats.rounds,
        **phase_figures(case, machine),
        **pass_figures(case, machine),
    }
    if machine is not None:
        row |= round_figures(case, machine, replays, repeats)
        row |= rival_figures(case, row["token_ms"] / 1e3, compiled)
    return row


def beside(found: float, floor: float) -> dict[str, float]:
    """A time and its floor, both in seconds, as figures of a record."""
    return {"ms": found * 1e3, "floor_ms": floor * 1e3, "times_over_floor": found / floor}


def phase_figures(case: Case, machine: Machine | None) -> dict[str, Any]:
    """Of rounds that run call by call: each phase beside its floor, and what is no phase."""
    clock = case.phases()
    found = clock.seconds()
    whole = sum(found.values())
    if machine is None:
        return {"phase_shares": {name: value / whole for name, value in found.items()}}
    parts = round_phases(case.shape, case.setting)
    return {
        "phases": {name: beside(found[name], machine.seconds(parts[name])) for name in PHASES},
        "phases_pacing_ms": found["pacing"] * 1e3,
        "phases_rest_ms": found["rest"] * 1e3,
        "phases_round_ms": whole * 1e3,
        "phases_queued_in_time": clock.held,
    }


def pass_figures(case: Case, machine: Machine | None) -> dict[str, Any]:
    """The target over more and more nodes, and the adaptor, beside their floors."""
    shape, setting = case.shape, case.setting
    verify = verify_seconds(case.model, case.inputs)
    adaptor = adaptor_seconds(case.model, case.real, shape.picture_rows)
    if machine is None:
        return {"verify_nodes": list(verify)}

    def figures(found: tuple[float, bool], parts: list[Work]) -> dict[str, Any]:
        return {**beside(found[0], machine.seconds(parts)), "queued_in_time": found[1]}

    return {
        "verify": [
            {"nodes": nodes, **figures(found, target_pass(shape, setting, nodes))} for nodes, found in verify.items()
        ],
        "adaptor": figures(adaptor, adaptor_pass(shape, shape.picture_rows)),
    }


def round_figures(case: Case, machine: Machine, replays: ReplayClock, repeats: int) -> dict[str, Any]:
    """A round as users meet it, and one step of plain decoding."""
    step = per_token(case.plain, repeats)
    token = per_token(case.speculate, repeats)
    # Rows of a batch end their rounds together; the slowest row's tokens a round count.
    tokens_a_round = (LONG - SHORT) / (case.speculate(LONG).rounds - case.speculate(SHORT).rounds)
    step_floor = machine.seconds(target_pass(case.shape, case.setting, 1))
    round_floor = sum(map(machine.seconds, round_phases(case.shape, case.setting).values()))
    device, host = replays.device_seconds(), replays.host_seconds()
    return {
        "plain_step": beside(step, step_floor),
        "round": beside(token * tokens_a_round, round_floor),
        "replayed_rounds": replays.rounds,
        "replayed_round": None if device is None else beside(device, round_floor),
        "host_ms_a_round": None if host is None else host * 1e3,
        "tokens_a_round": tokens_a_round,
        "token_ms": token * 1e3,
        "tokens_per_second": case.setting.batch / token,
        "speed_up_over_own_plain": step / token,
    }


def rival_figures(case: Case, token: float, compiled: bool) -> dict[str, Any]:
    """Hugging Face's ways to the same number of tokens; None: not asked for, or more memory than there is."""

    def static(tokens: int) -> Tensor:
        # On a GPU `generate` compiles the forward pass of a static cache by itself, anew for each case: after several
        # sizes torch.compile would silently run it uncompiled.
        return case.generate(tokens, cache_implementation="static")

    torch.compiler.reset()
    ways: dict[str, Callable[[int], Any]] = {"generate_eager": case.generate}
    if compiled:
        ways["generate_compiled"] = static
    found: dict[str, Any] = {"out_of_memory": []}
    for name in ("generate_eager", "generate_compiled"):
        way = ways.get(name)
        spent = None if way is None else unless_out_of_memory(lambda way=way: per_token(way, 1))
        if way is not None and spent is None:
            found["out_of_memory"].append(name)
        found[f"{name}_ms"] = None if spent is None else spent * 1e3
        found[f"speed_up_over_{name}"] = None if spent is None else spent / token
    return found

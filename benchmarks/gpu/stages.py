"""Runs commands with a time limit each, some of them side by side, and keeps what they said."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHOWN_LINES = 25
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Stage:
    """One command."""

    name: str
    command: list[str]
    limit_seconds: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    name: str
    status: str
    """"ok", "failed: status N", "stopped after N s" or "failed: could not start: why"."""
    seconds: float
    log: str

    @property
    def good(self) -> bool:
        return self.status == "ok"

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Running:
    """A stage that was started, with everything it starts in turn."""

    def __init__(self, stage: Stage, folder: Path, place: Path) -> None:
        self.stage, self.path = stage, folder / f"{stage.name}.log"
        self.begin = time.monotonic()
        self.status = ""
        self.process: subprocess.Popen | None = None
        with self.path.open("w") as log:
            log.write(f"{' '.join(stage.command)}\n\n")
            log.flush()
            try:
                self.process = subprocess.Popen(
                    stage.command,
                    cwd=place,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # A group of its own, so that the limit also ends what the stage has started.
                    start_new_session=True,
                )
            except OSError as error:
                self.status = f"failed: could not start: {error}"

    def ended(self) -> bool:
        """Whether it is over; ends it where its time is up."""
        if self.process is None:
            return True
        code = self.process.poll()
        if code is not None:
            self.status = "ok" if code == 0 else f"failed: status {code}"
            return True
        if time.monotonic() - self.begin > self.stage.limit_seconds:
            self.stop()
            return True
        return False

    def stop(self) -> None:
        """End the stage and its children: asked first, then made to.

        One that a driver holds may not even end then; the others do not wait for it.
        """
        self.status = f"stopped after {self.stage.limit_seconds:g} s"
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(GRACE_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass

    def outcome(self) -> Outcome:
        return Outcome(self.stage.name, self.status, round(time.monotonic() - self.begin, 1), self.path.name)


def run(groups: Sequence[Sequence[Stage]], folder: Path, place: Path) -> list[Outcome]:
    """Run the groups one after another and the stages of a group side by side.

    A stage that fails stops none of the others. Standard output and errors of each go to `folder`/<name>.log.

    Args:
        place: the directory that the commands run in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for group in groups:
        running = [Running(stage, folder, place) for stage in group]
        try:
            while running:
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    outcomes.append(one.outcome())
                    tell(outcomes[-1], folder)
                time.sleep(0.05)
        finally:
            for one in running:
                one.stop()
    return outcomes


def tell(outcome: Outcome, folder: Path) -> None:
    """Print how a stage ended, and the end of its log."""
    print(f"=== {outcome.name}: {outcome.status} ({outcome.seconds:.1f} s)", flush=True)
    lines = (folder / outcome.log).read_text(errors="replace").splitlines()
    for line in lines[-SHOWN_LINES:] if not outcome.good else lines[-1:]:
        print(f"    {line}", flush=True)

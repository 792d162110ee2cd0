"""What every measurement says of itself: which commit, which hardware, which versions."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import vispec
from vispec import ops

RESULTS = Path(__file__).resolve().parent / "results"


def circumstances() -> dict[str, Any]:
    """Commit, hardware and versions, for the head of a JSON record.

    VISPEC_COMMIT names the commit where only a copy of the files is there; None: unknown.
    """
    commit, changes = _source()
    return {
        "commit": commit or os.environ.get("VISPEC_COMMIT"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_state": gpu_state(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vispec": vispec.__version__,
        "build": ops.build_info(),
    }


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks, temperature and power of the GPU at this moment, as nvidia-smi tells them; None without one."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw")
    number = str(torch.cuda.current_device())
    command = ["nvidia-smi", f"--id={number}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values, strict=True)) if done.returncode == 0 and len(values) == len(names) else None


def peak_resident_bytes() -> int:
    """The most memory that this process has held at one time."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss, which on Linux starts at what the parent held.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    # In bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write(path: str | Path, name: str, rows: Any, **more: Any) -> None:
    """Writes one record: {"benchmark", "circumstances", "rows"}, and what else is to be said of the run."""
    record = {"benchmark": name, "circumstances": circumstances(), **more, "rows": rows}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def _git(*words: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@cache
def _source() -> tuple[str | None, str | None]:
    """The commit and what differs from it, as they were when first asked: later edits are not what runs."""
    return _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# What runs is what was there at the start.
_source()

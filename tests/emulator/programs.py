"""Compiles the emulator's test programs, each once per flavour and test run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX", "g++")
FLAVOURS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
KERNELS = sorted(path.name for path in (ROOT / "csrc").glob("*.cu"))


def build(
    program: str,
    flavour: str,
    folder: Path,
    *,
    kernels: Sequence[str] = (),
    altered: Mapping[str, Path] | None = None,
    name: str = "altered",
) -> Path:
    """The path of tests/emulator/`program`.cu compiled for the emulator into `folder`.

    Args:
        kernels: files of csrc to link as well.
        altered: for some of `kernels` the file to compile instead, in a changed copy of csrc.
        name: of the alteration, where a test run makes several.
    """
    altered = altered or {}
    csrc = ROOT / "csrc"
    common = [COMPILER, "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-ffp-contract=off"]
    common += ["-fno-omit-frame-pointer", *FLAVOURS[flavour], "-DVISPEC_EMULATED", f"-I{csrc}"]
    own = [HERE / f"{program}.cu", *sorted((csrc / "emu").glob("*.cpp"))]
    sources = {file.stem: file for file in own}
    sources |= {Path(name).stem: altered.get(name, csrc / name) for name in kernels}
    objects = []
    for stem, file in sources.items():
        changed = f"{name}-" if file in altered.values() else ""
        place = folder / f"{flavour}-{changed}{stem}.o"
        objects.append(place)
        if not place.exists():
            run([*common, "-x", "c++", "-c", file, "-o", place])
    path = folder / f"{flavour}-{f'{name}-' if altered else ''}{program}"
    if not path.exists():
        run([*common, *objects, "-o", path])
    return path


def build_cuda(program: str, folder: Path) -> Path:
    """The same program for the GPU of this machine."""
    path = folder / f"cuda-{program}"
    options = ["-std=c++17", "-O2", "-arch=native", f"-I{ROOT / 'csrc'}"]
    run([nvcc(), *options, HERE / f"{program}.cu", "-o", path])
    return path


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    return shutil.which("nvcc") or next(
        (str(path) for path in [Path("/usr/local/cuda/bin/nvcc")] if path.exists()), None
    )


def run(command: list) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0 or done.stderr.strip():
        raise RuntimeError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def call(program: Path, *arguments: str, seed: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program; its own sanitizer settings, none from outside."""
    outside = ("LD_PRELOAD", "ASAN_OPTIONS", "VISPEC_EMULATOR_SEED")
    environment = {key: value for key, value in os.environ.items() if key not in outside}
    environment["TSAN_OPTIONS"] = "exitcode=66"
    if seed is not None:
        environment["VISPEC_EMULATOR_SEED"] = str(seed)
    command = [str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)

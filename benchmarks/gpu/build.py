"""Builds the extension for one GPU, with CMake where it is installed, otherwise with the compilers alone.

    python -m benchmarks.gpu.build                   # into the source tree, for the GPU of this machine
    python -m benchmarks.gpu.build --architecture 90 --into build/direct --direct

The second way needs nvcc, a C++ compiler, Python's headers and torch, which brings pybind11's headers. Sources are
found by the same patterns as in CMakeLists.txt, and flags that matter are read from the same file.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPTIMIZED = ["-std=c++17", "-O3", "-DNDEBUG"]


@dataclass
class CpuFlags:
    """What cmake/cpu_flags.txt says."""

    every: list[str] = field(default_factory=list)
    parts: dict[str, list[str]] = field(default_factory=dict)
    levels: dict[str, list[str]] = field(default_factory=dict)


def read_cpu_flags(x86: bool) -> CpuFlags:
    """The flags for this kind of processor."""
    flags = CpuFlags()
    for line in (ROOT / "cmake" / "cpu_flags.txt").read_text().splitlines():
        kind, *words = line.split() or [""]
        if kind == "every":
            flags.every += words
        elif kind == "part":
            flags.parts[words[0]] = words[1:]
        elif kind == "level" and (words[1] == "any" or x86):
            flags.levels[words[0]] = words[2:]
    return flags


@dataclass(frozen=True)
class Compilation:
    """One source into one object."""

    object: Path
    command: list[str]


def compilations(folder: Path, architecture: str | None, pybind11: Path) -> list[Compilation]:
    """Every object of the extension; without an architecture the one for the CPU alone."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = read_cpu_flags(x86)
    cxx = [os.environ.get("CXX", "c++"), *OPTIMIZED, *flags.every, "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
    own = [
        f'-DVISPEC_VERSION="{version()}"',
        f'-DVISPEC_ARCHS="{architecture or ""}"',
        *(["-DVISPEC_X86_LEVELS"] if x86 else []),
        *(["-DVISPEC_HAS_CUDA"] if architecture else []),
        f"-I{ROOT / 'bindings'}",
        f"-isystem{pybind11}",
        f"-isystem{sysconfig.get_paths()['include']}",
    ]
    found = []

    def add(source: Path, name: str, command: list[str]) -> None:
        target = folder / f"{name}.o"
        found.append(Compilation(target, [*command, "-c", str(source), "-o", str(target)]))

    # The slowest first, so that they do not start last.
    if architecture:
        nvcc = [find_cuda_program("nvcc"), *OPTIMIZED, f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        # Line information costs nothing at run time, and the sanitizer then names lines.
        nvcc += ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}", "-lineinfo"]
        for source in sorted((ROOT / "csrc").glob("*.cu")):
            add(source, f"kernels_{source.stem}", nvcc)
    for room in ("bindings", "csrc/cpu"):
        for source in sorted((ROOT / room).glob("*.cpp")):
            add(source, f"{Path(room).name}_{source.stem}", cxx + own)
    for level, for_level in flags.levels.items():
        for part, for_part in flags.parts.items():
            command = [*cxx, *for_level, *for_part, f"-DVISPEC_LEVEL={level}"]
            add(ROOT / "csrc/cpu/level" / f"{part}.cpp", f"{part}_{level}", command)
    return found


def build_directly(into: Path, work: Path, architecture: str | None, jobs: int) -> Path:
    """Compile everything at once and link it.

    Raises:
        SystemExit: with the compiler's own words.
    """
    work.mkdir(parents=True, exist_ok=True)
    todo = compilations(work, architecture, pybind11_headers())
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda one: _run(one.command), todo))
    target = into / f"_ext{sysconfig.get_config_var('EXT_SUFFIX')}"
    linker = [os.environ.get("CXX", "c++")]
    libraries = ["-lpthread"]
    if architecture:
        linker = [find_cuda_program("nvcc"), f"-arch=sm_{architecture}"]
        # Static: the module then imports on a machine without driver or toolkit.
        libraries = ["-cudart", "static", *libraries]
    into.mkdir(parents=True, exist_ok=True)
    _run([*linker, "-shared", *(str(one.object) for one in todo), *libraries, "-o", str(target)])
    return target


def build_with_cmake(into: Path, work: Path, architecture: str | None, jobs: int) -> Path:
    """The project's own build, for one architecture, installed into a folder."""
    import pybind11

    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_INSTALL_PREFIX": into.resolve(),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "VISPEC_VERSION": version(),
        "VISPEC_CUDA": "ON" if architecture else "OFF",
        "VISPEC_CUDA_ARCHS": architecture or "",
    }
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    defines = [f"-D{name}={value}" for name, value in options.items()]
    _run(["cmake", "-S", str(ROOT), "-B", str(work), *generator, *defines])
    _run(["cmake", "--build", str(work), "--target", "install", "--parallel", str(jobs)])
    return into / f"_ext{sysconfig.get_config_var('EXT_SUFFIX')}"


def has_cmake() -> bool:
    """Whether CMake is there, and the Python package whose files it looks for."""
    return shutil.which("cmake") is not None and importlib.util.find_spec("pybind11") is not None


def find_cuda_program(name: str) -> str:
    """A program of the CUDA toolkit.

    Raises:
        SystemExit: where it is not found.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = os.pathsep.join([os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)])
    found = shutil.which(name, path=places)
    if found is None:
        raise SystemExit(f"{name} was not found; set CUDA_HOME or add it to PATH")
    return found


def pybind11_headers() -> Path:
    """The folder above pybind11/: torch's own copy, which is always there."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent / "include"] if spec and spec.origin else []
    for place in places:
        if (place / "pybind11" / "pybind11.h").is_file():
            return place
    raise SystemExit(f"pybind11's headers were not found in {', '.join(map(str, places)) or 'torch, which is missing'}")


def version() -> str:
    """The version in pyproject.toml."""
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def device_architecture() -> str:
    """The compute capability of this machine's GPU, such as 90.

    Raises:
        SystemExit: without a GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; name an architecture with --architecture, such as 90")
    return "".join(map(str, torch.cuda.get_device_capability()))


def _run(command: Sequence[str]) -> None:
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"{time.monotonic() - begin:6.1f} s  {' '.join(command)}\n{done.stdout}{done.stderr}", flush=True)
    if done.returncode != 0:
        raise SystemExit(f"build: this command failed with status {done.returncode}: {' '.join(command)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", help="90 for an H100, for example; default: that of this machine's GPU")
    parser.add_argument("--into", type=Path, default=ROOT / "vispec", help="folder of the module")
    parser.add_argument("--direct", action="store_true", help="call the compilers even where CMake is installed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    architecture = arguments.architecture or device_architecture()
    directly = arguments.direct or not has_cmake()
    work = ROOT / "build" / f"gpu-{'direct' if directly else 'cmake'}-{architecture}"
    build = build_directly if directly else build_with_cmake
    print(f"built {build(arguments.into, work, architecture, arguments.jobs)}")


if __name__ == "__main__":
    main()

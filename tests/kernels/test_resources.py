"""What ptxas makes of every kernel: registers and local memory within the budget written here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = "sm_90"

# Kernel: registers a thread may take. No kernel may spill or use a stack: local memory goes through
# the caches, at ten times the latency of a register and more. A kernel that is not listed fails, so
# that a new one is judged.
BUDGETS = {
    "accept_choose": 64,
    "accept_filter": 80,
    "accept_list": 48,
    "accept_log_probabilities": 40,
    "accept_scan": 32,
    "accept_walk": 40,
    "accept_weigh": 40,
    "adaptor_merge": 80,
    "adaptor_scores": 128,  # two blocks an SM and more
    "adaptor_sum": 255,  # at 96 queries; the sums alone are 96. At 64 two blocks of 256 threads take 128 each
    "adaptor_weigh": 64,
    "attention_merge": 64,
    "attention_splits": 255,  # at head 256; the sums alone are 128
    "build_tree_rows": 40,
    "commit_columns": 128,
    "grow_level_blocks": 64,  # two blocks of 512 threads an SM
    "int8_linear_rows": 255,  # of float32 rows; of 16-bit rows two blocks of 256 threads take 128 each
    "path_newest": 128,
    "path_sealed": 255,  # at head 256; the sums alone are 128
    "rms_norm_rows": 64,
    "rope_append_columns": 64,
    "silu_mul_rows": 64,
}
KERNELS = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))


def _nvcc() -> str | None:
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def _compile(source: Path, output: Path) -> str:
    """ptxas's report on one file."""
    options = [
        f"-arch={ARCHITECTURE}",
        "-std=c++17",
        "-O3",
        "-cubin",
        "-Xptxas",
        "-v",
        f"-I{ROOT / 'csrc'}",
    ]
    command = [_nvcc() or "", *options, str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def _name(mangled: str) -> str:
    """The kernel's own name: `rms_norm_rows` of `_ZN6vispec7kernels13rms_norm_rowsI...`."""
    place, name = mangled.index("_ZN") + 3, mangled
    while match := re.match(r"(\d+)", mangled[place:]):
        start = place + len(match.group(1))
        place = start + int(match.group(1))
        name = mangled[start:place]
    return name


def _kernels(report: str) -> list[tuple[str, int, int]]:
    """(kernel, registers, bytes of local memory) of every entry function in ptxas's report."""
    found = []
    for entry in report.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(
            int,
            re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", entry).group(1))
        found.append((_name(entry.split("'")[0]), registers, stack + stores + loads))
    return found


@pytest.mark.skipif(_nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("stem", KERNELS)
def test_registers_and_local_memory(tmp_path, stem):
    kernels = _kernels(_compile(ROOT / "csrc" / f"{stem}.cu", tmp_path / "kernels.cubin"))
    assert kernels
    for name, registers, local_bytes in kernels:
        assert name in BUDGETS, f"{stem}.cu: write down a budget for {name} ({registers} registers)"
        assert local_bytes == 0, f"{name}: {local_bytes} bytes of local memory"
        assert registers <= BUDGETS[name], f"{name}: {registers} registers, budget {BUDGETS[name]}"


@pytest.mark.skipif(_nvcc() is None, reason="no nvcc")
def test_local_memory_is_noticed(tmp_path):
    """An array indexed at run time lives in local memory, which the report must show."""
    source = tmp_path / "local.cu"
    source.write_text(
        "namespace vispec { __global__ void rms_norm_rows(int* out, int n) {\n"
        "  int values[64];\n"
        "  for (int i = 0; i < 64; ++i) values[i] = out[i] * n;\n"
        "  for (int i = 0; i < n; ++i) values[out[i] & 63] += i;\n"
        "  for (int i = 0; i < 64; ++i) out[i] = values[i];\n"
        "} }\n"
    )
    ((name, _, local_bytes),) = _kernels(_compile(source, tmp_path / "local.cubin"))
    assert (name, local_bytes >= 256) == ("rms_norm_rows", True)

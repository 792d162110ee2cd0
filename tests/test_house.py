"""The house rules that a machine can check: who may import whom, and how large a file may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each room of the package may import, beside itself. CONTRIBUTING.md shows the same picture.
ARROWS: dict[str, set[str]] = {
    "_native": set(),
    "ops": {"_native"},
    "tree": {"ops"},
    "cache": {"ops"},
    "prompt": {"cache"},
    "targets": {"prompt", "tree", "cache", "ops"},
    "drafts": {"targets", "prompt", "tree", "cache", "ops"},
    "decode": {"drafts.base", "targets", "prompt", "tree", "cache", "ops"},
    "compare": {"decode", "targets", "tree"},
    "demo": {"targets", "drafts", "tree"},
}
# The wiring: these rooms may import everything.
WIRING = {"__init__", "__main__", "cli", "train"}
HUGGING_FACE = {"targets", "demo", "cli", "train"}


def rooms() -> list[tuple[str, Path]]:
    package = ROOT / "vispec"
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found.append((parts[0], path))
    return found


def imported(path: Path) -> set[str]:
    """Dotted names of everything a module imports at run time."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            names.update(f"{stem}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return names


@pytest.mark.parametrize(("room", "path"), rooms(), ids=lambda value: getattr(value, "name", value))
def test_imports_follow_the_arrows(room, path):
    names = imported(path)
    if room not in WIRING:
        assert room in ARROWS, f"{path}: a new room needs its arrows here and in CONTRIBUTING.md"
        allowed = ARROWS[room] | {room}
        for name in names:
            if name == "vispec" or name.startswith("vispec."):
                inner = name.removeprefix("vispec").removeprefix(".")
                fits = any(inner == room_name or inner.startswith(f"{room_name}.") for room_name in allowed)
                assert fits, f"{path.relative_to(ROOT)} imports {name}; {room} may import {sorted(allowed)}"
    if room not in HUGGING_FACE:
        assert not [name for name in names if name.split(".")[0] == "transformers"], path
    if room != "_native":
        compiled = [name for name in names if re.search(r"_extension|_emulated", name)]
        assert not compiled, f"{path}: only vispec/_native.py imports the compiled modules"


def test_the_walk_sees_a_forbidden_import(tmp_path):
    bad = ROOT / "vispec" / "ops"
    source = "from ..decode import fast_generate\nfrom vispec import drafts\nimport vispec.targets.base\n"
    path = tmp_path / "bad.py"
    path.write_text(source)
    assert bad.is_dir()
    names = {name for name in _imported_as(source, bad / "bad.py")}
    assert names == {"vispec.decode.fast_generate", "vispec.drafts", "vispec.targets.base"}


def _imported_as(source: str, path: Path) -> set[str]:
    class Placed(type(path)):
        def read_text(self, *_: object, **__: object) -> str:
            return source

    return imported(Placed(path))


INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def sources(folder: str) -> list[Path]:
    endings = {".h", ".cpp", ".cu", ".cuh", ".inc"}
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in endings)


def test_kernels_know_neither_python_nor_torch():
    files = sources("csrc")
    assert files
    for path in files:
        for name in INCLUDE.findall(path.read_text()):
            assert not re.search(r"torch|ATen|c10|pybind11|Python\.h|bindings", name), f"{path}: {name}"


def test_bindings_know_the_contract_and_no_kernel():
    files = sources("bindings")
    assert files
    for path in files:
        for name in INCLUDE.findall(path.read_text()):
            assert not re.search(r"torch|ATen|c10|\.cuh", name), f"{path}: {name}"
            if "csrc" in name or name.endswith("ops.h"):
                assert name.split("/")[-1] == "ops.h", f"{path}: {name}"


def test_only_the_runtime_header_holds_inline_assembly():
    for path in sources("csrc"):
        if path.name != "rt.h" and path.parent.name != "emu":
            assert not re.search(r"\basm\b\s*(volatile)?\s*\(", path.read_text()), path


def test_files_stay_small_enough_to_see_through():
    limits = {".py": 400, ".cuh": 500, ".cu": 500, ".cpp": 600, ".h": 700}
    for folder in ("vispec", "csrc", "bindings"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in limits:
                lines = len(path.read_text().splitlines())
                assert lines <= limits[path.suffix], f"{path.relative_to(ROOT)} has {lines} lines"

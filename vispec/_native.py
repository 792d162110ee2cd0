"""The only importer of the compiled modules."""

from __future__ import annotations

import importlib
from types import ModuleType

BUILD = "pip install ."
BUILD_CUDA = "VISPEC_CUDA=ON pip install --force-reinstall --no-deps ."
BUILD_EMULATED = "VISPEC_EMULATED=ON pip install -e ."


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"vispec.{name}"), ""
    except ImportError as error:
        return None, str(error)


extension, _why_not = _load("_ext")
_emulated: ModuleType | None = None


def require(op: str) -> ModuleType:
    """The extension, or an error which says how to build it."""
    if extension is None:
        raise RuntimeError(f"{op}: the native extension is not there ({_why_not}); build it with: {BUILD}")
    return extension


def require_cuda(op: str) -> ModuleType:
    """The extension with CUDA kernels, or an error which says how to build it."""
    if extension is None or not extension.build_info()["cuda"]:
        what = f"is not there ({_why_not})" if extension is None else "was built without CUDA kernels"
        raise RuntimeError(f"{op}: the native extension {what}; build it with: {BUILD_CUDA}")
    return extension


def emulated(op: str) -> ModuleType:
    """The CUDA kernel sources run by the CPU emulator; test only."""
    global _emulated
    if _emulated is None:
        _emulated, why_not = _load("_emulated")
        if _emulated is None:
            raise RuntimeError(
                f"{op}: the emulated kernels are not there ({why_not}); build them with: {BUILD_EMULATED}"
            )
    return _emulated


def build_info() -> dict[str, object]:
    """What was compiled: version, cuda, archs, compiler, and so on; or why nothing is there."""
    if extension is None:
        return {"native": False, "reason": _why_not}
    return {"native": True, **extension.build_info()}

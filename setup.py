"""Builds the native extension with CMake; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        # The emulator serves tests of a source tree and never goes into a wheel.
        in_tree = getattr(self, "editable_mode", False)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "VISPEC_VERSION": self.distribution.get_version(),
            "VISPEC_EMULATED": os.environ.get("VISPEC_EMULATED", "OFF") if in_tree else "OFF",
        }
        for name in ("VISPEC_CUDA", "VISPEC_CUDA_ARCHS", "VISPEC_SANITIZE"):
            if name in os.environ:
                options[name] = os.environ[name]
        defines = [f"-D{name}={value}" for name, value in options.items()]
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)
        if in_tree:
            # setuptools copies only the extension that it knows of.
            tree = str(ROOT / "vispec")
            subprocess.run(["cmake", "--install", str(build), "--prefix", tree], check=True)


setup(ext_modules=[Extension("vispec._ext", sources=[])], cmdclass={"build_ext": CMakeBuild})

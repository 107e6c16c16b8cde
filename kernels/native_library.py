"""C++ functions that XLA calls, compiled by the system's compiler on first use.

The libraries are kept in the user's cache.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dvmsr_jax.kernels import user_cache

KERNELS = Path(__file__).parent
# Clang accepts -march=native on ARM only since version 15.
_NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
FLAGS = ("-O3", _NATIVE, "-std=c++17", "-shared", "-fPIC", "-w")

Factors = Literal["float32", "bfloat16"]
"""Types to which the factors of products may be rounded (cpp/factors.h)."""
SUFFIXES = {"float32": "Float32", "bfloat16": "BFloat16"}
"""How the names of functions for these types end."""

# The compiler runs once, and not in several threads at a time.
_LOCK = threading.Lock()


class NativeUnavailableError(RuntimeError):
    """A library cannot be compiled or loaded here; the message says why."""


@dataclass(frozen=True)
class NativeLibrary:
    """A C++ source and the functions in it that XLA may call, by their symbols.

    It may include headers of `kernels` ("kernels/cpp/vectors.h") and XLA's ("xla/ffi/api/ffi.h").
    """

    source: Path
    functions: tuple[str, ...]

    @functools.cache  # noqa: B019 - libraries are constants of modules
    def missing(self, factors: Factors = "float32") -> str | None:
        """The reason why the functions cannot run here, or None. May compile them, in seconds.

        With bfloat16 they could run on any CPU, but are faster than without only on some.
        """
        try:
            self.register()
        except NativeUnavailableError as error:
            return str(error)
        if factors == "bfloat16" and not has_bfloat16():
            return "this CPU has no instructions of AVX512-BF16"
        return None

    def function(self, name: str, *shapes: tuple[int, ...]) -> Callable[..., Sequence[jax.Array]]:
        """The function for use in JAX; it returns float32 arrays of these shapes.

        Raises NativeUnavailableError.
        """
        results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.ffi.ffi_call(self.register()[name], results, vmap_method="sequential")

    @functools.cache  # noqa: B019 - libraries are constants of modules
    def register(self) -> dict[str, str]:
        """Registers the functions with XLA; returns each one's name there.

        Raises NativeUnavailableError.
        """
        if jax.default_backend() != "cpu":
            raise NativeUnavailableError("it is for CPUs only")
        with _LOCK:
            stem, functions = self.load()
            names = {name: f"{stem}_{name}" for name in self.functions}
            for name, function in zip(names.values(), functions, strict=True):
                jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
        return names

    def load(self) -> tuple[str, list[Any]]:
        """(name, functions) of the library in the user's cache; compiled if missing or damaged.

        The name contains a checksum, because loading a truncated library can crash the process.
        Raises NativeUnavailableError.
        """
        compiler = _compiler()
        try:
            folder = user_cache.binaries_folder()
            made_of = repr((*self._texts(), *_surroundings(compiler)))
            stem = f"{self.source.parent.name}_{checksum(made_of.encode())}"
            for library in folder.glob(f"{stem}_*.so"):
                if library.name == f"{stem}_{checksum(library.read_bytes())}.so":
                    with contextlib.suppress(OSError, AttributeError):
                        user_cache.check_is_private(library)
                        return library.stem, self._functions(library)
                library.unlink(missing_ok=True)
            library = _compile(compiler, self.source, folder, stem)
            return library.stem, self._functions(library)
        except subprocess.CalledProcessError as error:
            message = f"{compiler} failed on {self.source}:\n{error.stderr}"
            raise NativeUnavailableError(message) from error
        except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
            message = f"cannot compile and load {self.source}: {error}"
            raise NativeUnavailableError(message) from error

    def _functions(self, library: Path) -> list[Any]:
        loaded = ctypes.CDLL(str(library))
        return [getattr(loaded, name) for name in self.functions]

    def _texts(self) -> Iterator[str]:
        """The source and every header of `kernels`, whether included or not."""
        return (path.read_text() for path in (self.source, *sorted(KERNELS.rglob("*.h"))))


@functools.cache
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 (AVX512-BF16). Raises NativeUnavailableError."""
    command = [_compiler(), _NATIVE, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60).stdout
    return "__AVX512BF16__" in macros


def _compiler() -> str:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NativeUnavailableError("there is no C++ compiler (c++, g++ or clang++)")
    return compiler


def _compile(compiler: str, source: Path, folder: Path, stem: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fresh = Path(scratch, "fresh.so")
        includes = (f"-I{KERNELS.parent}", f"-I{jax.ffi.include_dir()}")
        command = [compiler, *FLAGS, *includes, str(source), "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        library = folder / f"{stem}_{checksum(fresh.read_bytes())}.so"
        fresh.chmod(0o700)
        fresh.replace(library)
    return library


def _surroundings(compiler: str) -> tuple[object, ...]:
    """What a library depends on besides its text, because different machines may share a home."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    system = platform.libc_ver(), _processor()
    return FLAGS, jax.lib.__version__, compiler, version, *system


def checksum(data: bytes) -> str:
    """The checksum in a library's name."""
    return hashlib.sha256(data).hexdigest()[:16]


def _processor() -> str:
    """Identifies the kind of processor that _NATIVE compiles for."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = flags.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")

"""C++ on the CPU (native.cc), compiled by the system's compiler when it is first wanted.

Forward only. What is differentiated is computed by `chunked` in its carried form, both ways.
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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import user_cache
from kernels.selective_scan import chunked

SOURCE = Path(__file__).with_suffix(".cc")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")


# XLA knows one library only, so that no two threads may compile one each.
_LOCK = threading.Lock()


class NativeUnavailableError(RuntimeError):
    """The C++ scan cannot be had here; the message says why."""


def selective_scan(
    u: Float[Array, "b l d"],
    delta: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l n"],
    C: Float[Array, "b l n"],
    D: Float[Array, " d"],
    z: Float[Array, "b l d"] | None,
    delta_bias: Float[Array, " d"] | None,
    delta_softplus: bool,
    initial_state: Float[Array, "b d n"],
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """(y, final state); `op.selective_scan` has the contract."""
    return _scan(delta_softplus, u, delta, A, B, C, D, z, delta_bias, initial_state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(delta_softplus: bool, u, delta, A, B, C, D, z, delta_bias, initial_state):
    b, _, d = u.shape
    n = A.shape[1]
    call = jax.ffi.ffi_call(
        register(),
        (jax.ShapeDtypeStruct(u.shape, jnp.float32), jax.ShapeDtypeStruct((b, n, d), jnp.float32)),
        vmap_method="sequential",
    )
    y, end = call(
        *(x.astype(jnp.float32) for x in (u, delta, A.T, B, C, D)),
        jnp.zeros(0, jnp.float32) if z is None else z.astype(jnp.float32),
        jnp.zeros(d, jnp.float32) if delta_bias is None else delta_bias,
        initial_state.mT,
        delta_softplus=delta_softplus,
        gated=z is not None,
    )
    return y.astype(u.dtype), end.mT


def _scan_forward(delta_softplus, *arrays):
    def scan(u, delta, A, B, C, D, z, delta_bias, initial_state):
        weights_and_flag = z, delta_bias, delta_softplus
        return chunked.selective_scan(
            u, delta, A, B, C, D, *weights_and_flag, initial_state, parallel=False
        )

    return jax.vjp(scan, *arrays)


def _scan_backward(delta_softplus, vjp, gradients):
    del delta_softplus
    return vjp(gradients)


_scan.defvjp(_scan_forward, _scan_backward)


@functools.cache
def missing() -> str | None:
    """What `selective_scan` lacks here, None if it can run. Compiles it if need be, in seconds."""
    try:
        register()
    except NativeUnavailableError as error:
        return str(error)
    return None


@functools.cache
def register() -> str:
    """Makes the compiled scan known to XLA; its name there. Raises NativeUnavailableError."""
    if jax.default_backend() != "cpu":
        raise NativeUnavailableError("it is for CPUs only")
    with _LOCK:
        name, handler = load_library()
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return name


def load_library() -> tuple[str, Any]:
    """(a name, the scan) of the library in the user's cache, compiled unless it is there, whole.

    Its name holds its checksum: to load half a library can end the process.
    """
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NativeUnavailableError("there is no C++ compiler (c++, g++ or clang++)")
    try:
        folder = user_cache.folder()
        stem = f"selective_scan_{_checksum(repr(_made_of(compiler)).encode())}"
        for library in folder.glob(f"{stem}_*.so"):
            if library.name == f"{stem}_{_checksum(library.read_bytes())}.so":
                with contextlib.suppress(OSError, AttributeError):
                    user_cache.check_is_private(library)
                    return library.stem, ctypes.CDLL(str(library)).SelectiveScan
            library.unlink(missing_ok=True)
        library = _compile(compiler, folder, stem)
        return library.stem, ctypes.CDLL(str(library)).SelectiveScan
    except subprocess.CalledProcessError as error:
        raise NativeUnavailableError(f"{compiler} failed on {SOURCE}:\n{error.stderr}") from error
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"cannot compile and load {SOURCE}: {error}") from error


def _compile(compiler: str, folder: Path, stem: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fresh = Path(scratch, "fresh.so")
        include = f"-I{jax.ffi.include_dir()}"
        command = [compiler, *FLAGS, include, str(SOURCE), "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        library = folder / f"{stem}_{_checksum(fresh.read_bytes())}.so"
        fresh.chmod(0o700)
        fresh.replace(library)
    return library


def _made_of(compiler: str) -> tuple[object, ...]:
    """What a library is made from and for: a home may be shared by machines of several kinds."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    system = platform.libc_ver(), _processor()
    return SOURCE.read_text(), FLAGS, jax.lib.__version__, compiler, version, *system


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _processor() -> str:
    """What tells apart processors that -march=native compiles for."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = flags.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")

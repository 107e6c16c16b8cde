"""C++ on the CPU (native.cc), compiled by the system's compiler when it is first wanted.

Forward only. What is differentiated is computed by `chunked` in its carried form, both ways.
"""

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

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
        jnp.zeros(0) if z is None else z.astype(jnp.float32),
        jnp.zeros(d) if delta_bias is None else delta_bias,
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
        library = compile_library()
        name = f"dvmsr_{library.stem}"
        handler = ctypes.CDLL(str(library)).SelectiveScan
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return name


def compile_library() -> Path:
    """The shared library in the user's cache folder, compiled unless it is there."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NativeUnavailableError("there is no C++ compiler (c++, g++ or clang++)")
    # What it was made from and for: a home may be shared by machines of several kinds.
    made_of = SOURCE.read_text(), FLAGS, jax.lib.__version__, compiler, _processor()
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    folder = user_cache.folder()
    library = folder / f"selective_scan_{digest}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch, library.name)
            include = f"-I{jax.ffi.include_dir()}"
            command = [compiler, *FLAGS, include, str(SOURCE), "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            fresh.replace(library)
    except subprocess.CalledProcessError as error:
        raise NativeUnavailableError(f"{compiler} failed on {SOURCE}:\n{error.stderr}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"cannot compile {SOURCE}: {error}") from error
    return library


def _processor() -> str:
    """What tells apart processors that -march=native compiles for."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = flags.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")

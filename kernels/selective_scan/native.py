"""The scan in C++ for CPUs (native.cc), compiled by the system's compiler on first use.

This is the carried form of `chunked`, in hand-written loops. It can be differentiated only once.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import user_cache
from kernels.selective_scan.inputs import Inputs

SOURCE = Path(__file__).with_suffix(".cc")
# Tokens per chunk, and channels per group in the backward pass. The four arrays with a chunk's
# states for one vector of channels should fit a core's second-level cache (128 KiB for n = 16 with
# AVX2). The sums over a vector's elements are computed once per group. Tuned on two cores.
CHUNK = 64
CHANNELS = 64
# Clang accepts -march=native on ARM only since version 15.
_NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
FLAGS = ("-O3", _NATIVE, "-std=c++17", "-shared", "-fPIC", "-w")


# Only one library is registered with XLA, so only one thread may compile it at a time.
_LOCK = threading.Lock()


class NativeUnavailableError(RuntimeError):
    """The C++ scan cannot run here; the message says why."""


def selective_scan(
    inputs: Inputs, delta_softplus: bool
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Returns (y, final state); see `op.selective_scan` for the contract."""
    return _scan(delta_softplus, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(delta_softplus: bool, inputs: Inputs):
    return _call_scan(delta_softplus, inputs, keep_borders=False)[:2]


def _scan_forward(delta_softplus, inputs):
    y, end, borders = _call_scan(delta_softplus, inputs, keep_borders=True)
    return (y, end), (inputs, borders)


def _call_scan(delta_softplus, inputs, *, keep_borders):
    """y, the end state, and the states before each chunk, (b, k, n, d), or nothing."""
    (b, l, d), n = inputs.u.shape, inputs.A.shape[1]
    k = math.ceil(l / CHUNK) if keep_borders else 0
    scan = _foreign(register().scan, (b, l, d), (b, n, d), (b, k, n, d))
    y, end, borders = scan(
        *_prepared(inputs),
        delta_softplus=delta_softplus,
        gated=inputs.z is not None,
        chunk=CHUNK,
    )
    return y.astype(inputs.u.dtype), end.mT, borders


def _scan_backward(delta_softplus, residuals, gradients):
    inputs, borders = residuals
    dout, dend = gradients
    prepared = _prepared(inputs)
    (b, l, d), n = inputs.u.shape, inputs.A.shape[1]
    # Per sequence for the weights, and per group of channels for B and C; summed below.
    groups = math.ceil(d / CHANNELS)
    shapes = Inputs(
        u=(b, l, d),
        delta=(b, l, d),
        A=(b, n, d),
        B=(groups, b, l, n),
        C=(groups, b, l, n),
        D=(b, d),
        z=prepared.z.shape,
        delta_bias=(b, d),
        initial_state=(b, n, d),
    )
    gradient = _foreign(register().gradient, *shapes)
    found = gradient(
        *prepared[:-1],  # the borders begin with the initial state
        borders,
        dout.astype(jnp.float32),
        dend.mT,
        delta_softplus=delta_softplus,
        gated=inputs.z is not None,
        chunk=CHUNK,
        channels=CHANNELS,
    )
    found = Inputs(*found)
    found = found._replace(
        A=jnp.sum(found.A, axis=0).T,
        B=jnp.sum(found.B, axis=0),
        C=jnp.sum(found.C, axis=0),
        D=jnp.sum(found.D, axis=0),
        delta_bias=jnp.sum(found.delta_bias, axis=0),
        initial_state=found.initial_state.mT,
    )
    typed = (None if x is None else dx.astype(x.dtype) for x, dx in zip(inputs, found, strict=True))
    return (Inputs(*typed),)


_scan.defvjp(_scan_forward, _scan_backward)


def _prepared(inputs):
    """The arrays in the dtype and layout of native.cc."""
    z, bias = inputs.z, inputs.delta_bias
    inputs = inputs._replace(
        A=inputs.A.T,
        z=jnp.zeros(0) if z is None else z,
        delta_bias=jnp.zeros_like(inputs.D) if bias is None else bias,
        initial_state=inputs.initial_state.mT,
    )
    return Inputs(*(x.astype(jnp.float32) for x in inputs))


def _foreign(name, *shapes):
    """The function of native.cc registered under `name`, with results of these shapes."""
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(name, results, vmap_method="sequential")


@functools.cache
def missing() -> str | None:
    """The reason why `selective_scan` cannot run here, or None. May compile it, in seconds."""
    try:
        register()
    except NativeUnavailableError as error:
        return str(error)
    return None


class Names(NamedTuple):
    """The names under which the functions of native.cc are registered with XLA."""

    scan: str
    gradient: str


@functools.cache
def register() -> Names:
    """Registers the compiled functions with XLA. Raises NativeUnavailableError."""
    if jax.default_backend() != "cpu":
        raise NativeUnavailableError("it is for CPUs only")
    with _LOCK:
        stem, functions = load_library()
        names = Names(f"{stem}_scan", f"{stem}_gradient")
        for name, function in zip(names, functions, strict=True):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return names


def load_library() -> tuple[str, tuple[Any, Any]]:
    """(name, (scan, gradient)) of the library in the user's cache; compiled if missing or damaged.

    The name contains a checksum, because loading a truncated library can crash the process.
    """
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NativeUnavailableError("there is no C++ compiler (c++, g++ or clang++)")
    try:
        folder = user_cache.binaries_folder()
        stem = f"selective_scan_{_checksum(repr(_made_of(compiler)).encode())}"
        for library in folder.glob(f"{stem}_*.so"):
            if library.name == f"{stem}_{_checksum(library.read_bytes())}.so":
                with contextlib.suppress(OSError, AttributeError):
                    user_cache.check_is_private(library)
                    return library.stem, _functions(library)
            library.unlink(missing_ok=True)
        library = _compile(compiler, folder, stem)
        return library.stem, _functions(library)
    except subprocess.CalledProcessError as error:
        raise NativeUnavailableError(f"{compiler} failed on {SOURCE}:\n{error.stderr}") from error
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"cannot compile and load {SOURCE}: {error}") from error


def _functions(library: Path) -> tuple[Any, Any]:
    loaded = ctypes.CDLL(str(library))
    return loaded.SelectiveScan, loaded.SelectiveScanGradient


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
    """Everything that the library depends on, because different machines may share a home."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    system = platform.libc_ver(), _processor()
    return SOURCE.read_text(), FLAGS, jax.lib.__version__, compiler, version, *system


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _processor() -> str:
    """Identifies the kind of processor that _NATIVE compiles for."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = flags.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")

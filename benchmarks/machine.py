"""The machine on which a benchmark runs."""

import multiprocessing
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax

GIB = 2**30

Answer = TypeVar("Answer")


def apart(function: Callable[..., Answer], *arguments: object) -> Answer:
    """Calls the function in a new process, as a TPU admits only one process at a time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def describe() -> str:
    """One line that names CPU, memory, JAX's version and its devices."""
    cpu = _proc_field("cpuinfo", "model name") or platform.processor() or platform.machine()
    devices = jax.devices()
    return (
        f"{cpu}, {os.cpu_count()} cores, {_total_memory() / GIB:.0f} GiB memory; "
        f"jax {jax.__version__} on {len(devices)} x {devices[0].device_kind}"
    )


def available_memory() -> int:
    """Bytes of host memory that a program can use without swapping (outside Linux: all memory).

    sysconf's SC_AVPHYS_PAGES would not include caches that the kernel can release.
    """
    available = _proc_field("meminfo", "MemAvailable")
    return int(available.split()[0]) * 1024 if available else _total_memory()


def peak_memory() -> int | None:
    """Peak memory of this process in bytes; on an accelerator, of JAX on the accelerator.

    None if unknown.
    """
    if jax.default_backend() != "cpu":
        statistics = jax.devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else None
    # getrusage's maximum would include that of the parent process.
    peak = _proc_field("self/status", "VmHWM")
    return int(peak.split()[0]) * 1024 if peak else None


def _total_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _proc_field(file: str, name: str) -> str | None:
    """The first value of `name` in /proc/`file`; None if there is none, as outside Linux."""
    path = Path("/proc", file)
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() == name), None)

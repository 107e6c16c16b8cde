"""`python -m benchmarks.scan --gpu`: the Triton kernels compared with the limits of the GPU.

The floor of a pass is the larger of two times: its bytes divided by the GPU's memory bandwidth, and
its exponentials divided by the rate of the special-function units. The bytes are those of reading
every input and writing every output once (a backward pass reads the inputs again). The exponentials
are the decays, b l d n per pass. The chunks' border states, softplus and silu count as overhead.
"""

import functools
import importlib.util
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp

from benchmarks.programs import Program, forward, forward_backward, make_inputs
from benchmarks.table import Cell, Measured, Report
from dvmsr_jax.kernels.selective_scan import Implementation

TYPES = (jnp.float32, jnp.bfloat16)
BASELINES: tuple[Implementation, ...] = ("chunked", "associative")
COLUMNS = ("b", "l", "d", "type", "pass", "time", "TB/s", "Texp/s", "floor")

# Calls are queued in batches of about this many seconds; the median over the batches is reported.
BATCH_SECONDS = 0.05
BATCHES = 7
# The host's time is measured over this many calls, too few to fill a queue and block the host. If
# it exceeds this fraction of the GPU's time, the GPU may have waited for the host.
UNHINDERED = 8
HOST_BOUND = 0.8
SPECIAL_FUNCTIONS_A_CLOCK = 16  # per multiprocessor, for compute capabilities 8.0 to 10.0
DEFAULT_CLOCK = 1.98e9  # Hz, the maximum of H100 and H200


def report_times(
    report: Report,
    implementations: tuple[Implementation, ...],
    sizes: Iterable[tuple[int, int]],
    channels: Iterable[int],
    smoke: bool = False,
) -> None:
    """Reports the first implementation's time for each size (b, l), d, type and pass, and its
    ratio to the floor and to the others. `smoke`: also where there is no GPU."""
    bandwidth, clock = copy_bandwidth(2**16 if smoke else 2**29), highest_clock()
    processors = getattr(jax.devices()[0], "core_count", 1)  # CPUs have no such number
    exponentials = processors * SPECIAL_FUNCTIONS_A_CLOCK * clock
    others: list[str] = [*implementations[1:]]
    if importlib.util.find_spec("mamba_ssm"):
        others.append("mamba_ssm")
    report.table(
        [*COLUMNS, *(f"vs {name}" for name in others)],
        text=["type", "pass"],
        title=f"{implementations[0]}; floors from {bandwidth / 1e12:.2f} TB/s (a copy, measured) "
        f"and {exponentials / 1e12:.2f} T special functions/s (at {clock / 1e9:.2f} GHz); "
        "*: the GPU may have waited for the host",
    )
    for b, l in sizes:
        for d in channels:
            for dtype in TYPES[:1] if smoke else TYPES:
                for row in compare(implementations, b, l, d, dtype, bandwidth, exponentials):
                    report.row(row)


def compare(
    implementations: tuple[Implementation, ...],
    b: int,
    l: int,
    d: int,
    dtype: jnp.dtype,
    bandwidth: float,
    exponentials: float,
) -> Iterator[list[Cell]]:
    """Yields the table's rows for inputs of these sizes and this type."""
    inputs = make_inputs(l, d, b=b, dtype=dtype)
    arrays, weights = inputs
    n = arrays["A"].shape[1]
    read = sum(x.nbytes for x in arrays.values())
    passes = {
        "forward": (forward, 1, read + weights.nbytes),
        # Also reads all inputs and y's gradient, and writes all inputs' gradients.
        "forward+backward": (forward_backward, 2, 3 * read + 2 * weights.nbytes),
    }
    for name, (function, scans, moved) in passes.items():
        seconds: dict[str, float | str] = {}
        for implementation in implementations:
            program = Program(functools.partial(function, implementation), *inputs)
            seconds[implementation] = program.obstacle or queued_seconds(
                lambda program=program: program.compiled(*inputs), jax.block_until_ready
            )
        if importlib.util.find_spec("mamba_ssm"):
            seconds["mamba_ssm"] = mamba_ssm_seconds(inputs, backward=scans == 2)
        first = seconds.pop(implementations[0])
        size: list[Cell] = [b, l, d, jnp.dtype(dtype).name, name]
        if isinstance(first, str):
            yield [*size, first, *["-"] * (3 + len(seconds))]
            continue

        def ratio(seconds: float | str, first: float = first) -> Cell:
            if isinstance(seconds, str):
                return seconds
            return Measured(seconds / first, "x", remark=mark(seconds))

        evaluated = scans * b * l * d * n
        floor = max(moved / bandwidth, evaluated / exponentials)
        yield [
            *size,
            Measured(first * 1e3, "ms", remark=mark(first)),
            Measured(moved / first / 1e12),
            Measured(evaluated / first / 1e12),
            Measured(first / floor, "x"),
            *map(ratio, seconds.values()),
        ]


def noting_lack_of_memory(measure: Callable) -> Callable:
    """Makes a measurement return "out of memory" if JAX or PyTorch raises that error."""

    @functools.wraps(measure)
    def measure_or_note(*args, **options):
        try:
            return measure(*args, **options)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "out of memory")):
                raise
            return "out of memory"

    return measure_or_note


class HostBound(float):
    """Seconds of a call during which the GPU may have waited for the host."""


def mark(seconds: float) -> str:
    """The remark on such seconds."""
    return "*" if isinstance(seconds, HostBound) else ""


@noting_lack_of_memory
def queued_seconds(call: Callable, wait: Callable) -> float | str:
    """Seconds per call, with many calls queued so that the GPU does not wait for the host.

    Returns a HostBound if the GPU may have waited nevertheless, and "out of memory" if there is too
    little memory.
    """

    def seconds_of(calls):
        """(seconds per call until all are queued, seconds per call until all have run)."""
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        queued = time.perf_counter()
        wait(out)
        return (queued - start) / calls, (time.perf_counter() - start) / calls

    wait(call())
    calls = max(1, math.ceil(BATCH_SECONDS / seconds_of(1)[1]))
    seconds = statistics.median(seconds_of(calls)[1] for _ in range(BATCHES))
    if calls == 1:  # so long that the host does not matter
        return seconds
    host = statistics.median(seconds_of(UNHINDERED)[0] for _ in range(BATCHES))
    return HostBound(seconds) if host > HOST_BOUND * seconds else seconds


def copy_bandwidth(numbers: int) -> float:
    """Bytes per second read and written in an elementwise operation on float32 numbers."""
    x = jnp.zeros(numbers, jnp.float32)
    seconds = queued_seconds(functools.partial(jax.jit(lambda x: x + 1), x), jax.block_until_ready)
    assert isinstance(seconds, float), seconds
    return 2 * x.nbytes / seconds


def highest_clock() -> float:
    """The maximum clock of the GPU's multiprocessors, in Hz."""
    if shutil.which("nvidia-smi") is None:
        return DEFAULT_CLOCK
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "-i", "0"]
    megahertz = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    return float(megahertz) * 1e6


@noting_lack_of_memory
def mamba_ssm_seconds(inputs, *, backward: bool) -> float | str:
    """Seconds per call of Mamba's CUDA scan on the same arrays, with channels before tokens.

    Returns "cannot be imported" where its compiled part or PyTorch cannot.
    """
    try:
        import torch
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        print(f"benchmarks.scan: mamba_ssm: {error}", file=sys.stderr)
        return "cannot be imported"

    arrays, weights = inputs
    per_token = {"u", "delta", "B", "C", "z"}

    def to_torch(x, transposed):
        x = torch.from_dlpack(x).clone()
        return (x.mT.contiguous() if transposed else x).requires_grad_(backward)

    tensors = {name: to_torch(x, name in per_token) for name, x in arrays.items()}
    dy = to_torch(weights, True).detach()

    def call():
        y = selective_scan_fn(**tensors, delta_softplus=True)
        return torch.autograd.grad(y, tensors.values(), dy) if backward else y

    return queued_seconds(call, lambda _: torch.cuda.synchronize())

"""The GPU part of `python -m benchmarks.scan --gpu`: the Triton form against what the GPU allows.

The floor of a pass is the larger of two times: its bytes over the GPU's memory bandwidth, and its
exponentials over the rate of its special-function units. Bytes are those of every input, read once,
and of every output, written once (a backward pass reads the inputs again); exponentials are
b l d n a pass, the decays. What the chunks' border states, softplus and silu cost is overhead.
"""

import functools
import importlib.util
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks import registers
from benchmarks.programs import Program, forward, forward_backward, make_inputs
from benchmarks.table import print_head, print_row, rounded
from kernels.selective_scan import Implementation

SIZES = ((1, 65_536), (1, 1_048_576), (32, 4096), (128, 4096))  # b, l
CHANNELS = (120, 384)
TYPES = (jnp.float32, jnp.bfloat16)
BASELINES: tuple[Implementation, ...] = ("chunked", "associative")
COLUMNS = ("b", "l", "d", "type", "pass", "time", "TB/s", "Texp/s", "floor")
REGISTER_COLUMNS = ("kernel", "type", "sm_80", "sm_90", "sm_100")

# Calls are queued in batches of about this many seconds; the median batch counts.
BATCH_SECONDS = 0.05
BATCHES = 7
SPECIAL_FUNCTIONS_A_CLOCK = 16  # of a multiprocessor, from compute capability 8.0 to 10.0


def print_registers() -> None:
    """Registers a thread of each kernel for each target; bytes spilt to memory, if any, behind."""
    print_head(REGISTER_COLUMNS, text=REGISTER_COLUMNS[:2])
    for kernel in registers.KERNELS:
        for dtype in ("fp32", "bf16"):
            cells = []
            for target in registers.TARGETS:
                used, stack = registers.registers_and_stack(kernel, target, dtype)
                cells.append(f"{used}" + (f" + {stack} B" if stack else ""))
            print_row([kernel, dtype, *cells])


def print_times() -> None:
    """Time of each size, type and pass, and its ratios to the floor and to other forms."""
    bandwidth, exponentials = copy_bandwidth(), special_function_rate()
    print(
        f"\nfloors from {bandwidth / 1e12:.2f} TB/s (a copy, measured) and "
        f"{exponentials / 1e12:.2f} T special functions/s (at the highest clock)\n"
    )
    others = [*BASELINES, *(["mamba_ssm"] if importlib.util.find_spec("mamba_ssm") else [])]
    print_head([*COLUMNS, *(f"vs {name}" for name in others)])
    for b, l in SIZES:
        for d in CHANNELS:
            for dtype in TYPES:
                for row in compare(b, l, d, dtype, bandwidth, exponentials):
                    print_row(row)


def compare(
    b: int, l: int, d: int, dtype: jnp.dtype, bandwidth: float, exponentials: float
) -> Iterator[list[str]]:
    """The table's rows for inputs of these sizes and this type."""
    inputs = make_inputs(l, d, b=b, dtype=dtype)
    arrays, weights = inputs
    n = arrays["A"].shape[1]
    read = sum(x.nbytes for x in arrays.values())
    passes = {
        "forward": (forward, 1, read + weights.nbytes),
        # Besides, all inputs and y's gradient are read, and all inputs' gradients written.
        "forward+backward": (forward_backward, 2, 3 * read + 2 * weights.nbytes),
    }
    for name, (function, scans, moved) in passes.items():
        seconds: dict[str, float | str] = {}
        implementations: tuple[Implementation, ...] = ("triton", *BASELINES)
        for implementation in implementations:
            program = Program(functools.partial(function, implementation), *inputs)
            seconds[implementation] = program.obstacle or queued_seconds(
                lambda program=program: program.compiled(*inputs), jax.block_until_ready
            )
        if importlib.util.find_spec("mamba_ssm"):
            seconds["mamba_ssm"] = mamba_ssm_seconds(inputs, backward=scans == 2)
        triton = seconds.pop("triton")
        assert isinstance(triton, float), triton
        evaluated = scans * b * l * d * n
        floor = max(moved / bandwidth, evaluated / exponentials)
        yield [
            f"{b}",
            f"{l:,}",
            f"{d}",
            jnp.dtype(dtype).name,
            name,
            f"{rounded(triton * 1e3)} ms",
            f"{moved / triton / 1e12:.2f}",
            f"{evaluated / triton / 1e12:.2f}",
            f"{triton / floor:.2f}x",
            *(x if isinstance(x, str) else f"{rounded(x / triton)}x" for x in seconds.values()),
        ]


def queued_seconds(call: Callable, wait: Callable) -> float | str:
    """The time of a call among many in the queue, so that the GPU does not wait for the host; or
    why there is none."""
    try:
        wait(call())
        start = time.perf_counter()
        wait(call())
        calls = max(1, math.ceil(BATCH_SECONDS / (time.perf_counter() - start)))
        batches = []
        for _ in range(BATCHES):
            start = time.perf_counter()
            for _ in range(calls):
                out = call()
            wait(out)
            batches.append((time.perf_counter() - start) / calls)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return "out of memory"
    return statistics.median(batches)


def copy_bandwidth() -> float:
    """Bytes that the GPU reads and writes a second, in a map over 2 GiB."""
    x = jnp.zeros(2**29, jnp.float32)
    seconds = queued_seconds(functools.partial(jax.jit(lambda x: x + 1), x), jax.block_until_ready)
    assert isinstance(seconds, float), seconds
    return 2 * x.nbytes / seconds


def special_function_rate() -> float:
    """Special functions that the GPU evaluates a second at its highest clock."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "-i", "0"]
    megahertz = float(subprocess.run(query, check=True, capture_output=True, text=True).stdout)
    return jax.devices()[0].core_count * SPECIAL_FUNCTIONS_A_CLOCK * megahertz * 1e6


def mamba_ssm_seconds(inputs, *, backward: bool) -> float | str:
    """The time of the CUDA original on the same arrays, in its layout, channels before tokens."""
    import torch
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

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

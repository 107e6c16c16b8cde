"""Time and memory of upscaling with the paper's student: `python -m benchmarks.inference`.

Every case runs in its own process. `first` is the time of the first call, including compilation.
`seconds` is the median of the later calls, with the speed-up over the `associative` scan in
parentheses. Megapixels are those of the output. `memory` is the peak memory of the process (on a
GPU, of JAX on the GPU) beyond that after the imports. It includes the input picture. The output is
held in memory with `whole`, and dropped band by band with `streaming`.

JAX chooses the device; `JAX_PLATFORMS=cpu python -m benchmarks.inference` overrides this.
"""

import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import tyro
from flax import nnx

from benchmarks import machine, pytorch
from benchmarks.machine import apart
from benchmarks.pytorch import TorchModel
from benchmarks.table import Cell, Measured, Report
from dvmsr_jax.config import Compute, ModelConfig
from dvmsr_jax.errors import UserError, is_out_of_memory
from dvmsr_jax.inference import make_streamer
from dvmsr_jax.kernels.selective_scan import Implementation, missing
from dvmsr_jax.model import DVMSR
from dvmsr_jax.rgb import RgbUpscale, RgbView

CONFIG = ModelConfig()
BASELINE: Implementation = "associative"
COMPARED: tuple[Implementation, ...] = (
    "associative",
    "sequential",
    "chunked-carried",
    "chunked-parallel",
    "native",
    "auto",
)
# A case is repeated at least once, and then until the repetitions have taken this long.
CASE_SECONDS = 4.0

Mode = Literal["whole", "streaming"]
Precision = Literal["float32", "bfloat16"]


class How(NamedTuple):
    """A way to upscale."""

    mode: Mode
    precision: Precision
    scan: Implementation


class OnnxFile(NamedTuple):
    """The network on ONNX Runtime, on the CPU: a band of all rows, or bands."""

    mode: Mode
    path: str


Way = How | OnnxFile | TorchModel


class Result(NamedTuple):
    """Time and memory of a case."""

    first: float  # seconds
    seconds: float
    memory: int | None  # bytes; None if unknown


def measure(width: int, height: int, how: Way) -> Result:
    """Measures one case in this process. Raises UserError for a bad TorchModel."""
    make_upscale: Callable[[], Callable[[np.ndarray], Iterator[np.ndarray]]]
    peak_memory: Callable[[], int | None]
    if isinstance(how, TorchModel):
        make_upscale = functools.partial(pytorch.make_upscale, how, pytorch.load_class(how))
        peak_memory = functools.partial(pytorch.peak_memory, how)
    elif isinstance(how, OnnxFile):
        make_upscale = functools.partial(_open, how)
        peak_memory = machine.peak_host_memory
    else:
        make_upscale = functools.partial(_make_upscale, how)
        peak_memory = machine.peak_memory
    before = peak_memory()
    image = np.random.default_rng(0).random((height, width, 3), np.float32)
    upscale = make_upscale()

    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds[1:]) < CASE_SECONDS:
        start = time.perf_counter()
        for _ in upscale(image):
            pass
        seconds.append(time.perf_counter() - start)
    after = peak_memory()
    memory = None if before is None or after is None else after - before
    return Result(seconds[0], statistics.median(seconds[1:]), memory)


def _make_upscale(how: How) -> RgbUpscale:
    compute = Compute(scan=how.scan, precision=how.precision)
    model = nnx.jit(lambda: DVMSR(CONFIG, compute=compute, rngs=nnx.Rngs(0)))()
    if how.mode == "streaming":
        return make_streamer(model)
    graph, parameters = nnx.split(model)
    run = jax.jit(lambda parameters, image: nnx.merge(graph, parameters)(image))

    def upscale(image: np.ndarray | RgbView) -> Iterator[np.ndarray]:
        yield np.asarray(run(parameters, np.asarray(image)[None])[0])

    return upscale


def _open(file: OnnxFile) -> RgbUpscale:
    from dvmsr_jax.onnx import upscaler  # needs onnxruntime

    band_rows = sys.maxsize if file.mode == "whole" else None
    return upscaler.make_streamer(upscaler.open_model(file.path), band_rows=band_rows)


def write_onnx(path: str) -> None:
    """Exports a network with random weights."""
    from dvmsr_jax.onnx import network  # needs the package onnx

    model = nnx.jit(lambda: DVMSR(CONFIG, rngs=nnx.Rngs(0)))()
    Path(path).write_bytes(network.streaming_model(model).SerializeToString())


class Surroundings(NamedTuple):
    """The machine and what it can run."""

    machine: str
    platform: str  # JAX's name
    lacks: tuple[str | None, ...]  # for each scan, its missing requirement


def find_surroundings(scans: tuple[Implementation, ...]) -> Surroundings:
    """Describes the machine, and which of these scans it can run."""
    lacks = tuple(missing(scan) for scan in scans)
    return Surroundings(machine.describe(), jax.default_backend(), lacks)


def measure_apart(width: int, height: int, how: Way) -> Result | None:
    """Calls `measure` in a new process; returns None if it ran out of memory."""
    try:
        return apart(measure, width, height, how)
    except BrokenProcessPool:
        return None
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def growth(results: dict[int, float]) -> float:
    """Fits seconds = c pixels^x to {pixels: seconds} by least squares of logs, and returns x."""
    pixels, seconds = np.log(list(results)), np.log(list(results.values()))
    return float(np.polyfit(pixels, seconds, 1)[0])


def main(
    sizes: tuple[str, ...] = ("64", "128", "256", "512", "1024"),
    modes: tuple[Mode, ...] = ("whole", "streaming"),
    precisions: tuple[Precision, ...] = ("float32", "bfloat16"),
    scans: tuple[Implementation, ...] | None = None,
    torch: tuple[str, ...] = (),
    onnx: bool = False,
    smoke: bool = False,
    json: Path | None = None,
) -> None:
    """Prints time, memory, and how time grows with the size of the picture, as Markdown tables.

    Args:
        sizes: sizes of the low-resolution picture, WIDTHxHEIGHT or the side of a square.
        modes: the whole picture at once, or in bands.
        precisions: types of convolutions and projections.
        scans: implementations of the selective scan (auto: the fused ViMM on CPUs and triton on
            GPUs where they run). None: those in COMPARED that run here.
        torch: other x4 models in PyTorch to measure in float32, as FILE.py:CLASS: classes that are
            built without arguments and take (1, 3, h, w).
        onnx: measure the network on ONNX Runtime too, on the CPU in float32.
        smoke: a quick run to check that everything works.
        json: also write the tables to this file.
    """
    if smoke:
        sizes, precisions, scans = ("8", "8x16"), ("float32",), ("auto",)
    here = apart(find_surroundings, scans or COMPARED)
    lacks = dict(zip(scans or COMPARED, here.lacks, strict=True))
    scans = scans or tuple(scan for scan in COMPARED if not lacks[scan])
    for scan in scans:
        if lack := lacks[scan]:
            sys.exit(f"benchmarks.inference: the scan {scan!r} cannot run here: {lack}")
    report = Report(here.machine, json)
    fields = (*How._fields[:-1], "scan or model")
    numbers = ("first", "seconds", "MP/s", "memory")
    report.table((f"size, {here.platform}", *fields, *numbers), text=fields)
    ways: list[Way] = [*itertools.starmap(How, itertools.product(modes, precisions, scans))]
    ways += [TorchModel(place, "cuda" if here.platform == "gpu" else "cpu") for place in torch]
    with tempfile.TemporaryDirectory() as folder:
        if onnx:
            path = f"{folder}/student.onnx"
            apart(write_onnx, path)
            ways += [OnnxFile(mode, path) for mode in modes]
        times = _measure_all(sizes, ways, report)

    title = "Seconds grow like a power of the number of pixels:"
    report.table((*fields, "exponent"), text=fields, title=title)
    for how, seconds in times.items():
        if len(seconds) > 1:
            report.row([*_names(how), Measured(growth(seconds))])


def _measure_all(
    sizes: Sequence[str], ways: Sequence[Way], report: Report
) -> dict[Way, dict[int, float]]:
    """Measures each size in each way and reports rows: {way: {pixels: seconds}}."""
    times: dict[Way, dict[int, float]] = {how: {} for how in ways}
    failed: set[Way] = set()
    for size, how in itertools.product(sizes, ways):
        if how in failed:
            continue
        width, height = map(int, size.split("x") if "x" in size else (size, size))
        try:
            result = measure_apart(width, height, how)
        except UserError as error:
            failed.add(how)
            print(f"benchmarks.inference: {error}", file=sys.stderr)
            continue
        pixels = width * height
        if result is not None:
            times[how][pixels] = result.seconds
        baseline = None
        if isinstance(how, How):
            baseline = times.get(how._replace(scan=BASELINE), {}).get(pixels)
        report.row([f"{width} x {height}", *_names(how), *_cells(pixels, result, baseline)])
    return times


def _names(how: Way) -> tuple[str, str, str]:
    if isinstance(how, How):
        return how
    if isinstance(how, OnnxFile):
        return how.mode, "float32", "ONNX Runtime"
    return "whole", "float32", f"{how.place.rpartition(':')[2]} in PyTorch"


def _cells(pixels: int, result: Result | None, baseline: float | None) -> list[Cell]:
    if result is None:
        return ["out of memory", "", "", ""]
    seconds = Measured(result.seconds, "s", baseline and baseline / result.seconds)
    speed = Measured(pixels * CONFIG.scale**2 / 1e6 / result.seconds)
    memory = "unknown" if result.memory is None else Measured(result.memory / 2**20, "MiB")
    return [Measured(result.first, "s"), seconds, speed, memory]


if __name__ == "__main__":
    tyro.cli(main)

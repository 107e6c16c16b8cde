"""Time of upscaling in the browser's engine, in Node: `python -m benchmarks.web_engine`.

It takes turns with JAX and the CPU kernels, restricted to one thread, picture by picture. `first`
is the time of the first picture, in which Node translates the program (and JAX compiles its own),
and `seconds` the best of the later ones. `CPU time` is that of the process, in which other programs
matter less, and `ratio` is that of CPU times.
"""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tyro

from benchmarks import machine
from benchmarks.table import Measured, Report
from dvmsr_jax.inference import make_streamer
from dvmsr_jax.kernels.wasm.build import PROGRAMS
from dvmsr_jax.pretrained import load_model
from dvmsr_jax.registry import find


def serve(weights: str, width: int, height: int) -> None:
    """What web_engine.mjs does, in JAX."""
    upscale = make_streamer(load_model(weights))
    picture = np.random.default_rng(0).random((height, width, 3), np.float32)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        for _rows in upscale(picture):
            pass
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


class Worker:
    """A process that upscales a picture and prints its times for each line that it reads."""

    def __init__(self, command: list[str]):
        environment = os.environ | {"NPROC": "1"}  # XLA takes it for the number of cores
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def upscale(self) -> tuple[float, float]:
        """(seconds, seconds of CPU time)"""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        wall, cpu = json.loads(self._process.stdout.readline())
        return wall, cpu

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


@functools.cache
def node() -> list[str]:
    """The command that runs Node with relaxed SIMD, for which Node 20 needs an option."""
    option = "--experimental-wasm-relaxed-simd"
    options = subprocess.run(["node", "--v8-options"], capture_output=True, text=True).stdout
    return ["node", option] if option in options else ["node"]


def start_workers(path: str, size: int) -> dict[str, Worker]:
    """Processes for squares of this side, with this .safetensors file."""
    script = str(Path(__file__).with_suffix(".mjs"))
    jax_program = f"from benchmarks.web_engine import serve; serve({path!r}, {size}, {size})"
    workers = {"JAX": Worker([sys.executable, "-c", jax_program])}
    for program in PROGRAMS:
        arguments = [script, path, program, str(size), str(size)]
        workers[program] = Worker([*node(), *arguments])
    return workers


def main(sizes: tuple[int, ...] = (64, 256), weights: str = "x4", repetitions: int = 10) -> None:
    """Prints a Markdown table.

    Args:
        sizes: sides of the low-resolution pictures, which are squares.
        weights: a .safetensors file, or the name of weights.
        repetitions: pictures after the first.
    """
    path = str(find(weights))
    report = Report(machine.describe(), None)
    columns = ("size", "engine", "first", "seconds", "CPU time", "ratio")
    report.table(columns, text=("engine",))
    for size in sizes:
        workers = start_workers(path, size)
        first = {name: worker.upscale() for name, worker in workers.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
        for _ in range(repetitions):
            for name, worker in workers.items():
                times[name].append(worker.upscale())
        for name, worker in workers.items():
            worker.close()
            wall, cpu = (min(x) for x in zip(*times[name], strict=True))
            of_jax = min(cpu for _, cpu in times["JAX"])
            seconds = (Measured(x, "s") for x in (first[name][0], wall, cpu))
            report.row([f"{size} x {size}", name, *seconds, Measured(cpu / of_jax, "x")])


if __name__ == "__main__":
    tyro.cli(main)

"""Time and memory of every selective scan, side by side: `python -m benchmarks.scan`.

Each cell is a median, with the improvement over `associative` in parentheses. The implementations
are timed in turn, round after round, so that a noisy machine affects all of them equally. Memory is
what XLA allocates besides arguments and results.
"""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import tyro

from benchmarks import gpu_scan, machine
from benchmarks.programs import Program, forward, forward_backward, make_inputs
from benchmarks.table import Cell, Report
from dvmsr_jax.kernels.selective_scan import Implementation, missing, triton_scan

BASELINE: Implementation = "associative"
COLUMNS = (
    "l",
    "d",
    "implementation",
    "forward",
    "forward+backward",
    "memory, forward",
    "memory, forward+backward",
)

COMPARED: tuple[Implementation, ...] = (
    "sequential",
    "associative",
    "chunked-carried",
    "chunked-parallel",
    "native",
)
MAX_ROUNDS = 20


def compare(
    implementations: tuple[Implementation, ...], l: int, d: int, max_rounds: int
) -> Iterator[list[Cell]]:
    """Yields the table's rows for l tokens of d channels."""
    inputs = make_inputs(l, d)
    passes = []
    for function in (forward, forward_backward):
        programs = {
            name: Program(functools.partial(function, name), *inputs) for name in implementations
        }
        for _ in range(max_rounds):
            for program in programs.values():
                if program.wants_repetition():
                    program.repeat()
        passes.append(programs)
    for name in implementations:
        pairs = [(programs[name], programs.get(BASELINE)) for programs in passes]
        times = [program.time_cell(baseline) for program, baseline in pairs]
        memories = [program.memory_cell(baseline) for program, baseline in pairs]
        yield [l, d, name, *times, *memories]


def main(
    lengths: tuple[int, ...] = (4096, 16384, 65536),
    channels: tuple[int, ...] = (120, 384),
    implementations: tuple[Implementation, ...] | None = None,
    smoke: bool = False,
    gpu: bool = False,
    sizes: tuple[tuple[int, int], ...] = ((1, 65_536), (1, 1_048_576), (32, 4096), (128, 4096)),
    registers: bool = False,
    json: Path | None = None,
) -> None:
    """Prints the time and memory of selective scans as a Markdown table.

    Args:
        lengths: numbers of tokens, l.
        channels: numbers of channels, d.
        implementations: implementations to compare. None: those that run here or, with `gpu`, the
            baselines of the Triton kernels.
        smoke: a quick run to check that everything works: l = 256, d = 16, one repetition; with
            `gpu`, of other scans where there is no GPU.
        gpu: compare the Triton kernels with the limits of an NVIDIA GPU instead.
        sizes: with `gpu`, pairs of b and l: the number of sequences and the tokens of each.
        registers: print the register usage of the Triton kernels instead; needs no GPU.
        json: also write the tables to this file.
    """
    if smoke:
        lengths, channels, sizes = (256,), (16,), ((1, 256),)
    report = Report(machine.describe(), json)
    if gpu or registers:
        lack = triton_scan.missing_package() if registers else triton_scan.missing()
        if lack and not smoke:
            sys.exit(f"benchmarks.scan: nothing to measure: {lack}")
        if registers:
            from benchmarks.registers import report_registers  # needs Triton

            report_registers(report)
        else:
            names = ("sequential" if lack else "triton", *(implementations or gpu_scan.BASELINES))
            gpu_scan.report_times(report, names, sizes, channels, smoke)
        return
    implementations = implementations or tuple(name for name in COMPARED if not missing(name))
    report.table(COLUMNS, text=["implementation"])
    for l in lengths:
        for d in channels:
            for row in compare(implementations, l, d, 1 if smoke else MAX_ROUNDS):
                report.row(row)


if __name__ == "__main__":
    tyro.cli(main)

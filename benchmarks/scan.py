"""Time and memory of every selective scan, side by side: `python -m benchmarks.scan`.

Each cell is a median and, in parentheses, how many times better than `associative` it is. The
implementations are timed in turn, round after round, so that a noisy machine disturbs them alike.
Memory is what XLA allocates besides arguments and results.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import tyro

from benchmarks import machine
from benchmarks.table import print_head, print_row, rounded
from kernels.selective_scan import Implementation, selective_scan

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

# Every program is timed at least MIN_REPETITIONS times, and further, up to MAX_ROUNDS times, until
# that has taken CELL_SECONDS.
CELL_SECONDS = 2.0
MIN_REPETITIONS = 2
MAX_ROUNDS = 20


def make_inputs(l: int, d: int, n: int = 16) -> tuple[dict[str, jax.Array], jax.Array]:
    """(the arrays of a call, b = 1, with Mamba's initial A and step sizes; the loss's weights)."""
    keys = iter(jax.random.split(jax.random.key(0), 7))

    def normal(channels):
        return jax.random.normal(next(keys), (1, l, channels))

    step_sizes = jnp.exp(jax.random.uniform(next(keys), (d,), minval=-6.9, maxval=-2.3))
    arrays = {
        "u": normal(d),
        "delta": 0.1 * normal(d),
        "A": jnp.broadcast_to(-jnp.arange(1.0, n + 1), (d, n)),
        "B": normal(n),
        "C": normal(n),
        "D": jnp.ones(d),
        "z": normal(d),
        "delta_bias": jnp.log(jnp.expm1(step_sizes)),
    }
    return arrays, normal(d)


def forward(implementation: Implementation, arrays, weights) -> jax.Array:
    """y; the weights are the loss's alone."""
    del weights
    return selective_scan(**arrays, delta_softplus=True, implementation=implementation)


def forward_backward(implementation: Implementation, arrays, weights) -> dict[str, jax.Array]:
    """The gradients of sum(y weights) by every array."""
    return jax.grad(lambda arrays: jnp.sum(forward(implementation, arrays, weights) * weights))(
        arrays
    )


class Program:
    """A function compiled for its inputs, and what was measured of it."""

    def __init__(self, function: Callable, *inputs):
        self.inputs = inputs
        self.seconds: list[float] = []
        self.temp_bytes: int | None = None
        self.obstacle = ""  # why it cannot run
        with self._noting_lack_of_memory():
            self.compiled = jax.jit(function).lower(*inputs).compile()
            sizes = self.compiled.memory_analysis()
            assert sizes is not None, f"no memory analysis on {jax.default_backend()}"
            self.temp_bytes = sizes.temp_size_in_bytes
            needed = self.temp_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
            # A CPU program that takes too much is killed by the system, without an exception.
            if jax.default_backend() == "cpu" and needed > machine.available_memory():
                self.obstacle = f"needs {needed / machine.GIB:.0f} GiB"

    def wants_repetition(self) -> bool:
        """Whether it can run, and has not yet used up the time that a cell gets."""
        enough = len(self.seconds) >= MIN_REPETITIONS and sum(self.seconds) >= CELL_SECONDS
        return not (self.obstacle or enough)

    def repeat(self) -> None:
        """Times one call, after another that makes memory and caches this program's own again."""
        with self._noting_lack_of_memory():
            jax.block_until_ready(self.compiled(*self.inputs))
            start = time.perf_counter()
            jax.block_until_ready(self.compiled(*self.inputs))
            self.seconds.append(time.perf_counter() - start)

    @contextlib.contextmanager
    def _noting_lack_of_memory(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self.obstacle = "out of memory"

    def time_cell(self, baseline: "Program | None") -> str:
        """Median time and its ratio to the baseline's, for the table."""
        if self.obstacle:
            return self.obstacle
        seconds = statistics.median(self.seconds)
        cell = f"{rounded(seconds * 1e3)} ms"
        if baseline and not baseline.obstacle:
            cell += f" ({rounded(statistics.median(baseline.seconds) / seconds)}x)"
        return cell

    def memory_cell(self, baseline: "Program | None") -> str:
        """Temporary memory and its ratio to the baseline's, for the table."""
        if self.temp_bytes is None:
            return self.obstacle
        cell = f"{rounded(self.temp_bytes / 2**20)} MiB"
        if baseline and baseline.temp_bytes and self.temp_bytes:
            cell += f" ({rounded(baseline.temp_bytes / self.temp_bytes)}x)"
        return cell


def compare(
    implementations: tuple[Implementation, ...], l: int, d: int, max_rounds: int
) -> Iterator[list[str]]:
    """The table's rows for l tokens of d channels."""
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
        yield [f"{l:,}", f"{d}", name, *times, *memories]


def main(
    lengths: tuple[int, ...] = (4096, 16384, 65536),
    channels: tuple[int, ...] = (120, 384),
    implementations: tuple[Implementation, ...] = (
        "sequential",
        "associative",
        "chunked-carried",
        "chunked-parallel",
    ),
    smoke: bool = False,
) -> None:
    """Prints the time and memory of selective scans as a Markdown table.

    Args:
        lengths: numbers of tokens, l.
        channels: numbers of channels, d.
        implementations: which to compare.
        smoke: a quick run that only shows that everything works: l = 256, d = 16, one repetition.
    """
    if smoke:
        lengths, channels = (256,), (16,)
    print(f"{machine.describe()}\n")
    print_head(COLUMNS, text=["implementation"])
    for l in lengths:
        for d in channels:
            for row in compare(implementations, l, d, 1 if smoke else MAX_ROUNDS):
                print_row(row)


if __name__ == "__main__":
    tyro.cli(main)

"""Compiled calls of the scan on random inputs, for its benchmarks."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks import machine
from benchmarks.table import Measured
from dvmsr_jax.errors import is_out_of_memory
from dvmsr_jax.kernels.selective_scan import Implementation, selective_scan

# A program is timed at least MIN_REPETITIONS times, and until the calls have taken CELL_SECONDS.
CELL_SECONDS = 2.0
MIN_REPETITIONS = 2


def make_inputs(
    l: int, d: int, n: int = 16, b: int = 1, dtype: jnp.dtype = jnp.float32
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns (the scan's arrays, with Mamba's initial A and step sizes; the loss's weights)."""
    keys = iter(jax.random.split(jax.random.key(0), 7))

    def normal(channels):
        return jax.random.normal(next(keys), (b, l, channels), dtype)

    step_sizes = jnp.exp(jax.random.uniform(next(keys), (d,), minval=-6.9, maxval=-2.3))
    arrays = {
        "u": normal(d),
        "delta": (0.1 * normal(d)).astype(dtype),
        "A": jnp.broadcast_to(-jnp.arange(1.0, n + 1), (d, n)),
        "B": normal(n),
        "C": normal(n),
        "D": jnp.ones(d),
        "z": normal(d),
        "delta_bias": jnp.log(jnp.expm1(step_sizes)),
    }
    return arrays, normal(d)


def forward(implementation: Implementation, arrays, weights) -> jax.Array:
    """Returns y. The weights are not used."""
    del weights
    return selective_scan(**arrays, delta_softplus=True, implementation=implementation)


def forward_backward(implementation: Implementation, arrays, weights) -> dict[str, jax.Array]:
    """Returns the gradients of sum(y weights) by every array."""
    return jax.grad(lambda arrays: jnp.sum(forward(implementation, arrays, weights) * weights))(
        arrays
    )


class Program:
    """A function compiled for its inputs, and its measurements."""

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
            # On CPUs, the system kills a program that needs too much, without an exception.
            if jax.default_backend() == "cpu" and needed > machine.available_memory():
                self.obstacle = f"needs {needed / machine.GIB:.0f} GiB"

    def wants_repetition(self) -> bool:
        """Whether it can run and has time left."""
        enough = len(self.seconds) >= MIN_REPETITIONS and sum(self.seconds) >= CELL_SECONDS
        return not (self.obstacle or enough)

    def repeat(self) -> None:
        """Times one call, after another call to warm up memory and caches."""
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
            if not is_out_of_memory(error):
                raise
            self.obstacle = "out of memory"

    def time_cell(self, baseline: "Program | None") -> Measured | str:
        """The median time and its ratio to the baseline's, for the table."""
        if self.obstacle:
            return self.obstacle
        seconds = statistics.median(self.seconds)
        ratio = None
        if baseline and not baseline.obstacle:
            ratio = statistics.median(baseline.seconds) / seconds
        return Measured(seconds * 1e3, "ms", ratio)

    def memory_cell(self, baseline: "Program | None") -> Measured | str:
        """The temporary memory and its ratio to the baseline's, for the table."""
        if self.temp_bytes is None:
            return self.obstacle
        ratio = None
        if baseline and baseline.temp_bytes and self.temp_bytes:
            ratio = baseline.temp_bytes / self.temp_bytes
        return Measured(self.temp_bytes / 2**20, "MiB", ratio)

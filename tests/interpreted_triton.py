"""The Triton kernels in Triton's interpreter, against the specification.

Not collected with the other tests: `test_triton.py` runs it in a process of its own, since
TRITON_INTERPRET=1 must be set before triton is imported, and holds for the whole process. Kernels
run in a callback from JAX on the CPU, everything around them as on a GPU.
"""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton

from dvmsr_jax.kernels.selective_scan import triton_kernels, triton_scan
from tests.test_selective_scan import (
    ALL_OPTIONS,
    assert_close,
    assert_sharded_like_the_specification,
    make_inputs,
    outputs,
    outputs_and_gradients,
)

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"

# The interpreter is not thread-safe, and JAX makes callbacks from several threads.
ONE_AT_A_TIME = threading.Lock()
TYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16"}


class Tensor:
    """The parts of torch.Tensor that the interpreter uses, for a NumPy array."""

    def __init__(self, array):
        self.array = array
        self.dtype = TYPE_NAMES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.array is self.array

    def new_empty(self, *_, **__):
        return Tensor(self.array)

    def set_(self, storage, *_):
        assert storage.array is self.array

    storage_offset = size = stride = lambda self: None


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    """Launches kernels in the interpreter, and cuts even short sequences into chunks."""

    def launch(kernel, programs, arrays, sizes, outputs, *, warps=1, **constants):
        del warps

        def run(*arrays):
            arrays = [np.array(x) for x in arrays]
            # NaN shows wherever a kernel does not write.
            out = [np.full(x.shape, np.nan, x.dtype) for x in outputs]
            function = getattr(triton_kernels, kernel)
            with ONE_AT_A_TIME:
                function[(programs,)](*map(Tensor, arrays), *sizes, *map(Tensor, out), **constants)
            return tuple(out)

        return jax.pure_callback(run, outputs, *arrays)

    monkeypatch.setattr(triton_scan, "launch", launch)
    monkeypatch.setattr(triton_scan, "missing", lambda: None)
    monkeypatch.setattr(triton_scan, "MIN_CHUNK", 16)
    monkeypatch.setattr(triton_scan, "BORDER_TILE", (2, 8))


CASES = {
    "one token": {"l": 1, "b": 1, "d": 3, "n": 1, "options": frozenset()},
    "one channel": {"l": 3, "b": 1, "d": 1, "n": 3, "options": frozenset({"delta_bias"})},
    "only softplus": {"l": 2, "b": 1, "d": 2, "n": 2, "options": frozenset({"delta_softplus"})},
    "only a state": {"l": 2, "b": 1, "d": 2, "n": 2, "options": frozenset({"initial_state"})},
    "one chunk": {"l": 13, "b": 2, "d": 8, "n": 5, "options": frozenset({"z"})},
    "several chunks": {"l": 63, "b": 1, "d": 16},
    "several sequences, chunks and overlapping tiles": {"l": 17, "b": 2, "d": 36},
    "many states": {"l": 9, "b": 1, "d": 12, "n": 64, "options": ALL_OPTIONS - {"z"}},
    "bfloat16": {"l": 17, "b": 1, "d": 4, "dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_specification(case):
    arrays, flags = make_inputs(**CASES[case])
    expected = outputs_and_gradients(arrays, flags, "sequential")
    # Both sides compute in float32; bfloat16 results may round to neighbouring values.
    tolerance = 8e-3 if case == "bfloat16" else 1e-4
    assert_close(outputs_and_gradients(arrays, flags, "triton"), expected, tolerance)


def test_large_steps_do_not_overflow():
    """Decays that underflow to zero leave finite outputs and gradients, across chunks too."""
    arrays, flags = make_inputs(20, b=1, d=4)
    arrays["delta"] = arrays["delta"] * 100
    expected = outputs_and_gradients(arrays, flags, "sequential")
    actual = outputs_and_gradients(arrays, flags, "triton")
    assert all(np.isfinite(x).all() for x in actual.values())
    assert_close(actual, expected, 1e-4)


@pytest.mark.parametrize("mapped", ["everything", "tokens"])
def test_under_vmap(mapped):
    """With separate weights for each mapped sequence, and with shared ones."""
    arrays, flags = make_inputs(9, b=2, d=4, n=4)
    axes = {k: 0 if mapped == "everything" or v.shape[0] == 2 else None for k, v in arrays.items()}
    others, _ = make_inputs(9, b=2, d=4, n=4, seed=1)
    stacked = {
        k: arrays[k] if axes[k] is None else jnp.stack([arrays[k], others[k]]) for k in arrays
    }
    second = {k: arrays[k] if axes[k] is None else others[k] for k in arrays}
    actual = jax.vmap(lambda x: outputs_and_gradients(x, flags, "triton"), (axes,))(stacked)
    expected = outputs_and_gradients(second, flags, "sequential")
    assert_close({k: x[1] for k, x in actual.items()}, expected, 1e-4)


def test_sharded_over_two_devices():
    assert_sharded_like_the_specification(*make_inputs(9, b=2, d=5, n=4), "triton")


def test_under_checkpoint():
    arrays, flags = make_inputs(9, b=1, d=4, n=4)

    @jax.checkpoint
    def block(arrays):
        return outputs(arrays, flags, "triton")["y"]

    actual = jax.jit(jax.grad(lambda arrays: jnp.sum(jnp.sin(block(arrays)))))(arrays)
    expected = jax.grad(lambda arrays: jnp.sum(jnp.sin(outputs(arrays, flags, "sequential")["y"])))
    assert_close(actual, expected(arrays), 1e-4)

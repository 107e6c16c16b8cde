"""The Triton kernels in Triton's interpreter, against the specification.

Not collected with the other tests: `test_triton.py` runs it in a process of its own, since
TRITON_INTERPRET=1 must be set before triton is imported, and holds for the whole process. Kernels
run in a callback from JAX on the CPU, everything around them as on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
from test_selective_scan import (
    ALL_OPTIONS,
    assert_close,
    make_inputs,
    name_of,
    outputs,
    outputs_and_gradients,
)

from kernels.selective_scan import triton_kernels, triton_scan

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"

TYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16"}


class Tensor:
    """What the interpreter asks of a torch.Tensor, over a NumPy array."""

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
            # Whatever a kernel does not write shows.
            out = [np.full(x.shape, np.nan, x.dtype) for x in outputs]
            function = getattr(triton_kernels, kernel)
            function[(programs,)](
                *map(Tensor, arrays), *sizes, *map(Tensor, out), **constants
            )
            return out

        return jax.pure_callback(run, list(outputs), *arrays)

    monkeypatch.setattr(triton_scan, "launch", launch)
    monkeypatch.setattr(triton_scan, "missing", lambda: None)
    monkeypatch.setattr(triton_scan, "MIN_CHUNK", 16)
    monkeypatch.setattr(triton_scan, "BORDER_TILE", (2, 8))


def check(l, *, options=ALL_OPTIONS, tolerance=1e-4, **sizes):
    arrays, flags = make_inputs(l, options=options, **sizes)
    expected = outputs_and_gradients(arrays, flags, "sequential")
    assert_close(outputs_and_gradients(arrays, flags, "triton"), expected, tolerance)


@pytest.mark.parametrize("options", [frozenset(), ALL_OPTIONS], ids=name_of)
@pytest.mark.parametrize("l", [1, 16, 63])
def test_equals_specification(l, options):
    check(l, options=options, b=2, d=20)

"""The Triton form lowered for NVIDIA GPUs, by JAX's CUDA plugin on a machine without a GPU.

Not collected with the other tests: `test_triton.py` runs it in a process of its own, with two CPU
devices to shard over. Triton compiles its kernels to PTX on the way.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dvmsr_jax.kernels.selective_scan import triton_scan
from tests.test_selective_scan import ALL_OPTIONS, make_inputs, outputs

CALL = "triton_kernel_call"
FORWARD = ("chunk_ends", "chunk_borders", "outputs")
BACKWARD = ("chunk_start_gradients", "chunk_borders", "gradients")


@pytest.fixture(autouse=True)
def _as_if_there_were_a_gpu(monkeypatch):
    monkeypatch.setattr(triton_scan, "missing", lambda: None)


def forward(flags, arrays):
    return outputs(arrays, flags, "triton")["y"]


def gradient(flags, arrays):
    return jax.grad(lambda arrays: jnp.sum(forward(flags, arrays)))(arrays)


def lowered(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("l", "options", "dtype"),
    [
        (1, frozenset(), jnp.float32),
        (1000, ALL_OPTIONS, jnp.float32),
        (1000, ALL_OPTIONS, jnp.bfloat16),
    ],
)
def test_forward_and_backward(l, options, dtype):
    arrays, flags = make_inputs(l, options=options, dtype=dtype)
    phases = 3 if l == 1000 else 1
    assert lowered(functools.partial(forward, flags), arrays).count(f"@{CALL}") == phases
    assert lowered(functools.partial(gradient, flags), arrays).count(f"@{CALL}") == 2 * phases


def test_one_call_under_vmap():
    arrays, flags = make_inputs(1000)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x, x]), arrays)
    text = lowered(jax.vmap(functools.partial(gradient, flags)), stacked)
    assert text.count(f"@{CALL}") == 6


def test_under_checkpoint():
    arrays, flags = make_inputs(1000)
    block = jax.checkpoint(functools.partial(forward, flags))
    text = lowered(jax.grad(lambda arrays: jnp.sum(block(arrays))), arrays)
    assert text.count(f"@{CALL}") >= 6


def test_sharded():
    """Each device runs the kernels on its own sequences."""
    arrays, flags = make_inputs(1000, b=4)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    assert mesh.size == 2
    specs = {
        k: PartitionSpec("data") if x.shape[0] == 4 else PartitionSpec() for k, x in arrays.items()
    }
    function = jax.shard_map(
        functools.partial(forward, flags),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    arrays = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in arrays.items()}
    text = lowered(jax.grad(lambda arrays: jnp.sum(function(arrays))), arrays)
    assert text.count(f"@{CALL}") == 6
    assert "tensor<2x1000x20xf32>" in text


def test_export():
    arrays, flags = make_inputs(1000)
    export = jax.export.export(
        jax.jit(functools.partial(forward, flags)),
        platforms=("cuda",),
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(CALL)],
    )(arrays)
    assert export.platforms == ("cuda",)
    assert export.mlir_module().count(f"@{CALL}") == 3

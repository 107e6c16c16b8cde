"""The Triton form: without a GPU in Triton's interpreter, compiled and lowered; on one at length.

`test_selective_scan.py` holds it to the specification on a GPU, like every other form.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.version import Version

from dvmsr_jax.kernels.selective_scan import native, op, selective_scan, triton_scan
from tests.test_selective_scan import (
    assert_close,
    assert_sharded_like_the_specification,
    make_inputs,
    outputs,
    outputs_and_gradients,
)

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton (Linux)"
)


def run_in_a_process_of_its_own(file: str, **environment: str) -> None:
    """Runs the tests in `file` under these environment variables."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", TESTS / file],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_in_the_interpreter():
    triton = Version(importlib.metadata.version("triton"))
    if triton < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip(f"Triton {triton}'s interpreter does not run with NumPy 2.4 and newer")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    run_in_a_process_of_its_own("interpreted_triton.py", TRITON_INTERPRET="1", XLA_FLAGS=flags)


def test_lowered_for_cuda():
    if not triton_scan.cuda_plugin():
        pytest.skip(
            "needs JAX's CUDA plugin, which lowers without a GPU too: "
            "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt, in jax's version"
        )
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    run_in_a_process_of_its_own("lowered_triton.py", XLA_FLAGS=flags)


@needs_triton
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize(
    "kernel",
    ["chunk_ends", "chunk_start_gradients", "chunk_borders", "outputs", "gradients"],
)
def test_compiles_without_spilling_registers(kernel, target, dtype):
    from benchmarks.registers import registers_and_stack

    registers, stack = registers_and_stack(kernel, target, dtype)
    assert 0 < registers <= 255
    assert stack == 0


@needs_triton
@pytest.mark.parametrize("n", [5, 64])
def test_other_numbers_of_states_spill_no_registers_either(n):
    from benchmarks.registers import registers_and_stack

    assert registers_and_stack("gradients", 90, "fp32", d=384, n=n)[1] == 0


@pytest.mark.parametrize("package", ["triton", "jax_triton"])
def test_a_missing_package_is_named(monkeypatch, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    arrays, flags = make_inputs(9)
    with pytest.raises(RuntimeError, match=f"cannot run: the package {package} is not .*pip"):
        selective_scan(**arrays, **flags, implementation="triton")


def with_packages(monkeypatch, plugin=True):
    names = ["triton", "jax_triton"] + ["jax_cuda13_plugin"] * plugin
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace() if name in names else None
    )


def test_a_missing_plugin_is_named(monkeypatch):
    with_packages(monkeypatch, plugin=False)
    arrays, flags = make_inputs(9)
    with pytest.raises(RuntimeError, match=r'cannot run: JAX.s CUDA plugin .*"jax\[cuda13\]=='):
        selective_scan(**arrays, **flags, implementation="triton")


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        (None, "JAX finds no NVIDIA GPU.*nvidia-smi"),
        ("7.5", "Old has compute capability 7.5;.*8.0"),
    ],
)
def test_a_missing_gpu_is_named(monkeypatch, capability, message):
    def devices(platform=None):
        assert platform == "cuda"
        if capability is None:
            raise RuntimeError("Unknown backend cuda")
        return [SimpleNamespace(compute_capability=capability, device_kind="Old")]

    with_packages(monkeypatch)
    monkeypatch.setattr(jax, "devices", devices)
    arrays, flags = make_inputs(9)
    with pytest.raises(RuntimeError, match=f"cannot run: {message}"):
        selective_scan(**arrays, **flags, implementation="triton")


def test_automatic_choice_on_gpus(monkeypatch, caplog):
    """Triton if it can run; otherwise `chunked`, with one line that says why."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(triton_scan, "missing", lambda: None)
    assert op._resolve("auto") == "triton"
    assert op._resolve("chunked") == "chunked-parallel"
    assert not caplog.records

    monkeypatch.setattr(triton_scan, "missing", lambda: "the moon is in the wrong phase")
    arrays, flags = make_inputs(9)
    for _ in range(2):
        selective_scan(**arrays, **flags)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the moon is in the wrong phase" in record.message


def test_automatic_choice_on_cpus(monkeypatch, caplog):
    """C++ if it can run; otherwise `chunked`, with one line that says why."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(native, "missing", lambda: None)
    assert op._resolve("auto") == "native"
    monkeypatch.setattr(native, "missing", lambda: "the compiler is on holiday")
    assert op._resolve("chunked") == "chunked-carried"
    assert not caplog.records
    for _ in range(2):
        assert op._resolve("auto") == "chunked-carried"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the compiler is on holiday" in record.message


@pytest.mark.parametrize(
    ("columns", "chunks"),
    [(1, 1056), (4, 264), (384, 5), (600, 5), (790, 4), (792, 1), (1056, 1), (2000, 1)],
)
def test_chunks_fill_the_gpu_in_few_rounds(columns, chunks):
    """There is no split if three quarters are full and splitting costs a fifth more."""
    assert triton_scan.chunk_count(columns, 1056, 1.2) == chunks


@pytest.mark.parametrize(
    ("b", "d", "forward", "backward"),
    [(1, 120, 528, 264), (32, 120, 16, 8), (32, 384, 5, 5), (128, 120, 4, 2), (128, 384, 1, 1)],
)
def test_full_gpus_are_not_split(b, d, forward, backward):
    columns = b * -(-d // 32)
    for kind, chunks in ((triton_scan.FORWARD, forward), (triton_scan.BACKWARD, backward)):
        slots = kind.programs * triton_scan.MULTIPROCESSORS
        assert triton_scan.chunk_count(columns, slots, kind.split_cost) == chunks


# On a GPU, at real sizes. The reference there is `chunked-parallel`, which is tested against the
# specification at small sizes: a million steps of `sequential`, with gradients, take too long.


def real_inputs(b, l, d, dtype=jnp.float32):
    """Mamba's decay rates and step sizes, with which states remember thousands of tokens."""
    arrays, flags = make_inputs(l, b=b, d=d, dtype=dtype)
    arrays["A"] = jnp.broadcast_to(-jnp.arange(1.0, 17), (d, 16))
    arrays["delta_bias"] -= 4
    return arrays, flags


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("d", [120, 384])
@pytest.mark.parametrize(("b", "l"), [(1, 65_536), (1, 1_048_576), (32, 4096)])
def test_real_sizes(b, l, d, dtype):
    arrays, flags = real_inputs(b, l, d, dtype)
    actual = jax.tree.map(np.asarray, outputs_and_gradients(arrays, flags, "triton"))
    expected = outputs_and_gradients(arrays, flags, "chunked-parallel")
    assert_close(actual, expected, 1e-4 if dtype == jnp.float32 else 8e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("l", "d", "n"),
    [(100, 1, 1), (65, 2, 5), (129, 3, 33), (300, 36, 64), (1000, 120, 8), (70, 40, 64)],
)
def test_odd_sizes(l, d, n):
    arrays, flags = make_inputs(l, d=d, n=n)
    expected = outputs_and_gradients(arrays, flags, "sequential")
    assert_close(outputs_and_gradients(arrays, flags, "triton"), expected, 2e-5)


@pytest.mark.gpu
def test_exported():
    arrays, flags = make_inputs(1000)
    call = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")
    function = jax.jit(lambda arrays: outputs(arrays, flags, "triton"))
    exported = jax.export.export(function, disabled_checks=[call])(arrays)
    assert_close(exported.call(arrays), outputs(arrays, flags, "sequential"), 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("b", "l"), [(1, 100_003), (32, 1000)])
def test_the_same_bits_twice(b, l, dtype):
    arrays, flags = real_inputs(b, l, 120, dtype)
    first = jax.tree.map(np.asarray, outputs_and_gradients(arrays, flags, "triton"))
    second = outputs_and_gradients(arrays, flags, "triton")
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize(
    ("l", "implementation"),
    [(20_000, "chunked-parallel"), pytest.param(2**24, "triton", marks=pytest.mark.gpu)],
)
def test_offsets_beyond_32_bits(l, implementation):
    """The last of 16 million tokens equal those of a short sequence, because states forget."""
    arrays, flags = make_inputs(l, b=1, d=136, dtype=jnp.bfloat16)  # 2.3e9 of each
    per_token = ("u", "delta", "B", "C", "z")

    @functools.partial(jax.jit, static_argnums=1)
    def last(arrays, implementation):
        y, vjp = jax.vjp(lambda x: outputs(x, flags, implementation)["y"], arrays)
        gradients = vjp(jnp.cos(y))[0]
        return {"y": y[:, -4096:], **{name: gradients[name][:, -4096:] for name in per_token}}

    actual = last(arrays, implementation)
    short = {k: x[:, -8192:] if k in per_token else x for k, x in arrays.items()}
    assert_close(actual, last(short, "chunked-parallel"), 8e-3)


@pytest.mark.gpu
def test_sharded_over_two_devices():
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert_sharded_like_the_specification(*real_inputs(4, 1000, 120), "triton")

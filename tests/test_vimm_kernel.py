"""Holds the fused ViMM to the same module in JAX, whose scan is the specification."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax.bands import Band
from dvmsr_jax.config import Compute, ModelConfig
from dvmsr_jax.kernels import native_library
from dvmsr_jax.kernels import vimm as fused
from dvmsr_jax.kernels.native_library import NativeLibrary
from dvmsr_jax.vimm import ViMM
from tests.conftest import ROOT
from tests.jaxprs import equations

pytestmark = pytest.mark.skipif(fused.missing() is not None, reason="needs a C++ compiler")

BFLOAT16 = Compute(precision="bfloat16")
SMALL = ModelConfig(channels=10, states=4)
CONFIGS = {
    "student": ModelConfig(),
    "small": SMALL,
    "no-history": ModelConfig(channels=10, states=16, conv_width=1),
    "expand-1": ModelConfig(channels=96, states=20, expand=1, conv_width=7),
    "expand-3": ModelConfig(channels=7, states=1, expand=3),
    "17-channels": ModelConfig(channels=17),
    "teacher": ModelConfig(channels=192),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Of the largest output.
TOLERANCE = 5e-6
GRADIENT_TOLERANCE = 3e-5


def make_vimm(config, compute=Compute(), memory=2):
    """A ViMM with random weights and, by default, a long memory."""
    vimm = nnx.eval_shape(lambda: ViMM(config, 0, compute, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)

    def values(path, x):
        mean = -memory if path[-1] == "A_log" else 0
        return x.replace(jnp.asarray(rng.normal(mean, 0.3, x.shape), jnp.float32))

    state = nnx.to_flat_state(nnx.state(vimm, nnx.Param))
    nnx.update(vimm, nnx.from_flat_state([(path, values(path, x)) for path, x in state]))
    return vimm


def make_tokens(b, l, c, seed=2):
    return np.random.default_rng(seed).normal(1, 2, (b, l, c)).astype(np.float32)


@nnx.jit
def run(vimm, tokens):
    return vimm(tokens)


@nnx.jit(static_argnames="columns")
def run_band(vimm, tokens, first, height, width, carried, *, columns):
    """(the result, what is left for the band below)."""
    band = Band(first, height, width, columns, carried)
    return vimm(tokens, band=band), band.left


def assert_close(actual, expected):
    scale = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE * scale, rtol=0)


def is_fused(program):
    """Whether a JAX program calls the fused ViMM."""
    calls = (e for e in equations(program.jaxpr) if e.primitive.name == "ffi_call")
    return any("FusedViMM" in call.params["target_name"] for call in calls)


@pytest.mark.parametrize(("b", "l"), [(1, 1), (2, 63), (3, 1000)])
@each_config
def test_equals_the_specification(config, b, l):
    tokens = make_tokens(b, l, config.channels)
    expected = run(make_vimm(config, Compute("sequential")), tokens)
    assert_close(run(make_vimm(config), tokens), expected)


@pytest.fixture
def on_any_cpu(monkeypatch):
    """bfloat16 is used even if this CPU has no instructions for it."""
    monkeypatch.setattr(native_library, "has_bfloat16", lambda: True)
    NativeLibrary.missing.cache_clear()
    yield
    NativeLibrary.missing.cache_clear()


def rounded_product(x, kernel, *arguments, **options):
    """A product of float32 factors that are rounded to bfloat16."""
    x, kernel = (factor.astype(jnp.bfloat16).astype(jnp.float32) for factor in (x, kernel))
    return jax.lax.dot_general(x, kernel, *arguments, **options)


def make_rounding_vimm(config):
    """The specification of BFLOAT16's products."""
    vimm = make_vimm(config, Compute("sequential"))
    direction = vimm.forward
    for layer in (vimm.in_proj, direction.x_proj, direction.dt_proj, vimm.out_proj):
        layer.dot_general = rounded_product
    return vimm


def assert_close_but_for_rounding(actual, expected, unrounded):
    """Some factors lie so close to the middle of two bfloat16 that they are rounded the other way.
    Far fewer than all of them, which is how `unrounded` differs."""
    distance, all_of_them = (np.std(x - expected) for x in (actual, unrounded))
    assert distance < 0.1 * all_of_them


@pytest.mark.parametrize(("b", "l"), [(1, 1), (2, 63), (3, 1000)])
@each_config
def test_bfloat16_rounds_the_factors_of_products(on_any_cpu, config, b, l):
    tokens = make_tokens(b, l, config.channels)
    expected = run(make_rounding_vimm(config), tokens)
    actual = run(make_vimm(config, BFLOAT16), tokens)
    assert_close_but_for_rounding(actual, expected, run(make_vimm(config), tokens))


def test_a_convolution_may_be_wider_than_a_piece():
    config = ModelConfig(channels=10, states=1, conv_width=110)
    tokens = make_tokens(2, 250, 10)
    expected = run(make_vimm(config, Compute("native")), tokens)
    assert_close(run(make_vimm(config), tokens), expected)


def test_decays_may_vanish():
    tokens = make_tokens(1, 100, 10)
    expected = run(make_vimm(SMALL, Compute("sequential"), memory=-6), tokens)
    assert_close(run(make_vimm(SMALL, memory=-6), tokens), expected)


@pytest.mark.parametrize("conv_width", [4, 6])
@pytest.mark.parametrize(("width", "columns"), [(1, 1), (1, 4), (5, 8), (40, 40)])
def test_bands_equal_the_specification(width, columns, conv_width):
    """Outputs everywhere; what is left as long as a next band can read it."""
    config = ModelConfig(channels=10, states=4, conv_width=conv_width)
    height, rows = 11, 3
    ways = [make_vimm(config, Compute("sequential")), make_vimm(config)]
    carried = [None, None]
    for first in range(-4, height + 5, rows):
        tokens = make_tokens(1, rows * columns, config.channels, seed=first + 4)
        place = jnp.int32(first), jnp.int32(height), jnp.int32(width)
        results = [
            run_band(vimm, tokens, *place, left, columns=columns)
            for vimm, left in zip(ways, carried, strict=True)
        ]
        (expected, expected_left), (actual, left) = results
        assert_close(actual, expected)
        assert np.any(expected) == (-rows < first < height)
        assert left.keys() == expected_left.keys()
        if first + rows <= height:
            for name, x in left.items():
                assert_close(x, expected_left[name])
        carried = [expected_left, left]


@pytest.mark.parametrize("compute", [Compute(), BFLOAT16], ids=["float32", "bfloat16"])
def test_a_band_continues_the_batch(on_any_cpu, compute):
    """Each sequence has its own state and its own last tokens."""
    vimm, tokens = make_vimm(SMALL, compute), make_tokens(3, 400, 10)
    whole = run(vimm, tokens)
    above, left = run_band(vimm, tokens[:, :200], 0, 10, 40, None, columns=40)
    below, _ = run_band(vimm, tokens[:, 200:], 5, 10, 40, left, columns=40)
    np.testing.assert_array_equal(np.concatenate([above, below], axis=1), whole)


@nnx.jit
def gradients(vimm, tokens, by_result):
    """{name: gradient}, by the tokens and by each parameter."""

    def product(vimm, tokens):
        return jnp.sum(vimm(tokens) * by_result)

    by_vimm, by_tokens = nnx.grad(product, argnums=(0, 1))(vimm, tokens)
    named = {".".join(path): x[...] for path, x in nnx.to_flat_state(by_vimm)}
    return {"tokens": by_tokens, **named}


def assert_gradients_are_close(config, tokens, memory=2):
    by_result = make_tokens(*tokens.shape, seed=3)
    expected = gradients(make_vimm(config, Compute("sequential"), memory), tokens, by_result)
    actual = gradients(make_vimm(config, memory=memory), tokens, by_result)
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        # Sums over all tokens, in which large terms cancel.
        atol = GRADIENT_TOLERANCE * np.abs(x).max()
        np.testing.assert_allclose(actual[name], x, atol=atol, rtol=0, err_msg=name)


@pytest.fixture
def one_thread(monkeypatch):
    """The fused gradient is fast enough for a single image."""
    monkeypatch.setattr(fused.op, "_threads", lambda: 1)


@pytest.mark.parametrize(("b", "l"), [(1, 1), (2, 63), (3, 1000)])
@each_config
def test_gradients_equal_the_specification(one_thread, config, b, l):
    assert_gradients_are_close(config, make_tokens(b, l, config.channels))


def test_gradients_of_a_convolution_wider_than_a_piece(one_thread):
    config = ModelConfig(channels=10, states=1, conv_width=110)
    assert_gradients_are_close(config, make_tokens(2, 250, 10))


def test_gradients_where_decays_vanish(one_thread):
    assert_gradients_are_close(SMALL, make_tokens(1, 100, 10), memory=-6)


def gradient_program(b, compute=Compute(), config=SMALL):
    """The program of the gradient for b images."""
    graph, parameters = nnx.split(make_vimm(config, compute))
    tokens = make_tokens(b, 30, 10)

    def loss(parameters, tokens):
        return jnp.sum(nnx.merge(graph, parameters)(tokens))

    return jax.make_jaxpr(jax.grad(loss))(parameters, tokens)


def test_the_gradient_is_fused_where_it_is_faster(on_any_cpu, monkeypatch):
    monkeypatch.setattr(fused.op, "_threads", lambda: 8)
    assert is_fused(gradient_program(4))
    assert not is_fused(gradient_program(3))
    assert not is_fused(gradient_program(4, BFLOAT16))


def test_the_unfused_gradient_is_that_of_the_code_in_jax(monkeypatch):
    monkeypatch.setattr(fused.op, "_threads", lambda: 8)
    tokens, by_result = make_tokens(2, 30, 10), make_tokens(2, 30, 10, seed=3)
    actual, expected = (
        gradients(make_vimm(SMALL, compute), tokens, by_result)
        for compute in (Compute(), Compute("native"))
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_gradients_under_vmap(one_thread):
    graph, parameters = nnx.split(make_vimm(SMALL))
    tokens = jnp.asarray(make_tokens(6, 50, 10))

    def loss(parameters, tokens):
        return jnp.sum(nnx.merge(graph, parameters)(tokens) ** 2)

    expected = jax.grad(loss)(parameters, tokens)
    of_each = jax.vmap(jax.grad(loss), (None, 0))(parameters, tokens[:, None])
    jax.tree.map(lambda x, y: assert_close(jnp.sum(x, axis=0), y), of_each, expected)


@pytest.mark.parametrize(
    ("config", "compute"),
    [
        (SMALL, Compute(scan="native")),
        (ModelConfig(channels=10, bidirectional=True), Compute()),
    ],
)
def test_everything_else_stays_unfused(config, compute):
    vimm, tokens = make_vimm(config, compute), make_tokens(1, 9, 10)
    assert not is_fused(jax.make_jaxpr(vimm)(tokens))


def test_it_is_never_required():
    vimm, tokens = make_vimm(SMALL), make_tokens(1, 9, 10)
    assert is_fused(jax.make_jaxpr(vimm)(tokens))
    with mock.patch("dvmsr_jax.kernels.vimm.missing", return_value="there is no C++ compiler"):
        assert not is_fused(jax.make_jaxpr(lambda x: vimm(x))(tokens))


def test_bfloat16_is_fused_where_it_is_faster(on_any_cpu, monkeypatch):
    vimm, tokens = make_vimm(SMALL, BFLOAT16), make_tokens(1, 9, 10)
    assert is_fused(jax.make_jaxpr(lambda x: vimm(x))(tokens))
    monkeypatch.setattr(native_library, "has_bfloat16", lambda: False)
    NativeLibrary.missing.cache_clear()
    assert fused.missing("bfloat16") == "this CPU has no instructions of AVX512-BF16"
    assert fused.missing() is None
    assert not is_fused(jax.make_jaxpr(lambda x: vimm(x))(tokens))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux lists a CPU's instructions")
def test_the_compiler_knows_what_this_cpu_has():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert native_library.has_bfloat16() == ("avx512_bf16" in flags)


def test_under_vmap():
    vimm, tokens = make_vimm(SMALL), make_tokens(6, 50, 10)
    expected = run(vimm, tokens).reshape(2, 3, 50, 10)
    graph, parameters = nnx.split(vimm)
    mapped = jax.vmap(lambda x: nnx.merge(graph, parameters)(x))(tokens.reshape(2, 3, 50, 10))
    np.testing.assert_array_equal(mapped, expected)


def test_among_64_bit_types():
    vimm, tokens = make_vimm(SMALL), make_tokens(1, 9, 10)
    expected = run(vimm, tokens)
    with jax.enable_x64(True):
        graph, parameters = nnx.split(vimm)
        actual = jax.jit(lambda x: nnx.merge(graph, parameters)(x))(tokens)
    assert actual.dtype == jnp.float32
    assert_close(actual, expected)


@pytest.mark.parametrize("compute", [Compute(), BFLOAT16], ids=["float32", "bfloat16"])
def test_nan_is_not_hidden(on_any_cpu, compute):
    """It spreads to all later tokens and to no earlier one."""
    tokens = make_tokens(1, 300, 10)
    tokens[0, 150, 3] = np.nan
    nan = np.isnan(run(make_vimm(SMALL, compute), tokens))
    assert nan[0, 150:].all()
    assert not nan[0, :150].any()


def digest():
    """Identifies the bits of a result and its gradient that several threads have computed."""
    vimm, tokens = make_vimm(ModelConfig()), make_tokens(2, 2000, 60)
    with mock.patch.object(fused.op, "_threads", return_value=1):
        results = run(vimm, tokens), gradients(vimm, tokens, tokens)
    digests = (np.asarray(x).tobytes() for x in jax.tree.leaves(results))
    return hashlib.sha256(b"".join(digests)).hexdigest()


@pytest.mark.parametrize("threads", [1, 5])
def test_bits_do_not_depend_on_the_number_of_threads(threads):
    environment = os.environ | {"NPROC": str(threads)}  # XLA takes it for the number of cores
    command = [sys.executable, "-c", "from tests.test_vimm_kernel import digest; print(digest())"]
    other = subprocess.run(
        command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert other.stdout.strip() == digest()

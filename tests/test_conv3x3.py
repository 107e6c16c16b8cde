"""Holds the native 3x3 convolution to XLA's."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax.bands import WHOLE
from dvmsr_jax.config import Compute
from dvmsr_jax.convolution import Conv3x3
from dvmsr_jax.kernels import conv3x3
from tests.jaxprs import equations

pytestmark = pytest.mark.skipif(conv3x3.missing() is not None, reason="needs a C++ compiler")


def make_conv(c_in, c_out, compute=Compute()):
    return Conv3x3(c_in, c_out, compute, rngs=nnx.Rngs(0))


def make_image(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def rounded(x):
    """To bfloat16, and back, so that XLA can compute with it in float32."""
    return np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32))


def is_native(program):
    calls = (e for e in equations(program.jaxpr) if e.primitive.name == "ffi_call")
    return any("Conv3x3" in call.params["target_name"] for call in calls)


@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("b", "h", "w", "c_in", "c_out"),
    [
        (1, 1, 1, 3, 60),
        (2, 5, 97, 60, 60),
        (3, 9, 200, 20, 7),
        (1, 4, 96, 60, 48),
        (1, 2, 3, 17, 16),
    ],
)
def test_equals_xlas(b, h, w, c_in, c_out, factors):
    conv, rows = make_conv(c_in, c_out), make_image(b, h + 2, w, c_in)
    conv.factors = factors
    actual = nnx.jit(Conv3x3.native)(conv, rows)
    if factors == "bfloat16":
        conv.kernel[...], rows = rounded(conv.kernel[...]), rounded(rows)
    expected = nnx.jit(Conv3x3.in_jax)(conv, rows)
    assert actual.shape == (b, h, w, c_out)
    np.testing.assert_allclose(actual, expected, atol=3e-6, rtol=0)


def test_images_of_bfloat16():
    conv, rows = make_conv(5, 7), jnp.asarray(make_image(1, 6, 8, 5), jnp.bfloat16)
    actual = nnx.jit(Conv3x3.native)(conv, rows)
    np.testing.assert_array_equal(actual, nnx.jit(Conv3x3.native)(conv, rounded(rows)))


def test_gradients_are_those_of_xla():
    graph, parameters = nnx.split(make_conv(5, 7))
    image = make_image(2, 6, 8, 5)

    def loss(parameters, image):
        return jnp.sum(nnx.merge(graph, parameters)(image, WHOLE) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1))
    assert is_native(jax.make_jaxpr(loss)(parameters, image))
    assert not is_native(jax.make_jaxpr(gradients)(parameters, image))
    actual = jax.jit(gradients)(parameters, image)
    with mock.patch("dvmsr_jax.kernels.conv3x3.missing", return_value="there is no C++ compiler"):
        assert not is_native(jax.make_jaxpr(lambda *x: loss(*x))(parameters, image))
        expected = jax.jit(jax.grad(lambda *x: loss(*x), argnums=(0, 1)))(parameters, image)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert all(np.any(x) for x in jax.tree.leaves(actual))


def test_other_scans_are_left_to_xla():
    conv = make_conv(5, 7, Compute(scan="native"))
    assert not is_native(jax.make_jaxpr(lambda x: conv(x, WHOLE))(make_image(1, 6, 8, 5)))


@pytest.mark.parametrize("reason", [None, "this CPU has no instructions of AVX512-BF16"])
def test_bfloat16_is_native_where_it_is_faster(monkeypatch, reason):
    def missing(factors):
        assert factors == "bfloat16"
        return reason

    monkeypatch.setattr(conv3x3, "missing", missing)
    conv = make_conv(5, 7, Compute(precision="bfloat16"))
    program = jax.make_jaxpr(lambda x: conv(x, WHOLE))(make_image(1, 6, 8, 5))
    assert is_native(program) == (reason is None)


def test_nan_is_not_hidden():
    rows = make_image(1, 7, 9, 5)
    rows[0, 3, 4, 2] = np.nan
    nan = np.isnan(nnx.jit(Conv3x3.native)(make_conv(5, 7), rows))
    expected = np.zeros_like(nan)
    expected[0, 1:4, 3:6] = True
    np.testing.assert_array_equal(nan, expected)

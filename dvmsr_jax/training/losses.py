"""The two phases' losses: pure functions of arrays. `step.loss_function` adds them up."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def pixel(output: Float[Array, "*shape"], hr: Float[Array, "*shape"]) -> Float[Array, ""]:
    """L1 between the upscaled crops and their HR pictures, as in the paper."""
    return _l1(output, hr)


def fourier(output: Float[Array, "b h w c"], hr: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """L1 between the two-dimensional Fourier transforms: the mean over their real and imaginary
    parts, as in SAFMN's published code (arXiv 2302.13800)."""
    difference = jnp.fft.rfft2(output - hr, axes=(1, 2))
    return (jnp.mean(jnp.abs(difference.real)) + jnp.mean(jnp.abs(difference.imag))) / 2


def output_level(
    output: Float[Array, "*shape"], target: Float[Array, "*shape"]
) -> Float[Array, ""]:
    """L1 between the student's upscaled crops and the teacher's, as in the paper (section 3.3)."""
    return _l1(output, target)


def mid_level(
    student: Sequence[Float[Array, "b h w _"]],
    teacher: Sequence[Float[Array, "b h w _"]],
    projections: Sequence[Float[Array, "_ _"]],
) -> Float[Array, ""]:
    """Mean L1 between the teacher's features and the student's, projected to the teacher's width.

    The projections are trained along and thrown away afterwards.
    """
    total = jnp.zeros(())
    for s, t, projection in zip(student, teacher, projections, strict=True):
        # JAX's default precision rounds the factors on GPUs and TPUs.
        total += _l1(jnp.matmul(s, projection, precision="highest"), t)
    return total / len(student)


def _l1(prediction: Array, target: Array) -> Float[Array, ""]:
    return jnp.mean(jnp.abs(prediction - target))

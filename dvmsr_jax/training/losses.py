"""The two phases' losses: pure functions of arrays. `step.loss_function` adds them up."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def l1(output: Float[Array, "*shape"], target: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Mean absolute difference: the paper's loss, against both the HR pictures and the teacher's
    outputs (section 3.3)."""
    return jnp.mean(jnp.abs(output - target))


def charbonnier(output: Float[Array, "*shape"], hr: Float[Array, "*shape"]) -> Float[Array, ""]:
    """L1 smoothed around zero, as in LapSRN (arXiv 1710.01992)."""
    return jnp.mean(jnp.sqrt(jnp.square(output - hr) + 1e-6))


def l2(output: Float[Array, "*shape"], hr: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Mean squared difference, which PSNR measures."""
    return jnp.mean(jnp.square(output - hr))


PIXEL = {"l1": l1, "charbonnier": charbonnier, "l2": l2}
"""The losses that `LossConfig.pixel` names."""


def fourier(output: Float[Array, "b h w c"], hr: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """L1 between the two-dimensional Fourier transforms, averaged over real and imaginary parts, as
    in SAFMN's published code (arXiv 2302.13800)."""
    difference = jnp.fft.rfft2(output - hr, axes=(1, 2))
    return (jnp.mean(jnp.abs(difference.real)) + jnp.mean(jnp.abs(difference.imag))) / 2


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
        total += l1(jnp.matmul(s, projection, precision="highest"), t)
    return total / len(student)

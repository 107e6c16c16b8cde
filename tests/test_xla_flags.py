"""Sums on CPUs are right, unlike in jaxlib 0.10.2 with its default flags."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvmsr_jax.kernels.xla_flags import FLAG

ROOT = Path(__file__).resolve().parents[1]
# https://github.com/jax-ml/jax/issues/39103; prints 1073741824 if sums are right.
REPRODUCER = """
import jax, jax.numpy as jnp
i = jnp.arange(32_769, dtype=jnp.float32)
x = jnp.stack((i, jnp.zeros_like(i), jnp.zeros_like(i)), axis=1)
sums = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(x)
print(int(sums[-1]))
"""
RIGHT = "1073741824"
compiled = pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "no jit"])


def run(program: str, flags: str = "") -> tuple[str, str]:
    """The output of a Python program with these XLA_FLAGS on the CPU, and its warnings."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_jaxlib_still_needs_the_flag():
    """Otherwise, kernels/xla_flags.py can go."""
    assert run(REPRODUCER)[0] != RIGHT


@pytest.mark.parametrize("package", ["dvmsr_jax.kernels.selective_scan", "dvmsr_jax"])
def test_importing_the_library_is_enough(package):
    assert run(f"import {package}\n{REPRODUCER}") == (RIGHT, "")
    assert run(f"import jax\nimport {package}\n{REPRODUCER}") == (RIGHT, "")


def test_importing_it_after_jax_has_started_warns():
    found, warnings = run(f"import jax\njax.devices()\nimport dvmsr_jax\n{REPRODUCER}")
    assert found != RIGHT
    assert f'import dvmsr_jax first, or set XLA_FLAGS="{FLAG}="' in warnings
    assert run(f"import jax\njax.devices()\nimport dvmsr_jax\n{REPRODUCER}", f"{FLAG}=") == (
        RIGHT,
        "",
    )


def test_flags_of_the_user_are_kept():
    show = "import os, dvmsr_jax; print(os.environ['XLA_FLAGS'])"
    other = "--xla_backend_optimization_level=0"
    assert run(show)[0] == f"{FLAG}="
    assert run(show, other)[0] == f"{other} {FLAG}="
    assert run(show, f"{FLAG}=-reduce")[0] == f"{FLAG}=-reduce"


@compiled
def test_the_reported_sums(transform):
    i = jnp.arange(32_769, dtype=jnp.float32)
    x = jnp.stack((i, jnp.zeros_like(i), jnp.zeros_like(i)), axis=1)
    sums = transform(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(x)
    np.testing.assert_array_equal(sums, np.arange(32_769, dtype=np.float32) ** 2)


@compiled
@pytest.mark.parametrize("l", [4096, 32_769])
@pytest.mark.parametrize(
    ("c", "reduce"),
    [
        pytest.param(60, lambda f, x: f.mean(x, -1), id="mean over channels"),
        pytest.param(60, lambda f, x: f.mean(f.square(x), -1), id="square over channels"),
        pytest.param(60, lambda f, x: f.sum(x, (0, 1)), id="bias gradient"),
        pytest.param(16, lambda f, x: f.sum(f.square(x), -1), id="states"),
        pytest.param(3, lambda f, x: f.mean(abs(x)), id="L1 loss"),
        pytest.param(3, lambda f, x: f.mean(f.square(x)), id="L2 loss"),
        pytest.param(3, lambda f, x: f.mean(f.square(x), (1, 2)), id="loss of each picture"),
    ],
)
def test_the_sums_of_this_network(transform, l, c, reduce):
    x = np.random.default_rng(0).standard_normal((2, l, c), np.float32) + 3
    found = transform(lambda x: reduce(jnp, jnp.einsum("blc,cd->bld", x, jnp.eye(c))))(x)
    np.testing.assert_allclose(found, reduce(np, x.astype(np.float64)), rtol=5e-6)

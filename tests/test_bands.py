"""Arrays that layers carry from one band to the next are kept by the layers' names."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax.bands import Band
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.model import DVMSR, named_parameters

WIDTH = 4
ORDERS = ["ab", "ba"]


def run(order, carried):
    """Runs two causal layers of equal shapes on different tokens: what each reads and leaves."""
    band = Band(jnp.array(0), jnp.array(8), jnp.array(WIDTH), WIDTH, carried)
    read = {}
    for layer in order:
        tokens = jnp.full((1, 2 * WIDTH, 3), float(ord(layer)))
        read[layer] = band.at(layer).with_previous(tokens, 2)
    return read, band.left


@pytest.mark.parametrize("second", ORDERS)
@pytest.mark.parametrize("first", ORDERS)
def test_a_reordered_layer_reads_its_own_tokens(first, second):
    _, left = run(first, None)
    read, _ = run(second, left)
    for layer in "ab":
        np.testing.assert_array_equal(read[layer], float(ord(layer)))


def test_duplicate_layer_names_are_refused():
    with pytest.raises(ValueError, match=r"two layers of a band are called 'a\.tokens'"):
        run("aa", None)


def test_layers_have_the_names_of_their_weights():
    config = ModelConfig(channels=8, rssbs=2, vimms_per_rssb=2, states=4)
    model = DVMSR(config, rngs=nnx.Rngs(0))
    band = Band(jnp.array(0), jnp.array(8), jnp.array(WIDTH), WIDTH, None)
    model(jnp.zeros((1, 2, WIDTH, 3)), band=band)
    layers = {name.rpartition(".")[0] for name in band.left}
    parents = {
        name.rsplit(".", count)[0] for name in named_parameters(model) for count in (1, 2, 3, 4)
    }
    assert layers - {""} <= parents  # "" is the network itself, whose long skip is delayed
    assert len(band.left) == 3 + 2 * (1 + 1 + 2 * 2) + 1

"""Weights of networks of any size."""

import functools

import numpy as np

from dvmsr_jax.config import ModelConfig
from dvmsr_jax.model import Weights, parameter_shapes


@functools.cache
def random_weights(config: ModelConfig) -> Weights:
    """Random weights with a long memory; the outputs are of the order of 1."""
    rng = np.random.default_rng(0)
    weights = {
        name: np.float32(rng.normal(size=shape) * 0.6 / config.channels**0.5)
        for name, shape in parameter_shapes(config).items()
    }
    weights |= {name: x - 6 for name, x in weights.items() if name.endswith("A_log")}
    return Weights(config, weights)

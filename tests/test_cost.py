"""The cost of a model, compared with the paper's figures and with an actual model."""

import pytest
from flax import nnx

from dvmsr_jax.config import ModelConfig
from dvmsr_jax.configs import PRESETS
from dvmsr_jax.cost import cost
from dvmsr_jax.model import DVMSR, named_parameters


def test_student():
    costs = cost(PRESETS["paper"]["student"].model, 256, 256)
    assert round(costs.macs / 1e9, 2) == 26.51
    assert round(costs.scan_flops / 1e9, 2) == 9.06
    assert round(costs.usual_macs / 1e9, 2) == 20.17


@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_kernel_is_used_once_a_token(bidirectional):
    config = ModelConfig(channels=20, rssbs=3, states=4, bidirectional=bidirectional)
    parameters = named_parameters(DVMSR(config, rngs=nnx.Rngs(0)))
    kernels = sum(x.size for name, x in parameters.items() if name.endswith(".kernel"))
    assert cost(config, 5, 7).macs == 5 * 7 * kernels
    states = sum(x.size for name, x in parameters.items() if name.endswith(".A_log"))
    assert cost(config, 5, 7).scan_flops == 5 * 7 * 9 * states

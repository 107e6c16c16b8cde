"""Checkpoints come back as they were, and only under the configuration that made them."""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax.checkpoint import CheckpointError, Checkpoints, load_weights
from dvmsr_jax.config import ModelConfig, OptimConfig, TrainConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR, named_parameters
from dvmsr_jax.pretrained import load_model

MODEL = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(phase="teacher", workdir=tmp_path, model=MODEL, keep_checkpoints=2)


@pytest.fixture
def saved(config):
    """A run with checkpoints of steps 1 to 3; the weights of step 3."""
    checkpoints = Checkpoints(config)
    for step in (1, 2, 3):
        weights = named_parameters(DVMSR(MODEL, rngs=nnx.Rngs(step)))
        checkpoints.save(step, weights, {"step": jnp.asarray(step)})
    checkpoints.close()
    return weights


def test_weights_come_back(config, saved):
    phase = config.workdir / "teacher"
    assert sorted(p.name for p in (phase / "checkpoints").iterdir()) == ["2", "3"]
    for path in (phase, phase / "checkpoints", phase / "checkpoints" / "3"):
        model, weights = load_weights(path)
        assert model == MODEL
        assert weights.keys() == saved.keys()
        for name, value in saved.items():
            np.testing.assert_array_equal(weights[name], value)
    _, older = load_weights(phase / "checkpoints" / "2")
    assert any((older[name] != saved[name]).any() for name in saved)
    assert load_model(phase).config == MODEL


def test_state_comes_back(config, saved):
    checkpoints = Checkpoints(config)
    step, ema, state = checkpoints.restore(saved, {"step": jnp.asarray(0)})
    checkpoints.close()
    assert step == int(state["step"]) == 3
    for name, value in saved.items():
        np.testing.assert_array_equal(ema[name], value)


def test_nothing_to_restore(config, saved):
    fresh = Checkpoints(dataclasses.replace(config, phase="student"))
    assert fresh.restore(saved, {"step": jnp.asarray(0)}) is None
    fresh.close()


def test_another_configuration_is_refused(config, saved):
    other = dataclasses.replace(config, seed=1, optim=OptimConfig(learning_rate=1e-3))
    checkpoints = Checkpoints(other)
    with pytest.raises(CheckpointError) as refused:
        checkpoints.restore(saved, {"step": jnp.asarray(0)})
    checkpoints.close()
    assert "optim.learning_rate: 0.0002 there, 0.001 now" in str(refused.value)
    assert "seed: 0 there, 1 now" in str(refused.value)
    assert "channels" not in str(refused.value)


def test_free_fields_may_change(config, saved):
    checkpoints = Checkpoints(dataclasses.replace(config, log_every=1, scan="sequential"))
    assert checkpoints.restore(saved, {"step": jnp.asarray(0)}) is not None
    checkpoints.close()


def test_a_workdir_of_phases_is_refused_by_name(config, saved):
    with pytest.raises(UserError, match=str(config.workdir / "teacher")):
        load_model(config.workdir)


@pytest.mark.parametrize("item", ["config", "ema"])
def test_damaged_checkpoint_is_named(config, saved, item):
    step = config.workdir / "teacher" / "checkpoints" / "3"
    for path in (step / item).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match=str(step)):
        load_model(config.workdir / "teacher")
    shutil.rmtree(step / item)
    with pytest.raises(UserError, match=str(step)):
        load_model(Path(step))

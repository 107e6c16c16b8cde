"""Published weights run unchanged, and our own files are read as they were written."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dvmsr_jax.config import ModelConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR, named_parameters
from dvmsr_jax.pretrained import (
    PretrainedError,
    convert,
    load_model,
    save_safetensors,
    training_facts,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4)


# The published weights.


@pytest.fixture(scope="module")
def published(shared):
    return load_model(shared / "reference" / "team07_DVMSR.pth")


def test_published_configuration(published):
    assert published.config == ModelConfig()


def test_published_activations(published, shared):
    expected = np.load(shared / "reference" / "team07_activations.npz")
    image = jnp.asarray(expected["lr_uint8"][None], jnp.float32) / 255

    @jax.jit
    def run(image):
        output, features = published.with_features(image)
        tokens = published.norm_first(features.shallow).reshape(1, -1, 60)
        vimm = published.rssbs[0].vimms[0]
        return output, {
            "conv_first": features.shallow,
            "rssb0_vimm0_norm": vimm.norm(tokens),
            "rssb0_vimm0": vimm(tokens),
            **{f"rssb{i}": x for i, x in enumerate(features.rssbs)},
            "conv_after_body": features.body,
        }

    output, activations = run(image)
    assert np.abs(output[0] - expected["sr"]).max() < 1e-5
    assert activations.keys() == set(expected.files) - {"lr_uint8", "sr"}
    for name, actual in activations.items():
        target = expected[name]
        difference = np.abs(np.asarray(actual).reshape(target.shape) - target).max()
        assert difference < 1e-4 * np.abs(target).max(), name


def test_published_weights_survive_conversion(published, shared, tmp_path):
    target = tmp_path / "out" / "converted.safetensors"
    convert(shared / "reference" / "team07_DVMSR.pth", target)
    converted = named_parameters(load_model(target))
    for name, value in named_parameters(published).items():
        np.testing.assert_array_equal(converted[name], value)


# Our own files.


@pytest.fixture
def tiny(tmp_path):
    model = DVMSR(TINY, rngs=nnx.Rngs(0))
    path = tmp_path / "tiny.safetensors"
    save_safetensors(model, path)
    return model, path


def test_safetensors_round_trip(tiny):
    model, path = tiny
    loaded = load_model(path)
    assert loaded.config == TINY
    for name, value in named_parameters(model).items():
        np.testing.assert_array_equal(named_parameters(loaded)[name], value)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_safetensors_without_configuration_are_refused(tiny):
    _, path = tiny
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path)
    with pytest.raises(PretrainedError, match=r"tiny\.safetensors: has no DVMSR configuration"):
        load_model(path)


def test_paths_that_hold_no_weights(tiny, tmp_path):
    _, path = tiny
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "notes.txt").write_text("weights")
    (tmp_path / "folder").mkdir()
    for name in ("tiny.safetensors", "missing.pth", "notes.txt", "folder"):
        with pytest.raises(UserError, match=name):
            load_model(tmp_path / name)


def test_convert_overwrites_nothing(tiny, tmp_path):
    _, path = tiny
    before = path.read_bytes()
    with pytest.raises(PretrainedError, match="already exists"):
        convert(path, path)
    with pytest.raises(PretrainedError, match=r"must end in \.safetensors"):
        convert(path, tmp_path / "out.pth")
    assert path.read_bytes() == before


def test_conversion_command(tiny, tmp_path):
    _, path = tiny

    def run(*arguments):
        command = [sys.executable, "-m", "dvmsr_jax", "convert", *map(str, arguments)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = run(path, tmp_path / "copy.safetensors")
    assert done.returncode == 0, done.stderr
    assert load_model(tmp_path / "copy.safetensors").config == TINY
    assert training_facts(tmp_path / "copy.safetensors") is None
    failed = run(tmp_path / "missing.pth", tmp_path / "new.safetensors")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "missing.pth: no such file" in failed.stderr
    assert "Traceback" not in failed.stderr

"""Targets computed beforehand are the teacher's outputs, whatever interrupted their making."""

import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax import data, images, inference
from dvmsr_jax.config import DataConfig, ModelConfig
from dvmsr_jax.data import targets
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR, named_parameters
from dvmsr_jax.pretrained import load_model, save_safetensors

TEACHER = ModelConfig(channels=4, rssbs=1, vimms_per_rssb=1, states=2)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Five sub-images for training."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(6):
        images.write_png(folder / f"{i}.png", rng.integers(0, 256, (40, 40, 3), np.uint8))
    config = DataConfig(hr_dirs=(folder,), data_dir=folder / "data", val_images=1)
    return data.load_records(config, 4)


@pytest.fixture
def teacher(tmp_path, request):
    """Other weights in every test, whose targets then lie apart."""
    path = tmp_path / "teacher.safetensors"
    seed = zlib.crc32(request.node.name.encode())
    save_safetensors(DVMSR(TEACHER, rngs=nnx.Rngs(seed)), path)
    return path


def id_of(teacher):
    model = load_model(teacher)
    return data.teacher_id(model.config, named_parameters(model))


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_targets_are_the_teachers_outputs(records, teacher, self_ensemble, monkeypatch):
    monkeypatch.setattr(targets, "PER_SHARD", 3)
    # Batches of 2, the last of each file padded.
    targets.distill(teacher, records.folder, self_ensemble=self_ensemble, batch_size=2)
    found = data.load_targets(records.folder, id_of(teacher), self_ensemble=self_ensemble)
    assert len(found) == len(records.train) == 5
    model = nnx.jit(load_model(teacher))
    for record, target in zip(records.train, found, strict=True):
        lr = jnp.asarray(record["lr"][None], jnp.float32) / 255
        output = inference.average_over_symmetries(model, lr) if self_ensemble else model(lr)
        exact = np.asarray(output[0])
        assert np.abs(target - 255 * np.clip(exact, 0, 1)).max() <= 0.5 + 1e-3
        assert np.mean(target == images.to_uint8(exact)) > 0.999


def test_interrupted_distillation_ends_with_the_same_bytes(records, teacher, monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "PER_SHARD", 2)
    make, calls = targets._make_upscaler, []

    def interrupted(*arguments):
        upscale = make(*arguments)

        def run(batches):
            for output in upscale(batches):
                calls.append(len(output))
                if len(calls) == 2:
                    raise KeyboardInterrupt
                yield output

        return run

    def distill():
        path = targets.distill(teacher, records.folder, self_ensemble=False, batch_size=2)
        return path, {file.name: file.read_bytes() for file in path.iterdir()}

    path, whole = distill()
    assert len(whole) == 3
    for file in path.iterdir():
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(targets, "_make_upscaler", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill()
        assert [file.name for file in path.iterdir()] == ["00000.npy"]
        with pytest.raises(
            UserError, match=r"1 of the 3 files .*\n  python -m dvmsr_jax\.data dis"
        ):
            data.load_targets(records.folder, id_of(teacher), self_ensemble=False)
        assert distill()[1] == whole
        assert calls == [2, 2, 2, 1]  # the first file was not made again


def test_missing_targets_name_the_command(records):
    with pytest.raises(UserError, match=f"--data {records.folder} --self-ensemble"):
        data.load_targets(records.folder, "0123456789ab", self_ensemble=True)


def test_damaged_targets_are_named(records, teacher):
    path = targets.distill(teacher, records.folder, self_ensemble=False, batch_size=8)
    shard = path / "00000.npy"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"00000\.npy: is damaged"):
        data.load_targets(records.folder, id_of(teacher), self_ensemble=False)


def test_another_scale_is_refused(records, tmp_path):
    path = tmp_path / "x2.safetensors"
    save_safetensors(DVMSR(ModelConfig(scale=2, channels=4, rssbs=1), rngs=nnx.Rngs(0)), path)
    with pytest.raises(UserError, match=r"teacher for x2, .* prepared for x4"):
        targets.distill(path, records.folder, self_ensemble=False, batch_size=2)


def test_other_weights_are_another_teacher():
    parameters = named_parameters(DVMSR(TEACHER, rngs=nnx.Rngs(0)))
    first = data.teacher_id(TEACHER, parameters)
    assert first == data.teacher_id(TEACHER, dict(reversed(parameters.items())))
    assert first != data.teacher_id(TEACHER, parameters | {"conv_last.bias": jnp.ones(4)})

"""Precomputed targets equal the teacher's outputs, even after interruptions."""

import io
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax import data, images, rgb
from dvmsr_jax.config import DataConfig, ModelConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR, Weights, named_parameters
from dvmsr_jax.pretrained import load_model, save_safetensors
from dvmsr_jax.training import targets

ROOT = Path(__file__).resolve().parents[1]
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
    """Different weights in every test, and thus a separate folder of targets."""
    path = tmp_path / "teacher.safetensors"
    seed = zlib.crc32(request.node.name.encode())
    save_safetensors(DVMSR(TEACHER, rngs=nnx.Rngs(seed)), path)
    return path


def id_of(teacher):
    model = load_model(teacher)
    return Weights.of(model).identity()


def load(records, teacher, self_ensemble=False):
    return targets.load_targets(
        records.folder, id_of(teacher), self_ensemble=self_ensemble, ckpt=teacher
    )


def problems_of(path):
    """The problems that `check` finds in this folder of targets, not in those of other tests."""
    return [line for line in targets.find_problems(path.parents[1]) if str(path) in line]


def unfinished_of(path):
    return [line for line in targets.find_unfinished(path.parents[1]) if str(path) in line]


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_targets_are_the_teachers_outputs(records, teacher, self_ensemble, monkeypatch):
    monkeypatch.setattr(targets, "PER_SHARD", 3)
    # Batches of 2, the last of each file padded.
    targets.distill(teacher, records.folder, self_ensemble=self_ensemble, batch_size=2)
    found = load(records, teacher, self_ensemble)
    assert len(found) == len(records.train) == 5
    model = nnx.jit(load_model(teacher))
    for record, target in zip(records.train, found, strict=True):
        lr = jnp.asarray(record["lr"][None], jnp.float32) / 255
        output = rgb.average_over_symmetries(model, lr) if self_ensemble else model(lr)
        exact = np.asarray(output[0])
        assert np.abs(target - 255 * np.clip(exact, 0, 1)).max() <= 0.5 + 1e-3
        assert np.mean(target == np.rint(np.clip(exact, 0, 1) * 255)) > 0.999


def test_interrupted_distillation_ends_with_the_same_bytes(records, teacher, monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "PER_SHARD", 2)
    make, calls = targets._make_teacher, []

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
    assert whole.keys() == {"00000.npy", "00001.npy", "00002.npy", "targets.json"}
    for file in path.iterdir():
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(targets, "_make_teacher", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill()
        assert {file.name for file in path.iterdir()} == {"00000.npy", "targets.json"}
        command = f"distill --ckpt {teacher} --data {records.folder}"
        with pytest.raises(UserError, match=rf"1 of the 3 files .*\n.* {command}$"):
            load(records, teacher)
        (line,) = unfinished_of(path)
        assert line.startswith(f"{path}: 1 of the 3 files")
        assert line.endswith(command)
        assert problems_of(path) == []
        assert distill()[1] == whole
        assert calls == [2, 2, 2, 1]  # the first file was not made again
        assert unfinished_of(path) == problems_of(path) == []


def test_missing_targets_name_the_command(records, teacher):
    command = f"--ckpt {teacher} --data {records.folder} --self-ensemble"
    with pytest.raises(UserError, match=rf"0 of the 1 files .*\n.*{command}"):
        load(records, teacher, self_ensemble=True)


def flip_a_bit(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def fewer_rows(content):
    file = io.BytesIO()
    np.save(file, np.load(io.BytesIO(content))[1:])
    return file.getvalue()


@pytest.mark.parametrize(
    ("damage", "problem", "loads"),
    [
        (lambda content: content[:1000], "is damaged", False),
        (lambda content: b"", "is damaged", False),
        (fewer_rows, r"holds uint8 \(4, .*expected uint8 \(5, ", False),
        (flip_a_bit, "its checksum differs", True),
    ],
)
def test_damaged_targets_are_named_and_recomputed(records, teacher, damage, problem, loads):
    def distill():
        return targets.distill(teacher, records.folder, self_ensemble=False, batch_size=8)

    path = distill()
    shard = path / "00000.npy"
    content = shard.read_bytes()
    shard.write_bytes(damage(content))
    if not loads:
        with pytest.raises(UserError, match=rf"00000\.npy: .*{problem}"):
            load(records, teacher)
    (line,) = problems_of(path)
    assert re.search(rf"00000\.npy: .*{problem}.*; remove it and distil again", line)
    shard.unlink()
    distill()
    assert shard.read_bytes() == content
    assert problems_of(path) == []


def test_targets_without_a_checksum_get_one(records, teacher):
    path = targets.distill(teacher, records.folder, self_ensemble=False, batch_size=8)
    (path / "targets.json").unlink()
    (line,) = problems_of(path)
    assert "has no checksum" in line
    targets.distill(teacher, records.folder, self_ensemble=False, batch_size=8)
    assert problems_of(path) == []


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "nothing",
        '{"ckpt": 1, "sha256": {}}',
        '{"ckpt": "a", "sha256": null}',
        '{"ckpt": "a", "sha256": {"00000.npy": 1}}',
        "[" * 100_000,
    ],
)
def test_another_description_is_refused(records, teacher, text):
    path = targets.distill(teacher, records.folder, self_ensemble=False, batch_size=8)
    description = (path / "targets.json").read_text()
    (path / "targets.json").write_text(text)
    message = re.escape(f"{path / 'targets.json'}: is damaged (")
    try:
        for use in (targets.find_problems, targets.find_unfinished):
            with pytest.raises(UserError, match=message):
                use(records.folder)
        with pytest.raises(UserError, match=message):
            targets.distill(teacher, records.folder, self_ensemble=False, batch_size=8)
    finally:
        (path / "targets.json").write_text(description)


def test_devices_change_no_target(records, teacher):
    """Compares one device with two, in another process, where a batch of three becomes four."""
    path = targets.distill(teacher, records.folder, self_ensemble=False, batch_size=4)
    one = np.load(path / "00000.npy")
    (path / "00000.npy").unlink()
    program = f"""
import jax
from pathlib import Path
from dvmsr_jax.training.targets import distill
assert jax.device_count() == 2
distill(Path({str(teacher)!r}), Path({str(records.folder)!r}), self_ensemble=False, batch_size=3)
"""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        check=True,
    )
    two = np.load(path / "00000.npy")
    assert np.abs(one.astype(int) - two).max() <= 1
    assert np.mean(one == two) > 0.999


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_are_not_empty(records, teacher, batch_size):
    with pytest.raises(UserError, match=f"batch_size is {batch_size}, expected at least 1"):
        targets.distill(teacher, records.folder, self_ensemble=False, batch_size=batch_size)


def test_another_scale_is_refused(records, tmp_path):
    path = tmp_path / "x2.safetensors"
    save_safetensors(DVMSR(ModelConfig(scale=2, channels=4, rssbs=1), rngs=nnx.Rngs(0)), path)
    with pytest.raises(UserError, match=r"teacher for x2, .* prepared for x4"):
        targets.distill(path, records.folder, self_ensemble=False, batch_size=2)


def test_other_weights_are_another_teacher():
    parameters = named_parameters(DVMSR(TEACHER, rngs=nnx.Rngs(0)))
    first = Weights(TEACHER, parameters).identity()
    assert first == Weights(TEACHER, dict(reversed(parameters.items()))).identity()
    other = parameters | {"conv_last.bias": jnp.ones(4)}
    assert first != Weights(TEACHER, other).identity()

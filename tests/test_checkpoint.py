"""Checkpoints are restored exactly, on any number of devices, and damaged ones are refused."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dvmsr_jax import checkpoint
from dvmsr_jax.checkpoint import (
    Best,
    CheckpointError,
    Checkpoints,
    load_facts,
    load_weights,
    read_arrays,
)
from dvmsr_jax.config import Compute, Effect, ModelConfig, TrainConfig, effects
from dvmsr_jax.model import parameter_shapes
from dvmsr_jax.pretrained import PretrainedError, load_model

MODEL = ModelConfig(channels=4, rssbs=1, vimms_per_rssb=1, states=2)
WEIGHTS = {
    name: np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for name, shape in parameter_shapes(MODEL).items()
}
STATE = {"step": np.int32(7), "mean": WEIGHTS["conv_first.bias"]}
# The best validation up to each step.
BESTS = [Best(0, -1.0), Best(1, 20.0), Best(9, 21.0)]


def save(config, *steps):
    checkpoints = Checkpoints(config)
    for step in steps:
        as_jax = {name: jnp.asarray(x) for name, x in WEIGHTS.items()}
        state = {name: jnp.asarray(x) for name, x in STATE.items()}
        checkpoints.save(step, max(b for b in BESTS if b.step <= step), as_jax, state)
    checkpoints.close()
    return checkpoints.directory


def restore(config):
    checkpoints = Checkpoints(config)
    try:
        return checkpoints.restore(
            {name: jnp.zeros_like(x) for name, x in WEIGHTS.items()},
            {name: jnp.zeros_like(x) for name, x in STATE.items()},
        )
    finally:
        checkpoints.close()


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def assert_weights(found):
    assert found.keys() == WEIGHTS.keys()
    for name, x in WEIGHTS.items():
        np.testing.assert_array_equal(found[name], x)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(workdir=tmp_path / "run", model=MODEL)


def test_the_newest_are_kept_and_restored(config):
    config = dataclasses.replace(config, keep_checkpoints=2)
    assert restore(config) is None
    directory = save(config, 1, 2, 3)
    assert sorted(step.name for step in directory.iterdir()) == ["1", "2", "3"]  # 1 is the best
    step, best, ema, state = restore(config)
    assert step == 3
    assert best == Best(1, 20.0)
    assert_weights(ema)
    assert int(state["step"]) == 7
    np.testing.assert_array_equal(state["mean"], STATE["mean"])
    save(config, 4, 9, 10, 11)
    assert sorted(int(step.name) for step in directory.iterdir()) == [9, 10, 11]


def test_weights_saved_from_more_devices(tmp_path, config):
    program = f"""
import jax
from pathlib import Path
from dvmsr_jax import parallel
from dvmsr_jax.checkpoint import Best, Checkpoints
from dvmsr_jax.config import TrainConfig
mesh = parallel.make_mesh(3)
assert mesh.size == 3
weights = {{"a": jax.numpy.arange(12.0), "b": jax.numpy.ones((3, 4))}}
checkpoints = Checkpoints(TrainConfig(workdir=Path({str(tmp_path)!r})))
replicated = parallel.replicate(weights, mesh)
checkpoints.save(1, Best(), replicated, replicated)
checkpoints.close()
"""
    flags = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
        "PYTHONPATH": os.getcwd(),
    }
    subprocess.run([sys.executable, "-c", program], env=flags, check=True)
    weights = read_arrays(tmp_path / "student/checkpoints/1/ema")
    np.testing.assert_array_equal(weights["a"], np.arange(12))
    np.testing.assert_array_equal(weights["b"], np.ones((3, 4)))

    checkpoints = Checkpoints(TrainConfig(workdir=tmp_path))
    empty = {"a": jnp.zeros(12), "b": jnp.zeros((3, 4))}
    _, _, ema, state = checkpoints.restore(empty, empty)
    checkpoints.close()
    np.testing.assert_array_equal(ema["a"], np.arange(12))
    np.testing.assert_array_equal(state["a"], np.arange(12))


def test_any_damaged_file(tmp_path, config):
    """With any file missing, cut or changed: an error names it, or the weights are intact."""
    directory = save(config, 7)
    whole = tmp_path / "whole"
    shutil.copytree(directory, whole)
    messages = []
    files = [f for f in sorted((whole / "7").rglob("*")) if f.is_file() and "/state/" not in str(f)]
    for file in files:
        contents = file.read_bytes()
        flipped = bytearray(contents)
        flipped[len(flipped) // 2 :][:1] = b"\xff"
        for damaged in (
            None,
            b"",
            contents[: len(contents) // 2],
            bytes(len(contents)),
            b"{}",
            bytes(flipped),
        ):
            shutil.rmtree(directory)
            shutil.copytree(whole, directory)
            path = directory / file.relative_to(whole)
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            try:
                weights = load_weights(config.workdir / "student")
            except CheckpointError as error:
                messages.append(str(error))
            else:
                assert weights.config == config.model
                assert_weights(weights.parameters)
    assert len(messages) > len(files)
    assert all(message.startswith(f"{directory / '7'}: cannot be read (") for message in messages)
    assert all("\n" not in message for message in messages)


def flipped(contents, position):
    contents = bytearray(contents)
    contents[position] ^= 1 << position % 8
    return bytes(contents)


def test_flipped_bits(tmp_path, config, capfd):
    """In any file: a one-line error, or the original weights."""
    directory = save(config, 7)
    whole = tmp_path / "whole"
    shutil.copytree(directory, whole)
    messages = []
    tried = 0
    for file in sorted(path for path in whole.rglob("*") if path.is_file()):
        contents = file.read_bytes()
        # Orbax's own metadata, which is not used here; Orbax logs errors in it.
        if file.name != "_CHECKPOINT_METADATA":
            for position in range(0, len(contents), max(len(contents) // 5, 1)):
                shutil.rmtree(directory)
                shutil.copytree(whole, directory)
                (directory / file.relative_to(whole)).write_bytes(flipped(contents, position))
                tried += 1
                try:
                    step, best, ema, state = restore(config)
                except CheckpointError as error:
                    messages.append(str(error))
                else:
                    assert (step, best) == (7, Best(1, 20.0))
                    assert_weights(ema)
                    assert int(state["step"]) == 7
                    np.testing.assert_array_equal(state["mean"], STATE["mean"])
                try:
                    assert_weights(load_weights(directory).parameters)
                except CheckpointError as error:
                    messages.append(str(error))
    assert len(messages) > tried
    assert all(message.startswith(f"{directory / '7'}: cannot be read (") for message in messages)
    assert all("\n" not in message for message in messages)
    assert capfd.readouterr().err == ""


def test_a_flipped_bit_is_passed_over(config, capfd):
    directory = save(config, 6, 7)
    arrays = (directory / "7" / "state").glob("ocdbt.process_0/d/*")
    largest = max(arrays, key=lambda path: path.stat().st_size)
    largest.write_bytes(flipped(largest.read_bytes(), largest.stat().st_size // 2))
    assert restore(config).step == 6
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(rf"warning: {directory}/7: cannot be read \(.* state/.* is damaged", line)


def test_checkpoints_of_versions_without_checksums(config):
    directory = save(config, 7)
    (directory / "7" / checkpoint.CHECKSUMS).unlink()
    assert restore(config).step == 7
    assert_weights(load_weights(directory).parameters)
    manifest = directory / "7" / "ema" / "manifest.ocdbt"
    manifest.write_bytes(flipped(manifest.read_bytes(), 40))
    with pytest.raises(CheckpointError, match="checksum verification failed") as caught:
        load_weights(directory)
    assert "tensorstore_spec" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("item", ["ema", "state"])
def test_numbers_that_are_not_finite(config, item, value, capsys):
    items = {"ema": WEIGHTS, "state": STATE}
    checkpoints = Checkpoints(config)
    for step in (6, 7):
        if step == 7:
            name = {"ema": "conv_first.bias", "state": "mean"}[item]
            items[item] = items[item] | {name: np.full(4, value, np.float32)}
        arrays = {name: {k: jnp.asarray(x) for k, x in x.items()} for name, x in items.items()}
        checkpoints.save(step, Best(), **arrays)
    checkpoints.close()
    assert restore(config).step == 6
    assert "holds numbers that are not finite" in capsys.readouterr().err


LOADING = """
import resource, sys
from pathlib import Path
from dvmsr_jax.checkpoint import CheckpointError, load_facts, load_weights
resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
for path in map(Path, sys.argv[1:]):
    for load in (load_facts, load_weights):
        try:
            load(path)
            problem = "none"
        except CheckpointError as error:
            problem = str(error)
    print(problem)
"""


def test_only_regular_files_are_read(tmp_path, config):
    """Devices and pipes may never end. In a process of its own, to limit time and memory."""
    whole = save(config, 7) / "7"
    expected = {}

    def copy():
        folder = tmp_path / f"copy{len(expected)}"
        shutil.copytree(whole, folder)
        return folder

    for name in ("config/metadata", "ema/manifest.ocdbt", checkpoint.CHECKSUMS):
        for replace in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
            folder = copy()
            (folder / name).unlink()
            replace(folder / name)
            expected[folder] = f"{folder / name}: not a regular file"
    folder = copy()
    (folder / "ema" / "more").symlink_to("/proc")
    expected[folder] = f"{folder / 'ema' / 'more'}: is a link to a folder"

    done = subprocess.run(
        [sys.executable, "-c", LOADING, *map(str, expected)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    for (path, problem), line in zip(expected.items(), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{path}: cannot be read (")
        assert problem in line


@pytest.mark.parametrize("item", ["config", "best", "ema", "state"])
def test_damaged_checkpoints_are_passed_over(config, item, capsys):
    """The run resumes from the one before, with a warning; if there is none, it is an error."""

    def damage(step):
        for path in (directory / step / item).rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:-9])

    directory = save(config, 6, 7, 8)
    damage("7")
    damage("8")
    step, _, ema, state = restore(config)
    assert step == 6
    assert_weights(ema)
    assert int(state["step"]) == 7
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    for warning, step in zip(warnings, "87", strict=True):
        path = re.escape(str(directory / step))
        assert re.match(f"warning: {path}: cannot be read .*it is now {path}.damaged", warning)
    save(config, 7, 8)  # the resumed run can save under the same names
    assert restore(config).step == 8
    kept = sorted(path.name for path in directory.iterdir())
    assert kept == ["6", "7", "7.damaged", "8", "8.damaged"]

    damage("8")
    assert restore(config).step == 7
    assert (directory / "8.damaged-2").is_dir()
    save(config, 8)

    kept = sorted(path.name for path in directory.iterdir())
    for step in "678":
        damage(step)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(directory / '8'))}: cannot be"):
        restore(config)
    assert kept == sorted(path.name for path in directory.iterdir())


def test_fields_without_effect_may_differ(config):
    save(config, 7)
    changed = {
        "init": Path("weights.safetensors"),
        "init_partial": True,
        "compute": Compute(scan="sequential"),
        "log_every": 1,
        "val_every": 1,
        "checkpoint_every": 1,
        "keep_checkpoints": 1,
        "data": dataclasses.replace(
            config.data,
            hr_dirs=(Path("photos"),),
            dataset="df2k",
            max_unreadable=0.5,
            prepared=Path("records"),
            val_images=3,
            data_dir=Path("elsewhere"),
            workers=9,
            cache="device",
        ),
        "distill": dataclasses.replace(config.distill, teacher=Path("teacher")),
        "optim": dataclasses.replace(config.optim, accumulate=2),
        "remat": True,
    }
    step, _, ema, state = restore(dataclasses.replace(config, **changed))
    assert step == 7
    assert_weights(ema)
    assert int(state["step"]) == 7
    moved = config.workdir.rename(config.workdir.with_name("moved"))
    assert restore(dataclasses.replace(config, workdir=moved))[0] == 7
    default, other = (
        dict(leaves(checkpoint.to_json(c)))
        for c in (config, dataclasses.replace(config, **changed))
    )
    tried = {name for name, value in default.items() if other[name] != value}
    free = {name for name, effect in effects(TrainConfig()).items() if effect is Effect.NOTHING}
    assert tried | {"workdir"} == free


def test_damaged_arrays_without_checksums_fail_quietly(config):
    """No traceback of the reads that were under way when one of them failed."""
    directory = save(config, 7) / "7"
    (directory / checkpoint.CHECKSUMS).unlink()
    for path in (directory / "ema").rglob("d/*"):
        contents = np.frombuffer(path.read_bytes(), np.uint8).copy()
        contents[::97] ^= 255
        path.write_bytes(contents.tobytes())
    program = f"""
import time
from pathlib import Path
from dvmsr_jax.checkpoint import CheckpointError, load_weights
for _ in range(10):
    try:
        load_weights(Path({str(config.workdir / "student")!r}))
    except CheckpointError:
        print("refused")
    time.sleep(0.1)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=os.getcwd(), capture_output=True, text=True
    )
    assert result.stdout == "refused\n" * 10
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"steps": 9}, "  steps: 500000 there, 9 now"),
        ({"model": dataclasses.replace(MODEL, states=16)}, "  model.states: 2 there, 16 now"),
        ({"seed": 3}, "  seed: 0 there, 3 now"),
    ],
)
def test_other_fields_may_not(config, change, line):
    directory = save(config, 7)
    with pytest.raises(CheckpointError) as caught:
        restore(dataclasses.replace(config, **change))
    assert str(caught.value).splitlines()[:-1] == [
        f"{directory / '7'} was made with another configuration:",
        line,
    ]


def test_a_renamed_checkpoint_says_how_many_steps_it_took(tmp_path, config):
    shutil.copytree(save(config, 9) / "9", tmp_path / "best")
    assert load_facts(tmp_path / "best")["step"] == STATE["step"]
    (tmp_path / "copies").mkdir()
    shutil.copytree(tmp_path / "best", tmp_path / "copies" / "1000")
    assert load_facts(tmp_path / "copies")["step"] == STATE["step"]


def test_paths(tmp_path, config):
    teacher = save(dataclasses.replace(config, phase="teacher"), 1)
    with pytest.raises(
        CheckpointError, match=f"{config.workdir}: .*pass {config.workdir}/teacher$"
    ):
        load_weights(config.workdir)
    student = save(config, 9, 10, 11)
    with pytest.raises(CheckpointError, match=f"pass {student.parent} or {teacher.parent}$"):
        load_weights(config.workdir)
    for path in (student.parent, student, student / "11", student / "9"):
        assert_weights(load_weights(path).parameters)
    shutil.rmtree(student / "11" / "ema")  # "11" is the newest, though "9" sorts last as text
    with pytest.raises(CheckpointError, match=f"^{student}/11: cannot be read"):
        load_weights(student)
    with pytest.raises(PretrainedError, match=f"^{student}/11: cannot be read"):
        load_model(student.parent)

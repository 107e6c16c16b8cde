"""Runs that start from given weights."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx

from dvmsr_jax.checkpoint import CheckpointError, load_weights
from dvmsr_jax.commands import train
from dvmsr_jax.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from dvmsr_jax.errors import StoppedError, UserError
from dvmsr_jax.model import DVMSR, Weights, named_parameters
from dvmsr_jax.pretrained import convert, save_safetensors, training_facts
from dvmsr_jax.training import loop, losses, run, step
from dvmsr_jax.training.initial import load_initial
from dvmsr_jax.training.report import read_metrics
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("optax_promotes_dtypes")

MODEL = ModelConfig(channels=8, rssbs=2, vimms_per_rssb=1, states=4, drop_path=0.0)


@pytest.fixture
def given(tmp_path):
    """A file of weights."""
    path = tmp_path / "given.safetensors"
    save_safetensors(DVMSR(MODEL, rngs=nnx.Rngs(5)), path)
    return path


@pytest.fixture
def config(photos, tmp_path, given):
    return TrainConfig(
        phase="teacher",
        workdir=tmp_path / "run",
        init=given,
        model=MODEL,
        data=DataConfig(
            hr_dirs=(photos,),
            data_dir=photos.parent / "records",
            val_images=1,
            lr_crop=8,
            batch_size=2,
        ),
        optim=OptimConfig(learning_rate=1e-3),
        steps=4,
        log_every=1,
        val_every=2,
        checkpoint_every=1,
    )


def with_model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_the_same_network_starts_as_the_weights(config):
    expected = named_parameters(DVMSR(MODEL, rngs=nnx.Rngs(5)))
    state = run.Run(config).initial_state()
    assert_equal(state.params["model"], expected)
    assert_equal(state.ema, expected)


def test_the_average_keeps_the_weights(config):
    """From the first step with the configured decay, unlike after a random start."""
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, ema_decay=0.9))
    parts = run.Run(config)
    state = jax.device_get(parts.initial_state())
    after, _ = parts.make_step()(parts.initial_state(), next(parts.batches(0)))
    for name, before in state.ema.items():
        expected = 0.9 * before + 0.1 * after.params["model"][name]
        np.testing.assert_allclose(after.ema[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_another_scale_gets_a_new_last_convolution(config, capsys):
    config = with_model(config, scale=2)
    weights = Weights.of(DVMSR(MODEL, rngs=nnx.Rngs(5)))
    state = run.Run(config).initial_state()
    fresh = step.init_state(config, None)
    for name, x in state.ema.items():
        source = fresh.ema if name.startswith("reconstruct.") else weights.parameters
        np.testing.assert_array_equal(x, source[name], err_msg=name)
    loop.train(dataclasses.replace(config, steps=1))
    out = capsys.readouterr().out
    assert re.search(r"starting from given.safetensors: \d+ parameter arrays; new ones: ", out)
    assert re.search(r"new ones: reconstruct.(bias|kernel), reconstruct.(bias|kernel)\n", out)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"channels": 12}, "channels 8, not 12"),
        ({"rssbs": 3}, "rssbs 2, not 3"),
        ({"rssbs": 1, "states": 2}, "rssbs 2, not 1, states 4, not 2"),
        ({"scale": 2, "bidirectional": True}, "scale 4, not 2, bidirectional False, not True"),
    ],
)
def test_another_network_is_refused(config, change, difference):
    with pytest.raises(UserError) as error:
        run.Run(with_model(config, **change))
    message = str(error.value)
    assert str(config.init) in message
    assert difference in message
    assert "--init-partial" in message


def test_parts_of_another_network(config, capsys):
    config = dataclasses.replace(with_model(config, rssbs=3), init_partial=True)
    theirs = named_parameters(DVMSR(MODEL, rngs=nnx.Rngs(5)))
    fresh = step.init_state(config, None).ema
    state = run.Run(config).initial_state()
    new = {name for name in fresh if name not in theirs}
    assert new
    assert all(name.startswith("rssbs.2.") for name in new)
    assert_equal(state.ema, {n: theirs.get(n, fresh[n]) for n in fresh})
    loop.train(dataclasses.replace(config, steps=1))
    out = capsys.readouterr().out
    assert f"given.safetensors: {len(theirs)} parameter arrays; new ones: " in out
    assert set(re.findall(r"rssbs\.2\.[\w.]+", out)) == new


def test_nothing_fits(config):
    config = with_model(config, channels=12, states=3, conv_width=2)
    config = dataclasses.replace(config, init_partial=True)
    kept = {"scale": 2}  # whose last convolution has a bias of another length
    with pytest.raises(UserError, match="none of the parameters fit the network"):
        run.Run(with_model(config, **kept))


def test_partial_alone_is_refused(config):
    with pytest.raises(UserError, match="--init-partial is for --init only"):
        dataclasses.replace(config, init=None, init_partial=True)


def test_missing_weights(config, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file"):
        run.Run(dataclasses.replace(config, init=tmp_path / "nowhere"))


def test_resuming_is_exact(config, tmp_path):
    whole = loop.train(config)
    parted = dataclasses.replace(config, workdir=tmp_path / "parted")

    def stop_after_two(self, step, *_):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Trace, "step_done", stop_after_two)
        with pytest.raises(StoppedError):
            loop.train(parted)
    loop.train(parted)
    assert_equal(
        load_weights(tmp_path / "parted" / "teacher").parameters, load_weights(whole).parameters
    )


def test_the_start_belongs_to_the_run(config, tmp_path, given):
    loop.train(dataclasses.replace(config, steps=2))
    moved = given.rename(tmp_path / "moved.safetensors")
    config = dataclasses.replace(config, steps=2)
    loop.train(dataclasses.replace(config, init=moved))  # the same weights elsewhere
    other = tmp_path / "other.safetensors"
    save_safetensors(DVMSR(MODEL, rngs=nnx.Rngs(6)), other)
    for init in (other, None):
        with pytest.raises(CheckpointError, match=r"sources\.init: \w+ there, \w+ now"):
            loop.train(dataclasses.replace(config, init=init))


def test_a_random_start_does_not_resume_from_given_weights(config):
    """Even if an older version wrote its checkpoint, which does not record the start."""
    random = dataclasses.replace(config, init=None, steps=2)
    directory = loop.train(random)
    metadata = directory / "checkpoints" / "2" / "config" / "metadata"
    stored = json.loads(metadata.read_text())
    del stored["sources"]["init"], stored["init"]
    metadata.write_text(json.dumps(stored))
    (directory / "checkpoints" / "2" / "checksums.json").unlink()
    loop.train(random)
    with pytest.raises(CheckpointError, match=r"sources\.init: None there, \w+ now"):
        loop.train(dataclasses.replace(config, steps=2))


def test_lineage(config, tmp_path, given):
    """Three generations, in checkpoint and file."""
    identity = Weights.of(DVMSR(MODEL, rngs=nnx.Rngs(5))).identity()
    first = loop.train(dataclasses.replace(config, steps=1))
    facts = training_facts(first)
    assert facts["sources.init"] == identity
    assert facts["lineage"] == [{"file": "given.safetensors", "identity": identity}]

    convert(first, tmp_path / "second.safetensors")
    third = dataclasses.replace(
        config, init=tmp_path / "second.safetensors", workdir=tmp_path / "third", steps=1
    )
    convert(loop.train(third), tmp_path / "third.safetensors")
    with safetensors.safe_open(tmp_path / "third.safetensors", framework="numpy") as file:
        lineage = json.loads(file.metadata()["training"])["lineage"]
    assert [each["file"] for each in lineage] == ["given.safetensors", "second.safetensors"]
    assert lineage[0] == facts["lineage"][0]
    assert lineage[1]["identity"] == load_weights(first).identity()
    assert lineage[1]["step"] == 1
    assert lineage[1]["optim.learning_rate"] == config.optim.learning_rate
    assert "lineage" not in lineage[1]
    assert load_initial(third).identity == lineage[1]["identity"]


def test_validation_compares_with_the_start(config, capsys):
    directory = loop.train(config)
    lines = [x for x in read_metrics(directory / "metrics.jsonl") if "val_psnr_y" in x]
    assert len({line["val_start_psnr_y"] for line in lines}) == 1
    untrained = dataclasses.replace(
        config, workdir=config.workdir / "untrained", optim=OptimConfig(learning_rate=0.0)
    )
    kept = read_metrics(loop.train(untrained) / "metrics.jsonl")[-1]
    assert kept["val_psnr_y"] == pytest.approx(lines[0]["val_start_psnr_y"], abs=1e-5)
    output = "".join(capsys.readouterr())
    assert re.search(r"PSNR-Y .*\(bicubic [\d.]+, start [\d.]+\)", output)


def test_the_command_takes_the_network_from_the_weights(given):
    arguments = ["--phase=teacher", "--preset=finetune", "--init", str(given)]
    config = train.parse(arguments).config
    assert config.model == MODEL
    assert config.init == given
    assert config.loss.fft_weight == 0.05
    assert train.parse([*arguments, "--model.scale", "3"]).config.model.scale == 3
    assert train.parse([*arguments, "--model.rssbs", "7"]).config.model.rssbs == 7


def test_the_command_in_a_process_of_its_own(config, photos, tmp_path, given):
    """From a file, and from the checkpoints that this has written."""
    written = tmp_path / "runs"
    for init, workdir in ((given, written), (written / "teacher", tmp_path / "further")):
        options = {
            "--init": init,
            "--workdir": workdir,
            "--data.hr-dirs": photos,
            "--data.data-dir": config.data.data_dir,
            "--data.val-images": 1,
            "--data.lr-crop": 8,
            "--data.batch-size": 2,
            "--steps": 1,
        }
        command = [sys.executable, "train.py", "--phase=teacher", "--preset=finetune"]
        command += [str(part) for option in options.items() for part in option]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (workdir / "teacher" / "checkpoints" / "1").is_dir()


def test_fourier_loss_is_that_of_numpy():
    rng = np.random.default_rng(0)
    sr, hr = jnp.asarray(rng.random((2, 3, 8, 12, 3), np.float32))
    difference = np.fft.rfft2(np.asarray(sr, np.float64) - np.asarray(hr), axes=(1, 2))
    expected = np.abs(np.stack([difference.real, difference.imag])).mean()
    np.testing.assert_allclose(losses.fourier(sr, hr), expected, rtol=1e-6)
    assert losses.fourier(hr, hr) == 0


def test_pixel_losses():
    sr, hr = jnp.asarray([[0.5, 0.2, 0.7], [0.1, 0.2, 1.0]], jnp.float32)
    np.testing.assert_allclose(losses.l1(sr, hr), 0.7 / 3, rtol=1e-6)
    np.testing.assert_allclose(losses.l2(sr, hr), 0.25 / 3, rtol=1e-6)
    np.testing.assert_allclose(losses.charbonnier(sr, hr), 0.701 / 3, rtol=1e-4)


@pytest.mark.parametrize("pixel", ["charbonnier", "l2"])
def test_steps_minimise_the_configured_loss(config, pixel):
    config = dataclasses.replace(config, loss=LossConfig(pixel=pixel))
    parts = run.Run(config)
    batch = next(parts.batches(0))
    _, metrics = parts.make_step()(parts.initial_state(), batch)
    crops = {name: jnp.asarray(x, jnp.float32) / 255 for name, x in batch.items()}
    sr = DVMSR(MODEL, rngs=nnx.Rngs(5))(crops["lr"])
    expected = losses.PIXEL[pixel](sr, crops["hr"])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=5e-6)
    assert abs(losses.l1(sr, crops["hr"]) / expected - 1) > 2e-5


def test_the_loss_is_the_weighted_sum():
    rng = np.random.default_rng(0)
    shapes = {"lr": (2, 8, 8, 3), "hr": (2, 32, 32, 3)}
    batch = {n: jnp.asarray(rng.random(shape, np.float32)) for n, shape in shapes.items()}
    params = {"model": named_parameters(DVMSR(MODEL, rngs=nnx.Rngs(5))), "projections": {}}
    keys = jax.random.split(jax.random.key(0), 2)

    def loss(fft_weight):
        config = TrainConfig(phase="teacher", model=MODEL)
        config = dataclasses.replace(
            config, loss=dataclasses.replace(config.loss, fft_weight=fft_weight)
        )
        return step.loss_function(config, params, None, batch, keys)

    sr = Weights(MODEL, params["model"]).model()(batch["lr"])
    l1, fourier = losses.l1(sr, batch["hr"]), losses.fourier(sr, batch["hr"])
    plain, parts = loss(0.0)
    np.testing.assert_allclose(plain, l1, rtol=1e-6)
    assert "fft_loss" not in parts
    weighted, parts = loss(0.3)
    np.testing.assert_allclose(weighted, l1 + 0.3 * fourier, rtol=1e-5)
    np.testing.assert_allclose(parts["pixel_loss"], l1, rtol=1e-5)
    np.testing.assert_allclose(parts["fft_loss"], fourier, rtol=1e-5)

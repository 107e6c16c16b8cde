"""The training recipe, part by part: each test computes one of them in another way."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax import images, metrics, parallel
from dvmsr_jax.config import DataConfig, DistillConfig, ModelConfig, OptimConfig, TrainConfig
from dvmsr_jax.data import Records, load_records
from dvmsr_jax.errors import StoppedError
from dvmsr_jax.inference import make_upscaler
from dvmsr_jax.model import DVMSR, Weights, named_parameters
from dvmsr_jax.pretrained import load_model
from dvmsr_jax.training import loop, report, step
from dvmsr_jax.training.validation import Validator

pytestmark = pytest.mark.usefixtures("optax_promotes_dtypes")

SMALL = ModelConfig(channels=8, rssbs=2, vimms_per_rssb=1, states=4)


@pytest.fixture
def config():
    return TrainConfig(
        phase="teacher",
        model=SMALL,
        data=DataConfig(lr_crop=8, batch_size=2),
        optim=OptimConfig(learning_rate=5e-3),
        steps=100,
    )


@pytest.fixture
def run_config(config, tmp_path):
    """The configuration of a run on three pictures, one of them held out."""
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = rng.integers(0, 256, (24, 24, 3), np.uint8)
        images.write_png(tmp_path / "photos" / f"{i}.png", coarse.repeat(4, 0).repeat(4, 1))
    data = dataclasses.replace(
        config.data, hr_dirs=(tmp_path / "photos",), data_dir=tmp_path / "records", val_images=1
    )
    return dataclasses.replace(
        config,
        workdir=tmp_path / "run",
        data=data,
        steps=6,
        log_every=1,
        val_every=3,
        checkpoint_every=2,
        keep_checkpoints=1,
    )


@pytest.fixture
def batch():
    """Two crops, in 0 .. 255."""
    rng = np.random.default_rng(0)
    lr = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    return {"lr": lr, "hr": rng.integers(0, 256, (2, 32, 32, 3), np.uint8)}


def model(seed, config=SMALL):
    return DVMSR(config, rngs=nnx.Rngs(seed))


def take_steps(config, batch, count, teacher=None):
    """(the states before each step and after the last, the metrics of each)."""
    mesh = parallel.make_mesh(config.data.batch_size)
    state = parallel.replicate(step.init_state(config, teacher), mesh)
    train_step = step.TrainStep(config, mesh, teacher)
    states, logged = [jax.device_get(state)], []
    for _ in range(count):
        state, parts = train_step(state, parallel.shard_batch(batch, mesh))
        states.append(jax.device_get(state))
        logged.append(jax.device_get(parts))
    return states, logged


def test_adam_on_clipped_gradients():
    """The first gradient is above the limit and the second is not."""
    config = OptimConfig(learning_rate=0.1, b1=0.7, b2=0.8, clip=2.0)
    optimizer = step.make_optimizer(config, 100)
    gradients = [np.float32([30, -40, 0.5]), np.float32([-0.1, 0.2, 0.3])]
    state = optimizer.init(jnp.zeros(3))
    mean, square = np.zeros(3), np.zeros(3)
    for t, gradient in enumerate(gradients, 1):
        update, state = optimizer.update(jnp.asarray(gradient), state, jnp.zeros(3))
        clipped = gradient * min(1, 2.0 / np.linalg.norm(gradient))
        mean = 0.7 * mean + 0.3 * clipped
        square = 0.8 * square + 0.2 * clipped**2
        expected = -0.1 * (mean / (1 - 0.7**t)) / (np.sqrt(square / (1 - 0.8**t)) + 1e-8)
        np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_steps_clip_gradients(config, batch):
    """Gradients clipped far below Adam's epsilon change next to nothing."""
    clipped = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip=1e-12))
    moved = []
    for each in (config, clipped):
        (before, after), _ = take_steps(each, batch, 1)
        changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params, after.params)
        moved.append(max(jax.tree.leaves(changes)))
    assert moved[0] > 1e-3
    assert moved[1] < 1e-5


def test_average_has_the_configured_decay(config, batch):
    """Tested with one below the decays at the start of a run."""
    optim = dataclasses.replace(config.optim, ema_decay=0.05)
    (before, after), _ = take_steps(dataclasses.replace(config, optim=optim), batch, 1)
    for name, ema in after.ema.items():
        expected = 0.05 * before.ema[name] + 0.95 * after.params["model"][name]
        np.testing.assert_allclose(ema, expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_white_is_one(config, batch):
    """The step's loss is computed on crops divided by 255."""
    config = dataclasses.replace(config, model=dataclasses.replace(SMALL, drop_path=0.0))
    (before, _), (parts,) = take_steps(config, batch, 1)
    upscale = Weights(config.model, before.params["model"]).model()
    output = np.asarray(upscale(jnp.asarray(batch["lr"], jnp.float32) / 255))
    expected = np.abs(output - batch["hr"] / np.float32(255)).mean()
    np.testing.assert_allclose(parts["loss"], expected, rtol=1e-5)


def test_drop_path_differs_from_step_to_step(config, batch):
    """With constant weights, on the same batch."""
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(SMALL, drop_path=0.5),
        optim=dataclasses.replace(config.optim, learning_rate=0.0),
    )
    states, logged = take_steps(config, batch, 8)
    jax.tree.map(np.testing.assert_array_equal, states[0].params, states[-1].params)
    assert len({float(parts["loss"]) for parts in logged}) > 1


def test_online_self_ensemble(config, batch):
    """The target is the teacher's mean output over eight flips and rotations, undone."""
    config = dataclasses.replace(
        config,
        phase="student",
        model=dataclasses.replace(SMALL, drop_path=0.0),
        distill=DistillConfig(self_ensemble=True, weight=0.5),
    )
    teach = model(1)
    teacher = Weights.of(teach)
    crops = {name: jnp.asarray(x, jnp.float32) / 255 for name, x in batch.items()}
    params = {"model": named_parameters(model(0)), "projections": {}}
    keys = jax.random.split(jax.random.key(0))
    _, parts = step.loss_function(config, params, teacher, crops, keys)
    total = np.zeros(crops["hr"].shape, np.float32)
    for turns in range(4):
        for axes in ((), (1,)):
            seen = jnp.flip(jnp.rot90(crops["lr"], turns, (1, 2)), axes)
            total += jnp.rot90(jnp.flip(teach(seen), axes), -turns, (1, 2))
    output = model(0)(crops["lr"])
    expected = np.abs(output - total / 8).mean()
    np.testing.assert_allclose(parts["distill_loss"], expected, rtol=1e-4)
    plain = np.abs(output - teach(crops["lr"])).mean()
    assert abs(plain / expected - 1) > 1e-3  # the test can distinguish the two


def test_mid_level_projections_are_trained(config, batch):
    config = dataclasses.replace(config, phase="student", distill=DistillConfig(level="mid"))
    teacher = Weights.of(model(1))
    (before, after), _ = take_steps(config, batch, 1, teacher)
    for name, projection in before.params["projections"].items():
        moved = np.abs(after.params["projections"][name] - projection)
        assert moved.mean() > 1e-3, name  # the learning rate is 5e-3
    assert before.params["projections"].keys() == {"0", "1"}


def test_validation_scores_the_held_out_pictures(config):
    """The mean score, without a border of `scale` pixels on each side."""
    rng = np.random.default_rng(0)

    def records(count):
        # Smooth inside, with noise along the border, which must not affect the score.
        for _ in range(count):
            hr = np.full((32, 32, 3), 128, np.uint8) + rng.integers(0, 9, (32, 32, 3), np.uint8)
            hr[:4] = rng.integers(0, 256, (4, 32, 3), np.uint8)
            yield {"lr": hr[::4, ::4].copy(), "hr": hr, "name": b""}

    train, val = [*records(2)], [*records(3)]
    network = model(0)
    validate = Validator(config, Records(train, val, None), None)
    psnr_y, _ = validate(Weights.of(network))
    upscale = make_upscaler(network)
    expected = np.mean([metrics.psnr_y(upscale(r["lr"]), r["hr"], 4) for r in val])
    assert psnr_y == pytest.approx(expected, abs=1e-3)
    for others, border in ((train, 4), (val, 0)):  # mistakes that would be noticed
        wrong = np.mean([metrics.psnr_y(upscale(r["lr"]), r["hr"], border) for r in others])
        assert abs(wrong - expected) > 1e-2


def test_validation_uses_the_averaged_weights(run_config):
    directory = loop.train(run_config)
    lines = report.read_metrics(directory / "metrics.jsonl")
    (logged,) = [x["val_psnr_y"] for x in lines if x["step"] == 6 and "val_psnr_y" in x]
    validate = Validator(run_config, load_records(run_config.data, 4), None)
    averaged = load_model(directory / "checkpoints" / "6")  # the weights for evaluation
    assert logged == pytest.approx(validate(Weights.of(averaged))[0], abs=1e-4)


def test_logged_values_are_means(run_config, tmp_path):
    each, mean = (
        report.read_metrics(
            loop.train(dataclasses.replace(run_config, workdir=tmp_path / str(n), log_every=n))
            / "metrics.jsonl"
        )
        for n in (1, 3)
    )
    losses = [line["loss"] for line in each if "loss" in line]
    (logged,) = [line["loss"] for line in mean if line["step"] == 3 and "loss" in line]
    # The checkpoint at step 2 writes a line of the two steps before it.
    assert logged == pytest.approx(losses[2], rel=1e-6)
    (logged,) = [line["loss"] for line in mean if line["step"] == 2]
    assert logged == pytest.approx(np.mean(losses[:2]), rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_best_validation_is_kept(run_config, interrupted, monkeypatch, capsys):
    """Here, the first of two is the best, even after an interruption between them."""
    scores = {3: 30.0, 6: 20.0}
    monkeypatch.setattr(
        Validator,
        "__call__",
        lambda self, ema: (scores.pop(min(scores)), np.zeros((8, 8, 3), np.uint8)),
    )
    if interrupted:
        scalars = report.Log.scalars

        def spy(self, at, values):
            scalars(self, at, values)
            if at == 4 and "loss" in values:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(report.Log, "scalars", spy)
            with pytest.raises(StoppedError):
                loop.train(run_config)
    directory = loop.train(run_config)
    kept = {path.name for path in (directory / "checkpoints").iterdir()}
    assert kept == {"3", "6"}  # the newest one and the best
    assert "the best validation was 30.00 dB at step 3" in capsys.readouterr().out

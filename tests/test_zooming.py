"""Zoomed crops: their pixels, their losses, and that they depend on the seed and the step only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax import bicubic, data, parallel
from dvmsr_jax.config import (
    DataConfig,
    DistillConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
)
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR, Weights
from dvmsr_jax.training import step

pytestmark = pytest.mark.usefixtures("optax_promotes_dtypes")

SCALE = 4
ZOOMS = DataConfig(lr_crop=6, batch_size=12, zoom_in=0.3, zoom_out=0.2)
SMALL = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4, drop_path=0.0)


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (52, 52, 3), np.uint8) for _ in range(5)]
    return [{"lr": bicubic.downscale(hr, SCALE), "hr": hr} for hr in pictures]


def batches(records, config=ZOOMS, *, start=0, stop=4, shard=(0, 1)):
    span = {"seed": 1, "start": start, "stop": stop, "shard": shard}
    return list(data.batches(records, config, scale=SCALE, **span))


def crops(records, config):
    """The crops of many batches, each with its plan, and LR without flips and rotations."""
    span = {"seed": 1, "start": 0, "stop": 40}
    plans = list(data.plans(records, config, **span))
    for plan, batch in zip(plans, batches(records, config, stop=40), strict=True):
        for row in range(config.batch_size):
            crop = {name: x[row] for name, x in (plan | batch).items()}
            lr = crop["lr"][:, ::-1] if crop["symmetry"] >= 4 else crop["lr"]
            yield crop | {"upright": np.rot90(lr, -(crop["symmetry"] % 4))}


def positions(square, picture):
    """Where a square occurs in a picture."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, square.shape)[:, :, 0]
    return np.argwhere((windows == square).all((2, 3, 4))).tolist()


def test_crops_zoomed_in_on_are_parts_of_hr(records):
    """Everywhere in it, up to its borders."""
    config = dataclasses.replace(ZOOMS, zoom_in=0.4, zoom_out=0.0)
    zoomed = [crop for crop in crops(records, config) if crop["zoomed"]]
    found = []
    for crop in zoomed:
        (position,) = positions(crop["upright"], records[crop["index"]]["hr"])
        found.append(position)
    assert 0.35 < len(zoomed) / (40 * config.batch_size) < 0.45
    for offsets in zip(*found, strict=True):
        assert (min(offsets), max(offsets)) == (0, 52 - 6)
        assert len(set(offsets)) > 40
    assert {crop["symmetry"] for crop in zoomed} == set(range(8))


def test_crops_zoomed_out_are_whole_sub_images(records):
    config = dataclasses.replace(ZOOMS, zoom_in=0.0, zoom_out=0.3)
    zoomed = [crop for crop in crops(records, config) if crop["zoomed"]]
    for crop in zoomed:
        expected = bicubic.resize(records[crop["index"]]["lr"], 6, 6)
        np.testing.assert_array_equal(crop["upright"], expected)
    assert 0.25 < len(zoomed) / (40 * config.batch_size) < 0.35
    assert {crop["symmetry"] for crop in zoomed} == set(range(8))


def test_shares_of_both(records):
    kinds = [
        "none" if not x["zoomed"] else "in" if positions(x["upright"], records[x["index"]]["hr"])
        else "out"
        for x in crops(records, ZOOMS)
    ]  # fmt: skip
    for kind, share in {"in": 0.3, "out": 0.2, "none": 0.5}.items():
        assert abs(kinds.count(kind) / len(kinds) - share) < 0.06, kind


@pytest.mark.parametrize("degradation", ["clean", "real"])
def test_other_crops_stay_as_they_are(records, degradation):
    """Zoomed crops are not degraded."""
    plain = dataclasses.replace(ZOOMS, zoom_in=0.0, zoom_out=0.0, degradation=degradation)
    mixed = dataclasses.replace(ZOOMS, degradation=degradation)
    clean = batches(records)
    for a, b, c in zip(batches(records, plain), batches(records, mixed), clean, strict=True):
        assert a.keys() == {"lr", "hr"}
        assert 0 < b["zoomed"].sum() < 12
        np.testing.assert_array_equal(a["hr"], b["hr"])
        np.testing.assert_array_equal(a["lr"][~b["zoomed"]], b["lr"][~b["zoomed"]])
        np.testing.assert_array_equal(c["lr"][b["zoomed"]], b["lr"][b["zoomed"]])
        assert (a["lr"] != b["lr"])[b["zoomed"]].any((1, 2, 3)).all()


def test_batches_are_a_function_of_seed_and_step(records):
    """From any step, with any number of threads and processes."""
    whole = batches(records)
    resumed = batches(records, dataclasses.replace(ZOOMS, workers=0), start=1)
    shares = [batches(records, shard=(i, 3)) for i in range(3)]
    for i, batch in enumerate(whole):
        assert batch.keys() == {"lr", "hr", "zoomed"}
        for name, rows in batch.items():
            together = np.concatenate([share[i][name] for share in shares])
            np.testing.assert_array_equal(rows, together)
            if i >= 1:
                np.testing.assert_array_equal(rows, resumed[i - 1][name])
    assert len({batch["zoomed"].tobytes() for batch in whole}) == 4


def test_device_cache_gets_the_same_crops(records):
    host, device = (
        data.make_feed(records, dataclasses.replace(ZOOMS, cache=cache), scale=SCALE)
        for cache in ("none", "device")
    )
    cache = jax.device_put(device.load_cache())
    cut = jax.jit(device.crops)
    for shard in ((0, 1), (1, 2)):
        span = {"seed": 3, "start": 1, "stop": 4, "shard": shard}
        for batch, step_input in zip(host.inputs(**span), device.inputs(**span), strict=True):
            made = cut(cache, step_input)
            assert made.keys() == batch.keys()
            for name in batch:
                np.testing.assert_array_equal(made[name], batch[name])


# The step


def student(**changes):
    config = TrainConfig(model=SMALL, data=ZOOMS, loss=LossConfig(fft_weight=0.1), steps=10)
    return dataclasses.replace(config, **changes)


def model(seed):
    return DVMSR(SMALL, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize(("pixel", "self_ensemble"), [("l1", False), ("charbonnier", True)])
def test_zoomed_crops_are_distilled_only(records, pixel, self_ensemble):
    """The losses of each crop, computed by NumPy."""
    (batch,) = batches(records, stop=1)
    config = student(
        loss=LossConfig(pixel, fft_weight=0.1),
        distill=DistillConfig(weight=0.5, self_ensemble=self_ensemble),
    )
    mesh = parallel.make_mesh(12)
    teacher = Weights.of(model(1))
    state = parallel.replicate(step.init_state(config, teacher), mesh)
    lr = jnp.asarray(batch["lr"], jnp.float32) / 255
    output = np.asarray(Weights(SMALL, jax.device_get(state.params["model"])).model()(lr))
    turns = [(k, axes) for k in range(4) for axes in ((), (2,))] if self_ensemble else [(0, ())]
    target = np.zeros_like(output)
    for k, axes in turns:
        answer = np.asarray(model(1)(jnp.flip(jnp.rot90(lr, k, (1, 2)), axes)))
        target += np.rot90(np.flip(answer, axes), -k, (1, 2)) / len(turns)

    train_step = step.TrainStep(config, mesh, teacher)
    _, parts = train_step(state, parallel.shard_batch(batch, mesh))

    error = np.where(batch["zoomed"][:, None, None, None], 0, output - batch["hr"] / 255)
    form = {"l1": np.abs, "charbonnier": lambda x: np.sqrt(x**2 + 1e-6)}
    spectrum = np.fft.rfft2(error, axes=(1, 2))
    expected = {
        "pixel_loss": form[pixel](error).mean(),
        "fft_loss": (np.abs(spectrum.real).mean() + np.abs(spectrum.imag).mean()) / 2,
        "distill_loss": np.abs(output - target).mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, err_msg=name)
    total = expected["pixel_loss"] + 0.1 * expected["fft_loss"] + 0.5 * expected["distill_loss"]
    np.testing.assert_allclose(parts["loss"], total, rtol=1e-4)


def test_hr_of_zoomed_crops_does_not_matter(records):
    """Not even for gradients, nor if the batch is processed in parts with different shares."""
    (batch,) = batches(records, stop=1)
    other = batch["hr"].copy()
    other[batch["zoomed"]] = 255 - other[batch["zoomed"]]
    assert batch["zoomed"][:6].sum() != batch["zoomed"][6:].sum()
    mesh = parallel.make_mesh(12)
    teacher = Weights.of(model(1))
    results = []
    for hr, accumulate in ((batch["hr"], 1), (other, 1), (other, 2)):
        config = student()
        optim = dataclasses.replace(config.optim, accumulate=accumulate)
        config = dataclasses.replace(config, optim=optim)
        state = parallel.replicate(step.init_state(config, teacher), mesh)
        train_step = step.TrainStep(config, mesh, teacher)
        state, parts = train_step(state, parallel.shard_batch(batch | {"hr": hr}, mesh))
        results.append(jax.device_get((state.opt_state, parts)))
    jax.tree.map(np.testing.assert_array_equal, results[0], results[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), results[0], results[2]
    )


# Options


@pytest.mark.parametrize(
    "options", [{"phase": "teacher"}, {"distill": DistillConfig(targets="precomputed")}]
)
@pytest.mark.parametrize("zooms", [{"zoom_in": 0.1}, {"zoom_out": 0.1}])
def test_zooming_needs_an_online_teacher(options, zooms):
    with pytest.raises(UserError, match=r"for --phase=student with --distill\.targets=online only"):
        TrainConfig(data=DataConfig(**zooms), **options)


def test_shares_have_ranges():
    with pytest.raises(UserError, match=r"--data\.zoom-in is -0\.1, not within"):
        DataConfig(zoom_in=-0.1)
    with pytest.raises(UserError, match="their sum must be at most 1"):
        DataConfig(zoom_in=0.6, zoom_out=0.5)


def test_zooming_out_needs_smaller_crops(photos, tmp_path):
    config = DataConfig(hr_dirs=(photos,), data_dir=tmp_path, val_images=1, lr_crop=80)
    with pytest.raises(UserError, match=r"lr-crop must be less than their side of 80"):
        data.load_records(dataclasses.replace(config, zoom_out=0.1), SCALE)
    data.load_records(dataclasses.replace(config, zoom_in=0.1), SCALE)

"""Operations do what they claim, LR stays aligned with HR, and the key determines the result."""

import collections
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import jax
import numpy as np
import pytest
import scipy.ndimage
import skimage.data
from skimage.registration import phase_cross_correlation

from dvmsr_jax import bicubic, data
from dvmsr_jax.config import DataConfig, DistillConfig, TrainConfig
from dvmsr_jax.data import degradations
from dvmsr_jax.data.degradations import Level, Round, degrade, degrade_crop
from dvmsr_jax.errors import UserError

DEGRADING = ("mild", "real")


@pytest.fixture(scope="module")
def photo():
    """A photograph of 256x256 pixels."""
    return np.ascontiguousarray(skimage.data.astronaut()[100:356, 60:316])


@pytest.fixture(scope="module")
def records():
    """Photographs of 128x128 pixels with their bicubic LR, x4."""
    squares = skimage.data.astronaut().reshape(4, 128, 4, 128, 3).swapaxes(1, 2)
    return [{"lr": bicubic.downscale(hr, 4), "hr": hr} for hr in squares.reshape(-1, 128, 128, 3)]


@pytest.fixture
def only(monkeypatch):
    """only(**changes) makes "real" a single round with these fields, resized by bicubic."""

    def only(*, jpeg_last=0.0, **changes):
        off = {"blur": 0.0, "noise": 0.0, "jpeg": 0.0} | changes
        level = Level(1.0, (Round(**off),), jpeg_last=jpeg_last)
        monkeypatch.setitem(degradations.PRESETS, "real", (level,))
        monkeypatch.setattr(degradations, "RESIZINGS", ("bicubic",))

    return only


def changed(levels, **changes):
    """The levels, with these fields set in all rounds."""
    return tuple(
        dataclasses.replace(
            level, rounds=tuple(dataclasses.replace(step, **changes) for step in level.rounds)
        )
        for level in levels
    )


def apart(a, b):
    """Root mean square difference."""
    return np.sqrt(np.mean((a.astype(float) - b.astype(float)) ** 2))


# The whole


@pytest.mark.parametrize("preset", degradations.PRESETS)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_presets_give_lr(preset, scale):
    levels = degradations.PRESETS[preset]
    assert sum(level.share for level in levels) == pytest.approx(1)
    for step in (step for level in levels for step in level.rounds):
        assert sum(step.shapes) == pytest.approx(1)
        assert sum(step.up_down_keep) == pytest.approx(1)
    hr = np.random.default_rng(0).integers(0, 256, (11 * scale, 7 * scale, 3), np.uint8)
    for key in range(20):  # however small
        lr = degrade(hr, key, preset, scale)
        assert lr.dtype == np.uint8
        assert lr.shape == (11, 7, 3)


@pytest.mark.parametrize("preset", DEGRADING)
def test_the_key_determines_the_result(preset, photo):
    before = photo.copy()
    keys = range(30)
    first = [degrade(photo, key, preset, 4) for key in keys]
    np.random.seed(5)  # noqa: NPY002  nobody's randomness
    with ThreadPoolExecutor(4) as pool:
        second = list(pool.map(lambda key: degrade(photo, key, preset, 4), reversed(keys)))
    for a, b in zip(first, reversed(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({lr.tobytes() for lr in first}) > 20
    np.testing.assert_array_equal(photo, before)


def test_clean_is_bicubic(photo):
    np.testing.assert_array_equal(degrade(photo, 3, "clean", 4), bicubic.downscale(photo, 4))


def test_levels_of_damage(photo):
    """Some results of "mild" are clean, and the others better than the worst of "real"."""
    clean = bicubic.downscale(photo, 4)
    mild, real = (
        [apart(degrade(photo, key, preset, 4), clean) for key in range(120)] for preset in DEGRADING
    )
    assert 4 < sum(damage == 0 for damage in mild) < 24  # a tenth
    assert np.mean(mild) < np.mean(real)
    assert max(mild) < np.percentile(real, 95)


@pytest.mark.parametrize("to_lr", [False, True])
def test_no_strength_is_no_degradation(only, photo, to_lr):
    """Except for MATLAB's rounding between the two passes."""
    only(to_lr=to_lr)
    exact = bicubic.resize(photo.astype(float), 64, 64).clip(0, 255)
    assert np.abs(degrade(photo, 0, "real", 4) - exact).max() < 0.501


def test_single_flaws(monkeypatch, photo):
    """In "mild", one flaw alone is as frequent as its probability implies."""
    flaws = set()

    def spy(name, flaw):
        function = getattr(degradations, name)

        def called(*arguments, **options):
            flaws.add(flaw)
            return function(*arguments, **options)

        monkeypatch.setattr(degradations, name, called)

    for name, flaw in (("blur", "blur"), ("_add_random_noise", "noise"), ("compress", "jpeg")):
        spy(name, flaw)
    count, found = 400, collections.Counter()
    for key in range(count):
        flaws.clear()
        degrade(photo[:64, :64], key, "mild", 4)
        found[frozenset(flaws)] += 1
    blur, noise, jpeg = 1 - 0.5 * 0.65, 0.7, 0.65  # in the half with several steps
    expected = {
        frozenset(): 0.1 + 0.5 * (1 - blur) * (1 - noise) * (1 - jpeg),
        frozenset({"blur"}): 0.1 + 0.5 * blur * (1 - noise) * (1 - jpeg),
        frozenset({"noise"}): 0.15 + 0.5 * (1 - blur) * noise * (1 - jpeg),
        frozenset({"jpeg"}): 0.15 + 0.5 * (1 - blur) * (1 - noise) * jpeg,
        frozenset({"blur", "noise", "jpeg"}): 0.5 * blur * noise * jpeg,
    }
    for combination, share in expected.items():
        error = 3 * np.sqrt(share * (1 - share) / count)
        assert found[combination] / count == pytest.approx(share, abs=error), combination


def test_every_step_happens(monkeypatch, photo):
    """In "real", each function is called as often as its probability implies."""
    calls = {}

    def spy(name, label):
        function = getattr(degradations, name)

        def called(*arguments, **options):
            key = (name, label(*arguments, **options))
            calls.setdefault(key, []).append((arguments, options))
            return function(*arguments, **options)

        monkeypatch.setattr(degradations, name, called)

    spy("blur_kernel", lambda shape, size, sigmas, *_: (shape, sigmas[0] == sigmas[1]))
    spy("sinc_kernel", lambda *_: "")
    spy("resize", lambda picture, height, width, kind: kind)
    for name in ("add_gaussian_noise", "add_poisson_noise"):
        spy(name, lambda *_, grey: grey)
    spy("compress", lambda *_, subsampled: subsampled)
    count = 400
    for key in range(count):
        degrade(photo[:64, :64], key, "real", 4)
    found = {name: len(each) / count for name, each in calls.items()}
    blurs = 0.6 + 0.4 * (0.9 + 0.8 * 0.9)
    full = 0.4 * (0.9 + 0.8 * 0.9)  # blurs of all shapes
    gaussian = {True: 0.6 * 0.65 + full * 0.45, False: 0.6 * 0.35 + full * 0.25}
    expected = {
        **{("blur_kernel", ("gaussian", equal)): share for equal, share in gaussian.items()},
        **{
            ("blur_kernel", (shape, equal)): full * share
            for shape in ("generalised", "plateau")
            for equal, share in ((True, 0.12), (False, 0.03))
        },
        ("sinc_kernel", ""): 0.4 * (0.1 + 0.08 + 0.8),
        **{("resize", kind): (0.6 * 2 + 0.4 * 3) / 3 for kind in degradations.RESIZINGS},
        **{
            (f"add_{kind}_noise", grey): 1.4 / 2 * share
            for kind in ("gaussian", "poisson")
            for grey, share in ((True, 0.4), (False, 0.6))
        },
        **{("compress", half): 1.4 * share for half, share in ((True, 0.75), (False, 0.25))},
    }
    assert sum(x for name, x in expected.items() if name[0] == "blur_kernel") == pytest.approx(
        blurs
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = 4 * np.sqrt(value / count)
        assert abs(found[name] - value) < error, name

    def each(name):
        return [call for (function, _), some in calls.items() if function == name for call in some]

    sigmas = [arguments[2][0] for arguments, _ in each("blur_kernel")]
    assert 0.2 <= min(sigmas) < 0.3 < 2.7 < max(sigmas) <= 3
    strengths = [arguments[2] for arguments, _ in each("add_gaussian_noise")]
    assert 1 <= min(strengths) < 2 < 27 < max(strengths) <= 30
    scales = [arguments[2] for arguments, _ in each("add_poisson_noise")]
    assert 0.05 <= min(scales) < 0.2 < 2.5 < max(scales) <= 3
    qualities = [arguments[1] for arguments, _ in each("compress")]
    assert 30 <= min(qualities) < 35 < 94 < max(qualities) <= 95
    heights = [arguments[1] for arguments, _ in each("resize")]
    assert 16 * 0.3 <= min(heights) < 16 < 64 < max(heights) <= 64 * 1.5


# Alignment


def edge_error(lr, expected):
    """How far the vertical edge from 64 to 192 is from where it should be, in LR pixels."""
    first = int(expected) - 20
    profile = lr.mean((0, 2))[first : first + 40]
    return first + ((192 - profile) / (192 - 64)).sum() - expected


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("preset", DEGRADING)
def test_an_edge_stays_where_it_is(preset, scale, axis, monkeypatch):
    """Without noise and JPEG to 0.1 pixels, for every key; with them, on average to a fifth."""
    at = 29 * scale + 1
    hr = np.full((64 * scale, 64 * scale, 3), 64, np.uint8)
    hr[:, at:] = 192

    def errors():
        turned = [degrade(hr.swapaxes(0, 1 - axis), key, preset, scale) for key in range(60)]
        return np.array([edge_error(lr.swapaxes(0, 1 - axis), at / scale) for lr in turned])

    assert abs(errors().mean()) < 0.06
    quiet = changed(degradations.PRESETS[preset], noise=0.0, jpeg=0.0)
    monkeypatch.setitem(degradations.PRESETS, preset, quiet)
    exact = errors()
    assert np.abs(exact).max() < 0.1
    assert abs(exact.mean()) < 0.01


def shift(a, b):
    """How many pixels b's content is below and to the right of a's, to a fiftieth of a pixel."""
    window = np.outer(np.hanning(len(a)), np.hanning(len(a)))
    a, b = ((x.mean(2) - x.mean()) * window for x in (a, b))
    return -phase_cross_correlation(a, b, upsample_factor=50, normalization=None)[0]


def test_shift_is_measured(photo):
    lr = bicubic.downscale(photo, 4)
    moved = bicubic.downscale(np.roll(photo, (1, -2), (0, 1)), 4)
    np.testing.assert_allclose(shift(lr, moved), (0.25, -0.5), atol=0.021)


@pytest.mark.parametrize("preset", DEGRADING)
def test_photographs_stay_where_they_are(preset, photo):
    clean = bicubic.downscale(photo, 4)
    shifts = np.array([shift(clean, degrade(photo, key, preset, 4)) for key in range(80)])
    assert np.abs(shifts.mean(0)).max() < 0.025
    assert np.percentile(np.abs(shifts), 90) < 0.1  # beyond: strong noise


# The steps


def moments(kernel):
    """The covariance matrix of a kernel, in (x, y)."""
    y, x = np.mgrid[: len(kernel), : len(kernel)] - len(kernel) // 2
    positions = np.stack([x, y]).reshape(2, -1)
    return (positions * kernel.ravel()) @ positions.T


@pytest.mark.parametrize(("sigmas", "angle"), [((1.5, 1.5), 0.0), ((2.5, 1.0), 0.0)])
@pytest.mark.parametrize("turn", [0.0, 0.7])
def test_gaussian_kernels_are_as_wide_as_they_say(sigmas, angle, turn):
    kernel = degradations.blur_kernel("gaussian", 21, sigmas, angle + turn)
    assert kernel.sum() == pytest.approx(1)
    c, s = np.cos(angle + turn), np.sin(angle + turn)
    turned = np.array([[c, -s], [s, c]])
    expected = turned @ np.diag(np.square(sigmas)) @ turned.T
    np.testing.assert_allclose(moments(kernel), expected, atol=0.02)


@pytest.mark.parametrize("shape", degradations.SHAPES)
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_shapes_of_kernels(shape, beta):
    """Normalised and symmetric, with the value of the formula at one standard deviation."""
    kernel = degradations.blur_kernel(shape, 21, (3.0, 2.0), beta=beta)
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1])
    centre, right, below = kernel[10, 10], kernel[10, 13], kernel[12, 10]
    fall = 0.5 if shape == "plateau" else np.exp(-0.5)
    assert right / centre == pytest.approx(fall)
    assert below / centre == pytest.approx(fall)
    if shape != "gaussian":  # at two, beta tells
        squared = 4**beta
        far = 1 / (1 + squared) if shape == "plateau" else np.exp(-squared / 2)
        assert kernel[14, 10] / centre == pytest.approx(far)


def test_sinc_kernels_cut_at_their_frequency():
    cutoff = np.pi / 2
    kernel = degradations.sinc_kernel(21, cutoff)
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1])
    assert kernel.min() < 0  # it rings
    response = np.abs(np.fft.rfft(kernel.sum(0), 256))  # of vertical edges
    frequency = np.arange(129) * 2 * np.pi / 256
    assert np.abs(response[frequency < 0.75 * cutoff] - 1).max() < 0.15
    assert response[frequency > 1.25 * cutoff].max() < 0.15


@pytest.mark.parametrize("shape", [(40, 33), (9, 50), (3, 2)])
def test_blur_is_a_convolution(shape):
    """Also of pictures that are smaller than the kernel."""
    rng = np.random.default_rng(0)
    picture = rng.uniform(0, 255, (*shape, 3)).astype(np.float32)
    kernel = degradations.blur_kernel("generalised", 15, (2.0, 1.0), 0.5, 0.7)
    expected = scipy.ndimage.convolve(picture, kernel[..., None], mode="reflect")
    found = degradations.blur(picture, kernel)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("kind", degradations.RESIZINGS)
@pytest.mark.parametrize("size", [(30, 30), (60, 75), (61, 17), (113, 90), (60, 60)])
def test_resizing_moves_nothing(kind, size):
    """A slope keeps its values at the pixels' centres, up to the error of sampled kernels."""
    y, x = np.mgrid[:60, :60].astype(np.float32)
    found = degradations.resize(np.stack([y, x, y + x], -1), *size, kind)
    assert found.shape == (*size, 3)
    assert found.dtype == np.float32
    centres = [(np.arange(n) + 0.5) * 60 / n - 0.5 for n in size]
    rows, columns = np.meshgrid(*centres, indexing="ij")
    inside = np.s_[10:-10, 4:-4]
    step = max(60 / n for n in size)
    for channel, expected in enumerate((rows, columns, rows + columns)):
        np.testing.assert_allclose(found[inside][..., channel], expected[inside], atol=0.1 * step)


def test_resizing_by_area_is_the_mean_and_by_bicubic_is_bicubic(photo):
    picture = photo.astype(np.float32)
    blocks = picture.reshape(64, 4, 64, 4, 3).mean((1, 3))
    np.testing.assert_allclose(degradations.resize(picture, 64, 64, "area"), blocks, atol=1e-3)
    for size in ((64, 64), (100, 300)):
        expected = bicubic.resize(picture, *size)
        found = degradations.resize(picture, *size, "bicubic")
        np.testing.assert_allclose(found, expected, atol=1e-2)
    # Each pixel counts with the share of it that is covered.
    line = np.array([0, 0, 30, 0, 0], np.float32)
    picture = np.stack([line] * 3, -1)[None]
    found = degradations.resize(picture, 1, 2, "area")
    np.testing.assert_allclose(found[0, :, 0], [6, 6], atol=1e-4)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_noise_is_as_strong_as_it_says(kind, grey):
    rng = np.random.default_rng(0)
    for level in (40, 90, 170):
        picture = np.full((300, 300, 3), level, np.float32)
        if kind == "gaussian":
            strength, expected = 9.0, 9.0
            noisy = degradations.add_gaussian_noise(rng, picture, strength, grey=grey)
        else:
            strength, expected = 0.8, 0.8 * np.sqrt(level)
            noisy = degradations.add_poisson_noise(rng, picture, strength, grey=grey)
        noise = noisy - picture
        assert noise.dtype == np.float32
        assert noise.std() == pytest.approx(expected, rel=0.03)
        assert abs(noise.mean()) < 0.05
        colours = np.abs(noise - noise.mean(2, keepdims=True)).max()
        assert colours < 1e-4 if grey else colours > expected
        if kind == "poisson":
            skewness = np.mean((noise / noise.std()) ** 3)
            assert skewness == pytest.approx(1 / np.sqrt(level), abs=0.03)


def test_noise_stays_within_the_levels():
    rng = np.random.default_rng(0)
    for add in (degradations.add_gaussian_noise, degradations.add_poisson_noise):
        for level in (-5, 0, 255, 260):  # as after a sinc
            noisy = add(rng, np.full((20, 20, 3), level, np.float32), 3.0, grey=False)
            assert noisy.min() >= 0
            assert noisy.max() <= 255


def test_jpeg_has_a_quality_and_may_halve_the_colours(photo):
    picture = photo.astype(np.float32)
    losses = [
        apart(degradations.compress(picture, quality, subsampled=True), picture)
        for quality in (95, 60, 30)
    ]
    assert 0.5 < losses[0] < losses[1] < losses[2] < 20
    stripes = np.zeros((64, 64, 3), np.float32)
    stripes[:, ::2], stripes[:, 1::2] = (200, 60, 60), (60, 130, 60)  # of about equal luma
    kept, halved = (
        apart(degradations.compress(stripes, 95, subsampled=half), stripes)
        for half in (False, True)
    )
    assert kept < 5 < 30 < halved


@pytest.mark.parametrize("jpeg_last", [0.0, 1.0])
def test_jpeg_before_or_after_the_resizing_to_lr(only, photo, jpeg_last):
    """JPEG at LR's size has LR's blocks, so encoding them once more changes little."""
    only(jpeg=1.0, quality=(30.0, 30.0), subsampling=0.0, jpeg_last=jpeg_last)
    lr = degrade(photo, 0, "real", 4).astype(np.float32)
    again = apart(degradations.compress(lr, 30, subsampled=False), lr)
    assert again < 1.5 if jpeg_last else again > 3


# Crops


@pytest.mark.parametrize("position", [(0, 0), (16, 5), (7, 16)])
def test_crops_are_degraded_in_their_surroundings(only, photo, position, monkeypatch):
    """As if the whole picture had been degraded, though only part of it is."""
    monkeypatch.setattr(degradations, "SIZES", (15,))
    only(blur=1.0, shapes=(1.0, 0.0, 0.0), anisotropic=(0.0,) * 3, sigma=(2.0, 2.0), sinc=0.0)
    whole = degrade(photo, 0, "real", 4).astype(int)
    top, left = position
    for key in range(3):
        crop = degrade_crop(photo, top, left, 48, key, "real", 4)
        assert np.abs(crop - whole[top : top + 48, left : left + 48]).max() <= 1


def test_blocks_of_jpeg_begin_anywhere(monkeypatch, photo):
    """The degraded pixels are those of HR around the crop."""
    shapes = set()
    monkeypatch.setattr(
        degradations,
        "degrade",
        lambda hr, *_: shapes.add(hr.shape[:2]) or bicubic.downscale(hr, 4),
    )
    for key in range(200):
        crop = degrade_crop(photo, 22, 24, 20, key, "mild", 4)
        np.testing.assert_array_equal(crop, bicubic.downscale(photo, 4)[22:42, 24:44])
    for side in zip(*shapes, strict=True):
        assert {(size // 4 - 20 - 4 - 4) % 16 for size in side} == set(range(16))


def batches(records, *, start=0, stop=3, shard=(0, 1), **changes):
    config = DataConfig(lr_crop=12, batch_size=6, **changes)
    return list(data.batches(records, config, scale=4, seed=1, start=start, stop=stop, shard=shard))


def test_degraded_batches_differ_from_clean_ones_only_in_lr(records):
    """The same crops with the same flips and rotations, for every preset."""
    clean = batches(records, stop=12)
    for preset in DEGRADING:
        degraded = batches(records, stop=12, degradation=preset)
        for a, b in zip(clean, degraded, strict=True):
            np.testing.assert_array_equal(a["hr"], b["hr"])
        a, b = (np.concatenate([x["lr"] for x in some]) for some in (clean, degraded))
        equal = (a == b).all((1, 2, 3))
        assert 0.05 < equal.mean() < 0.5 if preset == "mild" else not equal.any()
        nearest = []  # of the eight orientations of HR
        hr = np.concatenate([x["hr"] for x in degraded])
        for x, y in zip(hr[~equal], b[~equal], strict=True):
            x = bicubic.downscale(x, 4)
            turned = [np.rot90(z, k) for z in (x, x[:, ::-1]) for k in range(4)]
            nearest.append(np.argmin([apart(y, z) for z in turned]))
        assert np.mean(np.array(nearest) == 0) > 0.8


@pytest.mark.parametrize("preset", DEGRADING)
def test_degraded_batches_are_a_function_of_seed_and_step(records, preset):
    """From any step, with any number of threads and processes."""
    whole = batches(records, degradation=preset)
    resumed = batches(records, start=1, degradation=preset, workers=0)
    shares = [batches(records, shard=(i, 3), degradation=preset, workers=4) for i in range(3)]
    for i, batch in enumerate(whole):
        for name, crops in batch.items():
            together = np.concatenate([share[i][name] for share in shares])
            np.testing.assert_array_equal(crops, together)
            if i >= 1:
                np.testing.assert_array_equal(crops, resumed[i - 1][name])


def test_every_crop_is_degraded_anew(records):
    """In each row and step, even if the pixels are the same."""
    small = [{"lr": records[5]["lr"][:12, :12], "hr": records[5]["hr"][:48, :48]}]
    crops = [lr for batch in batches(small, stop=20, degradation="real") for lr in batch["lr"]]
    assert len({lr.tobytes() for lr in crops}) == len(crops) == 20 * 6


def test_device_cache_gets_the_same_degraded_crops(records):
    config = DataConfig(lr_crop=12, batch_size=6, degradation="mild")
    host, device = (
        data.make_feed(records, dataclasses.replace(config, cache=cache), scale=4)
        for cache in ("none", "device")
    )
    cache = jax.device_put(device.load_cache())
    assert cache.keys() == {"hr"}
    cut = jax.jit(device.crops)
    for shard in ((0, 1), (1, 2)):
        span = {"seed": 3, "start": 1, "stop": 4, "shard": shard}
        for batch, step_input in zip(host.inputs(**span), device.inputs(**span), strict=True):
            crops = cut(cache, step_input)
            assert crops.keys() == batch.keys()
            for name in batch:
                np.testing.assert_array_equal(crops[name], batch[name])


def test_validation_pictures_are_degraded_once_and_for_all(records):
    configs = [DataConfig(degradation=preset) for preset in ("clean", "mild", "mild")]
    clean, mild, again = (data.validation_pictures(records, config, 4) for config in configs)
    for i, record in enumerate(records):
        for name in ("lr", "hr"):
            np.testing.assert_array_equal(clean[i][name], record[name])
        np.testing.assert_array_equal(mild[i]["hr"], record["hr"])
        np.testing.assert_array_equal(mild[i]["lr"], again[i]["lr"])
    assert sum((a["lr"] != b["lr"]).any() for a, b in zip(clean, mild, strict=True)) > 8


# Options


def test_presets_are_options():
    (field,) = (f for f in dataclasses.fields(DataConfig) if f.name == "degradation")
    assert get_args(field.type) == tuple(degradations.PRESETS)


def test_targets_of_clean_crops_are_refused():
    mild = DataConfig(degradation="mild")
    TrainConfig(data=mild)
    TrainConfig(distill=DistillConfig(targets="precomputed"))
    with pytest.raises(UserError, match=r"degradation=mild, use --distill\.targets=online"):
        TrainConfig(data=mild, distill=DistillConfig(targets="precomputed"))


# For evaluation


def test_applied_degradations_follow_one_another(photo):
    apply = degradations.apply
    np.testing.assert_array_equal(apply(photo), photo)
    blurred = scipy.ndimage.gaussian_filter(photo.astype(float), (1.5, 1.5, 0))
    assert np.abs(apply(photo, blur=1.5) - blurred).max() < 0.51
    flat = np.full((200, 200, 3), 100, np.uint8)
    noise = apply(flat, noise=10.0).astype(float) - 100
    assert noise.std() == pytest.approx(10, rel=0.03)
    np.testing.assert_array_equal(apply(flat, noise=10.0, seed=0), apply(flat, noise=10.0))
    assert (apply(flat, noise=10.0, seed=1) != apply(flat, noise=10.0)).any()
    np.testing.assert_array_equal(
        apply(photo, jpeg=50), degradations.compress(photo * np.float32(1), 50, subsampled=True)
    )
    # Blur first, which would weaken the noise, and JPEG last, which rounds in between.
    both = apply(flat, blur=2.0, noise=10.0).astype(float) - 100
    assert both.std() == pytest.approx(10, rel=0.03)
    everything = apply(photo, blur=1.0, noise=5.0, jpeg=80, seed=2)
    step_by_step = apply(apply(photo, blur=1.0, noise=5.0, seed=2), jpeg=80)
    np.testing.assert_array_equal(everything, step_by_step)
    assert everything.dtype == np.uint8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur": -1.0}, "blur is -1.0, expected a number from 0 up"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"noise": float("inf")}, "noise is inf"),
        ({"jpeg": 0}, "jpeg is 0, expected a quality from 1 to 100"),
        ({"jpeg": 101}, "jpeg is 101"),
    ],
)
def test_applied_degradations_have_ranges(photo, options, message):
    with pytest.raises(UserError, match=message):
        degradations.apply(photo, **options)

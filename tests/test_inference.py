"""Streaming and tiles against inference of whole images."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import monitoring

from benchmarks import inference
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.inference import (
    RgbView,
    _columns,
    make_streamer,
    make_tiler,
    make_upscaler,
    make_whole,
    upscale_pixels,
)
from dvmsr_jax.model import DVMSR, Weights, named_parameters
from dvmsr_jax.pretrained import load_model
from dvmsr_jax.program import keep_compiled_programs

TINY = ModelConfig(channels=8, rssbs=2, vimms_per_rssb=1, states=4)
HEIGHTS = (1, 2, 7, 8, 63, 257)
BANDS = (1, 3, 8, 32)
PADDED = 17  # a width for which bands are wider than the image


@functools.cache
def random_model(config):
    """A model with random weights, larger than the initial ones, and with a long memory."""
    shapes = jax.eval_shape(lambda: named_parameters(DVMSR(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    weights = {name: np.float32(rng.normal(size=x.shape) * 0.3) for name, x in shapes.items()}
    weights |= {name: x - 4 for name, x in weights.items() if name.endswith("A_log")}
    return Weights(config, weights).model()


def random_image(h, w):
    return np.random.default_rng(h).random((h, w, 3), np.float32)


@functools.cache
def whole(config, h, w):
    """The upscaled image, computed as a whole."""
    return np.asarray(nnx.jit(random_model(config))(random_image(h, w)[None])[0])


@functools.cache
def streamer(config, band_rows):
    return make_streamer(random_model(config), band_rows=band_rows)


def assert_streams_like_whole(config, h, w, band_rows):
    bands = list(streamer(config, band_rows)(random_image(h, w)))
    assert all(len(band) <= band_rows * config.scale for band in bands)
    np.testing.assert_allclose(np.concatenate(bands), whole(config, h, w), atol=1e-5, rtol=0)


@pytest.mark.parametrize("band_rows", BANDS)
@pytest.mark.parametrize("h", HEIGHTS)
def test_streaming_equals_the_whole_image(h, band_rows):
    assert_streams_like_whole(TINY, h, PADDED, band_rows)


def test_distant_rows_affect_the_result():
    """This makes the test above sharp: the first row has an effect at the bottom."""
    image = random_image(63, 5)
    changed = image.copy()
    changed[0] = 0
    before, after = (np.concatenate(list(streamer(TINY, 8)(x))) for x in (image, changed))
    assert np.abs(after - before)[-8:].max() > 1e-3


@pytest.mark.parametrize(("scale", "w", "vimms"), [(2, 1, 1), (3, 2, 1), (4, 17, 2)])
def test_streaming_at_each_scale(scale, w, vimms):
    config = dataclasses.replace(TINY, scale=scale, rssbs=1, vimms_per_rssb=vimms, conv_width=5)
    assert_streams_like_whole(config, 8, w, 3)


def test_streaming_the_published_weights(shared):
    model = load_model(shared / "reference" / "team07_DVMSR.pth")
    with np.load(shared / "reference" / "team07_activations.npz") as reference:
        image, expected = np.float32(reference["lr_uint8"]) / 255, reference["sr"]
    whole = np.asarray(nnx.jit(model)(image[None])[0])
    np.testing.assert_allclose(whole, expected.reshape(whole.shape), atol=1e-4, rtol=0)
    bands = list(make_streamer(model, band_rows=7)(image))
    np.testing.assert_allclose(np.concatenate(bands), whole, atol=1e-5, rtol=0)


def test_a_band_is_requested_before_the_one_above_is_used():
    """One band can be computed while the other is written."""
    asked = []

    def note(part):
        asked.append(len(part))
        return part

    bands = streamer(TINY, 8)(RgbView(random_image(63, PADDED), note))
    next(bands)
    assert asked == [8, 8]
    assert sum(map(len, bands)) == 4 * 63 - 4 * (8 - random_model(TINY).rows_late)
    assert sum(asked) == 63


@contextlib.contextmanager
def compilations():
    """Yields a list of JAX's events of tracing, lowering or compiling inside."""
    events = []

    def listen(event, *_, **__):
        events.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        monitoring.unregister_event_duration_listener(listen)


def test_one_program_serves_all_heights():
    """Its memory therefore cannot depend on the height."""
    stream = streamer(TINY, 8)
    list(stream(random_image(1, 5)))
    with compilations() as events:
        for h in (2, 9, 100):
            list(stream(random_image(h, 5)))
        assert not events
        list(stream(random_image(1, 6)))
        assert events


def test_pictures_of_similar_widths_share_a_program():
    """With the result of a program of their own, up to rounding."""
    model = random_model(TINY)
    upscale, whole = make_upscaler(model), make_whole(model)
    picture = np.random.default_rng(0).integers(0, 256, (9, 48, 3), np.uint8)
    upscale(picture)
    with compilations() as events:
        results = {w: upscale(picture[:, :w]) for w in (33, 47)}
        assert not events
        upscale(picture[:, :32])
        assert events
    for w, result in results.items():
        expected = upscale_pixels(whole, picture[None, :, :w], self_ensemble=False)[0]
        assert expected.std() > 10
        np.testing.assert_allclose(result.astype(int), expected, atol=1)


@pytest.mark.parametrize(("bits", "most", "mean"), [(4, 1.125, 1.044), (2, 1.5, 1.183)])
def test_numbers_of_columns_are_few_and_sufficient(bits, most, mean):
    columns = np.array([_columns(w, bits) for w in range(1, 4097)])
    widths = np.arange(1, 4097)
    assert ((widths <= columns) & (columns <= most * widths)).all()
    assert (columns / widths)[2048:].mean() == pytest.approx(mean, abs=1e-3)
    # 1 to 2^bits, and so many in each doubling up to 4,096.
    assert len(set(columns)) == 2**bits + 2 ** (bits - 1) * (12 - bits)
    assert _columns(PADDED, bits) > PADDED


def test_compiled_programs_are_kept_in_the_folder_of_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = "jax_compilation_cache_dir"
    before = jax.config.values[name]
    try:
        keep_compiled_programs()
        assert jax.config.values[name] == before
        jax.config.update(name, None)
        keep_compiled_programs()
        assert Path(jax.config.values[name]).is_relative_to(tmp_path)
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize("mode", ["whole", "streaming"])
def test_benchmark_measures(mode, monkeypatch):
    monkeypatch.setattr(inference, "CONFIG", dataclasses.replace(TINY, rssbs=1))
    monkeypatch.setattr(inference, "CASE_SECONDS", 0)
    peaks, runs = iter([1000, 1024]), []
    monkeypatch.setattr(inference.machine, "peak_memory", lambda: next(peaks))
    make = inference._make_upscale

    def counting(how):
        upscale = make(how)

        def upscale_and_count(image):
            runs.append(0)
            for band in upscale(image):
                assert band.shape[1:] == (4 * 5, 3)
                runs[-1] += len(band)
                yield band

        return upscale_and_count

    monkeypatch.setattr(inference, "_make_upscale", counting)
    result = inference.measure(5, 7, inference.How(mode, "bfloat16", "auto"))
    assert result.memory == 24
    assert runs == [4 * 7] * 2  # once with compiling and once without, all rows
    assert 0 < result.seconds < result.first


def test_bidirectional_models_are_not_streamed():
    model = random_model(dataclasses.replace(TINY, bidirectional=True))
    with pytest.raises(UserError, match="tiles"):
        make_streamer(model)


def pixelwise_model(config):
    """A model that treats every pixel separately, so that tiles do not change the result."""
    weights = {name: np.array(x) for name, x in named_parameters(random_model(config)).items()}
    for name, x in weights.items():
        if name.endswith("conv.kernel") and x.ndim == 2:  # the causal convolution's taps
            x[:-1] = 0
        elif x.ndim == 4:  # the 3x3 convolutions' taps
            centre = x[1, 1].copy()
            x[:] = 0
            x[1, 1] = centre
        elif name.endswith("x_proj.kernel"):  # step size, B and C: nothing is remembered
            x[:] = 0
    return Weights(config, weights).model()


@pytest.mark.parametrize(
    ("h", "w", "tile", "overlap"),
    [(20, 31, 8, 3), (9, 8, 8, 7), (5, 17, 8, 0), (3, 20, 8, 3)],
)
def test_tiles_cover_and_their_weights_add_up(h, w, tile, overlap):
    model = pixelwise_model(dataclasses.replace(TINY, rssbs=1))
    image = random_image(h, w)
    tiled = np.concatenate(list(make_tiler(model, tile=tile, overlap=overlap)(image)))
    np.testing.assert_allclose(tiled, nnx.jit(model)(image[None])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("h", "w"), [(7, 9), (4, 9), (4, 4), (3, 1)])
def test_one_tile_is_the_whole_image(h, w):
    """Even if its sides are equal to the overlap or shorter."""
    config = dataclasses.replace(TINY, bidirectional=True)
    image = random_image(h, w)
    tiled = np.concatenate(list(make_tiler(random_model(config), tile=9, overlap=4)(image)))
    np.testing.assert_allclose(tiled, whole(config, h, w), atol=1e-5, rtol=0)


def test_tiles_differ_from_the_whole_image_within_bounds(shared):
    """On a photograph: less the more they overlap, and without a jump at their borders."""
    model = load_model(shared / "reference" / "team07_DVMSR.pth")
    with np.load(shared / "reference" / "team07_activations.npz") as reference:
        image, expected = np.float32(reference["lr_uint8"]) / 255, reference["sr"]
    error = {}
    for overlap in (0, 8):
        bands = make_tiler(model, tile=20, overlap=overlap)(image)
        error[overlap] = np.abs(np.concatenate(list(bands)) - expected)
    assert error[8].mean() < error[0].mean() < 0.01
    assert error[8].max() < 0.1


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (8, -1), (0, 0)])
def test_impossible_tiles(tile, overlap):
    with pytest.raises(UserError, match="cannot overlap"):
        make_tiler(random_model(TINY), tile=tile, overlap=overlap)


def test_upscaled_pixels_are_clamped_and_rounded():
    wanted = np.array([-1, 0, 0.4, 0.6, 254.6, 255, 400], np.float32).reshape(1, 1, -1, 1)
    pictures = jnp.zeros((1, 1, 7, 3), jnp.uint8)
    upscaled = upscale_pixels(lambda images: images + wanted / 255, pictures, self_ensemble=False)
    assert upscaled.dtype == np.uint8
    np.testing.assert_array_equal(upscaled[0, 0, :, 0], [0, 0, 0, 1, 255, 255, 255])

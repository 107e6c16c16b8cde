"""The Python interface: every kind of picture, transparency without fringes, any scale."""

import collections
import dataclasses
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import ExifTags, Image

from dvmsr_jax import Upscaler, bicubic, registry
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.configs import PRESETS
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR, parameter_count
from dvmsr_jax.pictures.metadata import Metadata
from dvmsr_jax.pictures.reading import Frame
from dvmsr_jax.pictures.upscaler import PictureUpscaler
from dvmsr_jax.pretrained import PretrainedError, load_model, save_safetensors
from dvmsr_jax.rgb import average_over_symmetries

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 2**16, (9, 6, 4), np.uint16)


def bicubic_upscale(image):
    """A stand-in for a model: like real ones, it sharpens, overshoots, and returns bands."""
    h, w, _ = image.shape
    yield from np.array_split(bicubic.resize(np.asarray(image), 4 * h, 4 * w), 3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of tiny random weights, named by whether the model is bidirectional."""
    folder = tmp_path_factory.mktemp("weights")
    for bidirectional in (False, True):
        config = ModelConfig(
            scale=2, channels=8, rssbs=1, vimms_per_rssb=1, states=4, bidirectional=bidirectional
        )
        save_safetensors(DVMSR(config, rngs=nnx.Rngs(0)), folder / f"{bidirectional}.safetensors")
    return folder


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_arrays_keep_their_kind(doubling, channels, dtype):
    pixels = (DEEP / 65535 if issubclass(dtype, np.floating) else DEEP >> 8).astype(dtype)
    pixels = pixels[:, :, 0] if channels is None else pixels[:, :, -channels:]
    enlarged = PictureUpscaler(doubling, 2)(pixels)
    assert enlarged.dtype == dtype
    expected = pixels.repeat(2, 0).repeat(2, 1)
    assert enlarged.shape == expected.shape
    if channels in (2, 4):  # colours that hardly show need not be exact
        alpha = expected[:, :, -1:] / float(expected.max())
        enlarged, expected = enlarged * alpha, expected * alpha
    step = 1e-6 if issubclass(dtype, np.floating) else 1
    assert np.abs(enlarged - expected.astype(np.float64)).max() <= step


@pytest.mark.parametrize("dtype", [">u2", "<u2", ">f8"])
def test_arrays_of_either_byte_order(doubling, dtype):
    upscale = PictureUpscaler(doubling, 2)
    pixels = DEEP if "u" in dtype else DEEP / 65535
    enlarged = upscale(pixels.astype(dtype))
    assert enlarged.dtype == dtype
    np.testing.assert_array_equal(enlarged, upscale(pixels))


def peak_memory(function):
    """Peak bytes that NumPy and Python allocate while the function runs."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_memory_does_not_grow_with_the_height(doubling, channels):
    def upscale(h):
        pixels = np.tile(DEEP[:, :, -channels:].astype(np.uint8), (h, 20, 1))
        enlarged = PictureUpscaler(doubling, 2).enlarge(Frame(pixels, Metadata()))
        return peak_memory(lambda: collections.deque(enlarged.bands, maxlen=0))

    assert upscale(300) < 1.5 * upscale(30)  # garbage may wait to be collected


def test_the_result_is_held_once(doubling):
    pixels = np.tile(DEEP[:, :, :3], (100, 10, 1))
    enlarged = 4 * pixels.nbytes
    assert enlarged < peak_memory(lambda: PictureUpscaler(doubling, 2)(pixels)) < 1.2 * enlarged


def test_other_objects_are_refused(doubling):
    upscale = PictureUpscaler(doubling, 2)
    with pytest.raises(UserError, match="a list is not a picture"):
        upscale([[1, 2], [3, 4]])
    for shape in ((3,), (4, 4, 5), (1, 4, 4, 3), (0, 4, 3)):
        with pytest.raises(UserError, match="shape"):
            upscale(np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="int64"):
        upscale(np.zeros((4, 4), np.int64))
    for scale in (0, -1, 17, float("nan")):
        with pytest.raises(UserError, match="scale"):
            PictureUpscaler(doubling, 2, scale=scale)


def test_subclasses_of_arrays(doubling):
    """np.matrix stays two-dimensional when sliced, which used to corrupt the heap."""
    upscale = PictureUpscaler(doubling, 2)
    pixels = np.ascontiguousarray(DEEP[:, :, 0])
    enlarged = upscale(pixels.view(np.matrix))
    assert type(enlarged) is np.ndarray
    np.testing.assert_array_equal(enlarged, upscale(pixels))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_out_of_range_are_refused(doubling, dtype):
    upscale = PictureUpscaler(doubling, 2)
    for low, high in ((0, 255), (-1, 1), (0, 1.5)):
        with pytest.raises(UserError, match=rf"from {low} to {high}, .* lie in \[0, 1\]: divide"):
            upscale(np.array([[low, high]], dtype))
    for value in (np.nan, np.inf, -np.inf):
        pixels = np.full((9, 6, 3), 0.5, dtype)
        pixels[4, 3, 1] = value
        with pytest.raises(UserError, match="NaN or infinity"):
            upscale(pixels)
    edge = np.array([[0, 1]], dtype) + np.array([[-1e-4, 1e-4]], dtype)  # by arithmetic before
    assert upscale(edge).max() == 1


def test_empty_pictures_are_refused(doubling):
    upscale = PictureUpscaler(doubling, 2)
    for empty in (np.zeros((0, 0)), np.zeros((0, 4, 3), np.uint8), np.zeros((0, 0, 3))):
        with pytest.raises(UserError, match="shape"):
            upscale(empty)
    with pytest.raises(UserError, match="no pixels"):
        upscale(Image.new("RGB", (0, 0)))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        *(("L", "L"), ("1", "L"), ("LA", "LA"), ("RGB", "RGB"), ("RGBA", "RGBA")),
        *(("P", "RGB"), ("CMYK", "RGB"), ("YCbCr", "RGB"), ("RGBa", "RGBA"), ("I;16", "I;16")),
    ],
)
def test_pillow_images(doubling, mode, expected):
    image = Image.new(mode, (6, 9), 1)
    enlarged = PictureUpscaler(doubling, 2)(image)
    assert (enlarged.mode, enlarged.size) == (expected, (12, 18))
    assert (image.mode, image.size) == (mode, (6, 9))


def test_pillow_images_keep_their_metadata(doubling, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "Camera Inc."
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (6, 9)).save(path, exif=exif, dpi=(72, 72))
    with Image.open(path) as image:
        PictureUpscaler(doubling, 2)(image).save(tmp_path / "upright.png", dpi=(144, 144))
        enlarged = PictureUpscaler(doubling, 2)(image)
    assert enlarged.size == (18, 12)
    assert enlarged.info["dpi"] == (144, 144)
    enlarged.save(tmp_path / "again.jpg", exif=enlarged.info["exif"])
    with Image.open(tmp_path / "again.jpg") as image:
        assert dict(image.getexif()) == {ExifTags.Base.Make: "Camera Inc."}


def disc(colour, background, size=24):
    """(colours, alpha) of an antialiased disc whose hidden pixels have another colour."""
    y, x = np.mgrid[: 8 * size, : 8 * size] / (8 * size) - 0.5
    inside = (x * x + y * y < 0.16).astype(np.float64)
    alpha = inside.reshape(size, 8, size, 8).mean(axis=(1, 3))[:, :, None]
    return np.where(alpha > 0, colour, background), alpha


@pytest.mark.parametrize("colour", [(1.0, 0.2, 0.1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
def test_transparency_has_no_fringe(colour):
    """On any background, the result looks as if blended before, for any colour of hidden pixels."""
    upscale = PictureUpscaler(bicubic_upscale, 4)
    colours, alpha = disc(np.array(colour), np.array([0.0, 1.0, 0.0]))
    enlarged = upscale(np.concatenate([colours, alpha], axis=2))
    seen, coverage = enlarged[:, :, :3], enlarged[:, :, 3:]
    for ground in (0.0, 0.5, 1.0, np.array([0.1, 0.9, 0.4])):
        before = upscale(colours * alpha + ground * (1 - alpha))
        after = seen * coverage + ground * (1 - coverage)
        assert np.abs(after - before).max() < 0.08  # the overshoot beside the edge
    # Neither halos around the edge, nor holes within it.
    distance = np.hypot(*(np.mgrid[:96, :96] / 96 - 0.5 + 0.5 / 96))
    assert (coverage[distance < 0.29] == 1).all()
    assert (coverage[distance > 0.51] == 0).all()
    edge = (coverage > 0.1)[:, :, 0]
    assert np.abs(seen[edge] - colour).max() < 0.06


@pytest.mark.parametrize("scale", [0.125, 0.25, 0.5, 0.7])
def test_transparency_survives_shrinking(scale):
    """Thin lines become faint, but do not vanish."""
    lines = np.zeros((64, 64, 4), np.float32)
    lines[:, ::8] = 1
    shrunk = PictureUpscaler(bicubic_upscale, 4, scale=scale)(lines)
    assert shrunk[:, :, 3].mean() == pytest.approx(1 / 8, rel=0.2)


def test_opaque_pictures_are_upscaled_once():
    calls = []

    def counted(image):
        calls.append(image.shape)
        yield from bicubic_upscale(image)

    pixels = np.dstack([DEEP[:, :, :3], np.full((9, 6), 65535, np.uint16)])
    enlarged = PictureUpscaler(counted, 4)(pixels)
    assert len(calls) == 1
    assert (enlarged[:, :, 3] == 65535).all()
    np.testing.assert_array_equal(enlarged[:, :, :3], PictureUpscaler(counted, 4)(pixels[:, :, :3]))


@pytest.mark.parametrize("scale", [0.5, 1, 2, 2.7, 3, 8])
def test_other_scales_resize_the_models_output(scale):
    picture = RNG.random((37, 23, 3), np.float32)
    (large,) = np.concatenate([*bicubic_upscale(picture)])[None]
    enlarged = PictureUpscaler(bicubic_upscale, 4, scale=scale)(picture)
    height, width = round(37 * scale), round(23 * scale)
    expected = np.clip(bicubic.resize(large, height, width), 0, 1)
    assert np.abs(enlarged - expected).max() < 1e-5
    transparent = PictureUpscaler(bicubic_upscale, 4, scale=scale)(DEEP)
    assert transparent.shape == (round(9 * scale), round(6 * scale), 4)


def test_a_pixel_stays_one(doubling):
    assert PictureUpscaler(doubling, 2, scale=0.1)(np.zeros((1, 1, 3), np.uint8)).shape == (1, 1, 3)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_checkpoints(weights, bidirectional):
    path = weights / f"{bidirectional}.safetensors"
    picture = DEEP[:, :, :3]
    whole = Upscaler(path)(picture)
    assert whole.shape == (18, 12, 3)
    tiled = Upscaler(path, tile=6, overlap=2)(picture)
    assert 0 < np.abs(whole.astype(int) - tiled).mean() < 65535 / 50
    coarse = Upscaler(path, precision="bfloat16")(picture)
    assert 0 < np.abs(whole.astype(int) - coarse).mean() < 65535 / 50


def test_an_overlap_needs_tiles(weights):
    with pytest.raises(UserError, match="no effect without tiles"):
        Upscaler(weights / "False.safetensors", overlap=2)
    Upscaler(weights / "True.safetensors", overlap=2)  # a bidirectional model has tiles anyway


def test_self_ensemble(weights):
    path, picture = weights / "False.safetensors", DEEP[:, :, :3] / 65535.0
    plain = Upscaler(path)
    ensemble = Upscaler(path, self_ensemble=True, scale=2)(picture)

    def model(images):
        return jnp.asarray(np.concatenate([*plain._upscale(np.asarray(images[0]))]))[None]

    expected = average_over_symmetries(model, jnp.asarray(picture, jnp.float32)[None])[0]
    assert np.abs(ensemble - np.clip(expected, 0, 1)).max() < 1e-6
    assert np.abs(ensemble - plain(picture)).max() > 1e-4


def test_missing_weights(tmp_path, monkeypatch):
    with pytest.raises(PretrainedError, match=r"no such file .*nor a name of weights \(x4, "):
        Upscaler(tmp_path / "none.safetensors")
    monkeypatch.setattr(registry, "_FOLDER", tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}/x4.safetensors: .*named x4 are missing"):
        Upscaler()


def test_several_threads(weights):
    upscale = Upscaler.from_pretrained(weights / "False.safetensors")
    pictures = [RNG.integers(0, 256, (h, w, 3), np.uint8) for h in (5, 40) for w in (7, 16)] * 3
    expected = [upscale(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as threads:
        for result, one in zip(threads.map(upscale, pictures), expected, strict=True):
            np.testing.assert_array_equal(result, one)


def test_importing_the_package_is_light():
    code = "import sys, dvmsr_jax; assert 'jax' not in sys.modules and 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_projects_own_weights():
    model = load_model("x4")
    student = PRESETS["paper"]["student"].model
    assert dataclasses.replace(model.config, drop_path=student.drop_path) == student
    assert parameter_count(model) == 424_428
    picture = RNG.integers(0, 256, (6, 5, 3), np.uint8)
    ours = Upscaler()(picture)
    np.testing.assert_array_equal(ours, Upscaler("x4")(picture))

"""Written pictures are read back: pixels, frames, pages and metadata."""

import contextlib
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms

from dvmsr_jax.pictures import formats
from dvmsr_jax.pictures.formats import BMP, GIF, JPEG, PNG, TIFF, WEBP, FormatError
from dvmsr_jax.pictures.metadata import MAIN, Metadata
from dvmsr_jax.pictures.reading import BandedFrame, ImageError, Picture

RNG = np.random.default_rng(0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# A few tall bands of random and smooth pixels, to exercise every filter and the end of a strip.
NOISE = RNG.integers(0, 2**16, (70, 41, 4), np.uint16)
SMOOTH = np.add.outer(np.arange(70), np.outer(np.arange(41), range(1, 5))).astype(np.uint16) * 99
DEEP = np.concatenate([NOISE, SMOOTH, NOISE[:3], SMOOTH])


NOTHING = Metadata()


@pytest.fixture
def write(tmp_path):
    """Writes arrays as the frames of some kind of picture, and returns the file's path."""

    def write(form, *frames, metadata=NOTHING, source="PNG", plays=0, quality=None, scale=1.0):
        suffix = next(key for key, value in formats.BY_SUFFIX.items() if value is form)
        path = tmp_path / f"picture{suffix}"
        banded = (
            BandedFrame(x.shape, x.dtype, (x[i : i + 16] for i in range(0, len(x), 16)), metadata)
            for x in frames
        )
        formats.write(
            path, form, banded, Source(frames, source, plays), scale=scale, quality=quality
        )
        return path

    return write


class Source(Picture):
    """A stand-in for the picture that was enlarged."""

    def is_lossless_webp(self):
        return False

    def __init__(self, frames, form, plays):
        self._frames, self.format, self.plays = frames, form, plays
        self.most_bytes = sum(x.nbytes for x in frames)


def only_frame(path):
    (frame,) = Picture(path).frames()
    return frame


def only_pixels(path):
    return only_frame(path).pixels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("form", [PNG, TIFF])
def test_png_and_tiff_hold_everything(write, form, channels, dtype):
    pixels = (DEEP if dtype == np.uint16 else DEEP >> 8).astype(dtype)[:, :, :channels]
    path = write(form, pixels)
    unknown_to_pillow = form is TIFF and channels == 2 and dtype == np.uint16
    again = tifffile.imread(path) if unknown_to_pillow else only_pixels(path)
    assert again.dtype == dtype
    np.testing.assert_array_equal(again, pixels)


def test_one_pixel(write):
    pixels = np.array([[[1, 2, 3]]], np.uint8)
    for form in (PNG, TIFF, BMP):
        np.testing.assert_array_equal(only_pixels(write(form, pixels)), pixels)


def test_pictures_are_adapted_to_the_format(write):
    deep = np.full((16, 16, 4), [257 * 200, 257 * 100, 0, 257 * 51], np.uint16)
    on_white = np.array([244, 224, 204])
    for form in (JPEG, BMP):
        pixels = only_pixels(write(form, deep))
        assert pixels.dtype == np.uint8
        assert np.abs(pixels - on_white).max() <= (2 if form is JPEG else 0)
    pixels = only_pixels(write(WEBP, deep, quality=100))
    assert np.abs(pixels.astype(int) - (200, 100, 0, 51)).max() <= 3
    grey = (deep[:, :, :1] >> 8).astype(np.uint8)
    assert only_pixels(write(JPEG, grey)).shape[2] == 1
    assert only_pixels(write(WEBP, grey)).shape[2] == 3


@pytest.mark.parametrize("plays", [1, 0])
@pytest.mark.parametrize("quality", ["lossless", 100])
@pytest.mark.parametrize("metadata", [NOTHING, Metadata(SRGB)])
def test_lossless_webp(write, quality, plays, metadata):
    """Plain, with a profile, and animated."""
    pixels = (DEEP >> 8).astype(np.uint8)
    pixels[:, :, 3] |= 1  # hidden pixels need not be kept
    frames = [pixels, pixels[::-1].copy()][: 2 - plays]
    picture = Picture(write(WEBP, *frames, quality=quality, metadata=metadata))
    lossless = quality == "lossless"
    assert picture.is_lossless_webp() == lossless
    for frame, expected in zip(picture.frames(), frames, strict=True):
        assert np.array_equal(frame.pixels, expected) == lossless
    # By default, a lossless picture stays lossless.
    banded = [BandedFrame(x.shape, x.dtype, [x], NOTHING) for x in frames]
    for asked, expected in ((None, lossless), (80, False), ("lossless", True)):
        path = Path(picture._source).with_name("again.webp")
        formats.write(path, WEBP, banded, picture, scale=1.0, quality=asked)
        assert Picture(path).is_lossless_webp() == expected
    formats.check_holds(WEBP, picture, "lossless")
    with pytest.raises(FormatError, match="JPEG cannot be lossless"):
        formats.check_holds(JPEG, Source(frames[:1], "PNG", 0), "lossless")


def test_damaged_webp_is_not_lossless(write, tmp_path):
    data = write(WEBP, (DEEP >> 8).astype(np.uint8), quality="lossless").read_bytes()
    for damaged in (data.replace(b"VP8L", b"VP9L"), data[:12] + bytes(3)):
        with contextlib.suppress(ImageError):
            assert not Picture(damaged).is_lossless_webp()


def test_gif(write):
    y, x = np.mgrid[:64, :64].astype(np.float32) / 63
    colours = np.stack([x, y, 1 - x, np.full_like(x, 1)], axis=2)
    pixels = np.rint(colours * 255).astype(np.uint8)
    pixels[20:40, 20:40, 3], pixels[40:50, 40:50, 3] = 100, 200
    again = only_pixels(write(GIF, pixels))
    np.testing.assert_array_equal(again[:, :, 3] == 0, pixels[:, :, 3] < 128)
    shown = again[:, :, 3] > 0
    assert np.abs(again[shown].astype(int) - pixels[shown])[:, :3].mean() < 10
    assert only_pixels(write(GIF, pixels[:, :, :3])).shape == (64, 64, 3)


RICH = Metadata(
    SRGB,
    (300.0, 150.0),
    {
        MAIN: {
            ExifTags.Base.Make: "Camera Inc.",
            ExifTags.Base.Rating: 4,
            ExifTags.Base.XPTitle: "Ä".encode("utf-16-le"),
        },
        ExifTags.IFD.Exif: {ExifTags.Base.ExposureTime: 0.25},
        ExifTags.IFD.GPSInfo: {ExifTags.GPS.GPSLatitude: (50.0, 3.0, 1.5)},
    },
)


@pytest.mark.parametrize(
    ("form", "big"), [(PNG, False), (JPEG, False), (WEBP, False), (TIFF, False), (TIFF, True)]
)
def test_metadata(write, form, big, monkeypatch):
    pixels = np.zeros((64, 64, 3), np.uint8)
    monkeypatch.setattr(formats, "CLASSIC_TIFF", pixels.nbytes - big)
    path = write(form, pixels, metadata=RICH)
    if form is TIFF:
        with tifffile.TiffFile(path) as file:
            assert file.is_bigtiff == big
    metadata = only_frame(path).metadata
    assert metadata.icc == SRGB
    assert metadata.dpi == pytest.approx(RICH.dpi, rel=1e-3)
    assert metadata.exif == RICH.exif


@pytest.mark.parametrize("quality", [1, 80, 94, 95, 100])
def test_jpeg_of_noise(write, quality):
    """It takes more bytes than pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    found = only_pixels(write(JPEG, pixels, quality=quality)).astype(int)
    assert np.abs(found - pixels).mean() < 2 if quality == 100 else found.shape == pixels.shape


def test_a_profile_of_grey_does_not_come_with_colours(write):
    profile = bytearray(SRGB)
    profile[16:20] = b"GRAY"
    metadata = Metadata(icc=bytes(profile))
    grey = np.zeros((8, 8, 1), np.uint8)
    assert only_frame(write(PNG, grey, metadata=metadata)).metadata == metadata
    with Image.open(write(WEBP, grey, metadata=metadata)) as image:
        assert "icc_profile" not in image.info


def test_pictures_without_metadata_get_none(write):
    for form in (PNG, JPEG, WEBP, TIFF, GIF):
        assert only_frame(write(form, np.zeros((8, 8, 3), np.uint8))).metadata == NOTHING


def test_exif_too_long_for_jpeg_is_left_out(write):
    metadata = Metadata(exif={ExifTags.IFD.Exif: {ExifTags.Base.MakerNote: bytes(70_000)}})
    pixels = np.zeros((8, 8, 3), np.uint8)
    assert only_frame(write(JPEG, pixels, metadata=metadata)).metadata.exif == {}
    assert only_frame(write(PNG, pixels, metadata=metadata)).metadata == metadata


def profile_of(channels, gamma=1.0):
    """A minimal ICC profile with sRGB's primaries, or of grey, and a power curve."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white, *primaries = (
        b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 2**16) for value in xyz))
        for xyz in (
            *((0.9642, 1, 0.8249), (0.4361, 0.2225, 0.0139)),
            *((0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)),
        )
    )
    tags = {b"wtpt": white}
    if channels == 1:
        tags[b"kTRC"] = curve
    else:
        for name, primary in zip((b"r", b"g", b"b"), primaries, strict=True):
            tags |= {name + b"XYZ": primary, name + b"TRC": curve}
    place = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">2I", place + len(data), len(value))
        data += value
    header = bytearray(128)
    header[:4], header[8:12] = struct.pack(">I", place + len(data)), b"\x02\x40\0\0"
    header[12:24] = b"mntr" + (b"GRAY" if channels == 1 else b"RGB ") + b"XYZ "
    header[36:40], header[68:80] = b"acsp", white[8:]
    return bytes(header) + table + data


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("form", [BMP, GIF, WEBP])
def test_colours_are_converted_where_their_profile_is_lost(write, form, channels):
    """From a linear profile, in which middle grey is 55 rather than 128."""
    colour = np.array([55, 55, 55, 255][:channels], np.uint8)
    metadata = Metadata(icc=profile_of(channels))
    frame = only_frame(write(form, np.tile(colour, (16, 16, 1)), metadata=metadata, quality=100))
    if form is WEBP and channels > 1:  # WebP keeps it
        assert frame.metadata.icc == metadata.icc
        assert np.abs(frame.pixels[:, :, :3].astype(int) - 55).max() <= 1
    else:
        assert frame.metadata.icc is None
        assert np.abs(frame.pixels[:, :, :3].astype(int) - 128).max() <= 1
    # PNG keeps it.
    assert (
        only_frame(write(PNG, np.tile(colour, (4, 4, 1)), metadata=metadata)).metadata == metadata
    )


FLICKER = [np.full((8, 8, 3), [200 * (i % 2), 100, 0], np.uint8) for i in range(30)]


@pytest.mark.parametrize("form", [PNG, WEBP, GIF])
@pytest.mark.parametrize("duration", [1000 / 60, 33, 1001 / 24, 40, 105])
def test_an_animation_lasts_as_long_as_before(write, form, duration):
    path = write(form, *FLICKER, metadata=Metadata(duration=float(duration)))
    durations = [frame.metadata.duration for frame in Picture(path).frames()]
    assert len(durations) == 30
    unit = {PNG: 1e-3, WEBP: 1, GIF: 10}[form]
    assert max(abs(one - duration) for one in durations) < unit
    assert sum(durations) == pytest.approx(30 * duration, abs=unit / 2 + 1e-9)


@pytest.mark.parametrize(
    ("form", "seconds"),
    [(PNG, 65.536), (PNG, 70.001), (PNG, 65_535), (WEBP, 16_777), (GIF, 655.35)],
)
def test_frames_that_are_shown_long(write, form, seconds):
    path = write(form, *FLICKER[:2], metadata=Metadata(duration=1000.0 * seconds))
    for frame in Picture(path).frames():
        assert frame.metadata.duration == pytest.approx(1000 * seconds, rel=1e-5)


@pytest.mark.parametrize(
    ("form", "seconds", "remedy"),
    [(GIF, 700, "webp or png"), (WEBP, 20_000, "--format png"), (PNG, 70_000, "allows 65535")],
)
def test_frames_that_are_shown_too_long(write, form, seconds, remedy):
    with pytest.raises(FormatError, match=rf"a frame for {seconds} seconds; .*{remedy}"):
        write(form, *FLICKER[:2], metadata=Metadata(duration=1000.0 * seconds))


@pytest.mark.parametrize("form", [GIF, WEBP])
def test_animations_that_last_too_long_in_all(write, form):
    """Pillow joins equal frames of GIFs, and counts WebP's milliseconds in 32 bits."""
    count, seconds = (2, 600.0) if form is GIF else (200, 16_000.0)
    frames = [FLICKER[0]] * count + [FLICKER[1]] if form is GIF else (FLICKER * 7)[:count]
    with pytest.raises(FormatError, match="cannot be written as"):
        write(form, *frames, metadata=Metadata(duration=1000.0 * seconds))


@pytest.mark.parametrize(("form", "most"), [(PNG, 2**31 - 1), (WEBP, 2**16 - 1), (GIF, 2**16)])
def test_more_plays_than_a_format_counts(write, form, most):
    for plays, written in ((most, most), (most + 1, most), (2**32 - 1, most)):
        assert Picture(write(form, *FLICKER[:2], plays=plays)).plays == written


@pytest.mark.parametrize("plays", [0, 1, 3])
@pytest.mark.parametrize("form", [PNG, WEBP, GIF])
def test_animations(write, form, plays):
    frames = [np.full((24, 32, 4), [250, 0, 0, 255], np.uint8) for _ in range(3)]
    for i, frame in enumerate(frames):  # clear areas show nothing of the frame before
        frame[:, 8 * i : 8 * i + 8] = [0, 250, 0, 255]
        frame[4:8, 8 * i : 8 * i + 8] = 0
    metadata = Metadata(duration=70.0)
    picture = Picture(write(form, *frames, metadata=metadata, plays=plays))
    assert (picture.format, len(picture), picture.plays) == (form.name, 3, plays)
    for frame, expected in zip(picture.frames(), frames, strict=True):
        assert frame.metadata.duration == 70
        again = frame.pixels.astype(int)
        np.testing.assert_array_equal(again[:, :, 3], expected[:, :, 3])
        visible = np.abs(again - expected)[expected[:, :, 3] > 0]
        assert np.median(visible) <= 5


def test_16_bit_animation_in_png(write):
    path = write(PNG, DEEP, DEEP[::-1].copy())
    assert len(Picture(path)) == 2
    with Image.open(path) as image:
        image.seek(1)
        np.testing.assert_array_equal(np.asarray(image), DEEP[::-1] >> 8)


def test_pages(write):
    pages = DEEP[:, :, :3], DEEP[:9, :5, 0:1], (DEEP >> 8).astype(np.uint8)
    picture = Picture(write(TIFF, *pages, metadata=Metadata(dpi=(300.0, 300.0))))
    for frame, page in zip(picture.frames(), pages, strict=True):
        np.testing.assert_array_equal(frame.pixels, page)
        assert frame.metadata.dpi == (300, 300)
    assert picture.most_bytes == sum(page.nbytes for page in pages)


def test_pages_become_a_big_tiff_if_they_are_large(write, monkeypatch):
    pages = DEEP[:, :, :3], DEEP[:9, :5, 0:1]
    for limit, big in ((4 * sum(x.nbytes for x in pages), False), (4 * pages[0].nbytes, True)):
        monkeypatch.setattr(formats, "CLASSIC_TIFF", limit)
        with tifffile.TiffFile(write(TIFF, *pages, scale=2.0)) as file:
            assert file.is_bigtiff == big


def test_several_frames_need_a_format_for_them():
    frames = [np.zeros((2, 2, 3), np.uint8)] * 3
    with pytest.raises(FormatError, match=r"3 frames, and JPEG .* gif or webp"):
        formats.check_holds(JPEG, Source(frames, "GIF", 0))
    for form in (PNG, GIF, BMP):
        with pytest.raises(FormatError, match=r"3 pages.* --format tiff"):
            formats.check_holds(form, Source(frames, "TIFF", 0))
    formats.check_holds(TIFF, Source(frames, "TIFF", 0))
    formats.check_holds(TIFF, Source(frames, "GIF", 0))
    formats.check_holds(JPEG, Source(frames[:1], "TIFF", 0))


@pytest.mark.parametrize("form", [WEBP, JPEG, GIF])
def test_too_large_for_the_format(write, form):
    pixels = np.zeros((1, form.max_side + 1, 1), np.uint8)
    with pytest.raises(FormatError, match=f"too many for {form.name}.*png or tiff"):
        write(form, pixels)
    assert only_pixels(write(form, pixels[:, 1:])).shape[1] == form.max_side


def test_bmp_ends_at_4_gb(tmp_path):
    """This is found before anything is computed."""
    shape = 40_000, 40_000, 3
    frame = BandedFrame(shape, np.dtype(np.uint8), map(pytest.fail, ["computed"]), NOTHING)
    picture = Source([np.empty((1, 1, 3), np.uint8)], "PNG", 0)
    with pytest.raises(FormatError, match=r"too large for BMP.* png or tiff"):
        formats.write(tmp_path / "large", BMP, [frame], picture, scale=1.0, quality=95)


@pytest.mark.parametrize("form", [PNG, TIFF])
def test_memory_does_not_grow_with_the_height(tmp_path, form):
    band = RNG.integers(0, 256, (64, 500, 3), np.uint8)

    def peak(count):
        frame = BandedFrame(
            (64 * count, 500, 3), band.dtype, (band for _ in range(count)), Metadata()
        )
        picture = Source([np.empty((1, 1, 3), np.uint8)], "PNG", 0)
        tracemalloc.start()
        formats.write(tmp_path / "tall", form, [frame], picture, scale=1.0, quality=95)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak(1)
    assert peak(64) < 1.1 * peak(16) + 100_000  # tifffile keeps two numbers for each strip

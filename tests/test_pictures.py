"""What is read of picture files: pixels as they are, upright, and what belongs to them."""

import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms

from dvmsr_jax.images import ImageError
from dvmsr_jax.pictures.metadata import MAIN, Metadata
from dvmsr_jax.pictures.reading import Picture, from_pillow, to_pillow

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)
RGBA = RNG.integers(0, 256, (5, 7, 4), np.uint8)
DEEP = RNG.integers(0, 2**16, (5, 7, 4), np.uint16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(pixels, form, **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, form, **options)
    return file.getvalue()


def tiff(pixels, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def png(width, height, depth, colour_type, lines, *, transparent=b""):
    """Of unfiltered lines of bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = struct.pack(">2I5B", width, height, depth, colour_type, 0, 0, 0)
    chunks = [chunk(b"IHDR", header)]
    if transparent:
        chunks.append(chunk(b"tRNS", transparent))
    data = zlib.compress(b"".join(b"\0" + bytes(line) for line in lines))
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def only_frame(data):
    (frame,) = Picture(data).frames()
    return frame


def assert_read(data, expected):
    pixels = only_frame(data).pixels
    assert pixels.dtype == expected.dtype
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_8_bits(form):
    lossless = {"lossless": True} if form == "WEBP" else {}
    assert_read(saved(RGB, form, **lossless), RGB)
    if form != "BMP":
        opaque_or_clear = RGBA.copy()  # WebP forgets the colour of what is clear
        opaque_or_clear[:, :, 3] = np.where(RGBA[:, :, 3] < 9, 9, RGBA[:, :, 3])
        assert_read(saved(opaque_or_clear, form, **lossless), opaque_or_clear)
    if form != "WEBP":
        assert_read(saved(RGB[:, :, 0], form), RGB[:, :, :1])
        bilevel = Image.fromarray(RGB[:, :, 0] > 127)
        assert_read(saved(bilevel, form), np.where(RGB[:, :, :1] > 127, 255, 0).astype(np.uint8))


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_16_bit_tiff(byteorder, compression):
    options = {"byteorder": byteorder, "compression": compression}
    rgb = {"photometric": "rgb", **options}
    assert_read(tiff(DEEP[:, :, :3], **rgb), DEEP[:, :, :3])
    assert_read(tiff(DEEP, extrasamples=["unassalpha"], **rgb), DEEP)
    assert_read(tiff(DEEP, extrasamples=["unspecified"], **rgb), DEEP[:, :, :3])
    assert_read(tiff(DEEP[:, :, 0], photometric="minisblack", **options), DEEP[:, :, :1])
    if byteorder == "<":  # Pillow knows of no others
        inverted = tiff(DEEP[:, :, 0], photometric="miniswhite", **options)
        assert_read(inverted, 65535 - DEEP[:, :, :1])

    premultiplied = DEEP.copy()
    premultiplied[:, :, :3] = DEEP[:, :, :3] * (DEEP[:, :, 3:] / 65535)
    pixels = only_frame(tiff(premultiplied, extrasamples=["assocalpha"], **rgb)).pixels
    np.testing.assert_array_equal(pixels[:, :, 3], DEEP[:, :, 3])
    again = pixels[:, :, :3] * (DEEP[:, :, 3:] / 65535)
    assert np.abs(again - premultiplied[:, :, :3]).max() < 1

    planes = np.ascontiguousarray(np.moveaxis(DEEP[:, :, :3], 2, 0))
    with pytest.raises(ImageError, match="separate planes"):
        only_frame(tiff(planes, planarconfig="separate", **rgb))


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (2, 4), (3, 2), (4, 6)])
def test_16_bit_png(channels, colour_type):
    pixels = DEEP[:, :, :channels]
    lines = pixels.astype(">u2").reshape(5, -1).view(np.uint8)
    assert_read(png(7, 5, 16, colour_type, lines), pixels)


def test_a_transparent_colour():
    colour = struct.pack(">3H", *DEEP[2, 3, :3])
    lines = DEEP[:, :, :3].astype(">u2").reshape(5, -1).view(np.uint8)
    pixels = only_frame(png(7, 5, 16, 2, lines, transparent=colour)).pixels
    np.testing.assert_array_equal(pixels[:, :, :3], DEEP[:, :, :3])
    np.testing.assert_array_equal(np.argwhere(pixels[:, :, 3] == 0), [[2, 3]])
    # Four bits of grey, in which the colour is counted too.
    data = png(2, 1, 4, 0, [[0x5A]], transparent=struct.pack(">H", 5))
    expected = np.array([[[0x55, 0], [0xAA, 255]]], np.uint8)
    assert_read(data, expected)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(from_pillow(image).pixels, expected)
    # A palette, with alpha of its own.
    palette = Image.fromarray(RGB).quantize(4)
    pixels = only_frame(saved(palette, "PNG", transparency=bytes([0, 100, 200]))).pixels
    alpha = np.array([0, 100, 200, 255], np.uint8)[np.asarray(palette)]
    np.testing.assert_array_equal(pixels[:, :, 3], alpha)
    assert only_frame(saved(palette, "PNG")).pixels.shape[2] == 3


def test_cmyk_and_lab_become_rgb():
    flat = Image.new("RGB", (16, 16), (200, 60, 30))
    for form in ("JPEG", "TIFF"):
        pixels = only_frame(saved(flat.convert("CMYK"), form)).pixels
        assert np.abs(pixels.astype(int) - (200, 60, 30)).max() <= 3
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    frame = only_frame(saved(ImageCms.applyTransform(flat, to_lab), "TIFF", icc_profile=SRGB))
    assert np.abs(frame.pixels.astype(int) - (200, 60, 30)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright(form, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.new("L", (48, 32))
    image.paste(255, (0, 0, 24, 16))  # the upper left quarter
    frame = only_frame(saved(image.convert("RGB"), form, exif=exif, dpi=(100, 200)))
    quarter = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1)}
    down, right = quarter.get(orientation, (1, 0))
    height, width, _ = frame.pixels.shape
    assert (height, width) == ((32, 48) if orientation < 5 else (48, 32))
    centre = frame.pixels[height // 4 + down * height // 2, width // 4 + right * width // 2]
    assert centre.min() > 200
    assert frame.pixels.mean() < 80
    if form != "WEBP":
        dpi = (100, 200) if orientation < 5 else (200, 100)
        assert frame.metadata.dpi == pytest.approx(dpi, rel=1e-3)
    assert not frame.metadata.exif  # nothing else was in it


def rich_exif():
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "Camera Inc.", 3
    exif[ExifTags.Base.XResolution] = 72.0
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {ExifTags.Base.ExposureTime: 0.25, ExifTags.Base.ExifImageWidth: 7}
    )
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (50.0, 3.0, 1.5)
    return exif


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_metadata(form):
    data = saved(RGB, form, exif=rich_exif(), icc_profile=SRGB, dpi=(100, 200))
    metadata = only_frame(data).metadata
    assert metadata.icc == SRGB
    if form != "WEBP":
        assert metadata.dpi == pytest.approx((100, 200), rel=1e-3)
    assert metadata.exif == {
        MAIN: {ExifTags.Base.Make: "Camera Inc."},
        ExifTags.IFD.Exif: {ExifTags.Base.ExposureTime: 0.25, ExifTags.Base.ExifImageWidth: 7},
        ExifTags.IFD.GPSInfo: {ExifTags.GPS.GPSLatitude: (50.0, 3.0, 1.5)},
    }

    scaled = metadata.scaled(4.0, 20, 28)
    assert scaled.exif[ExifTags.IFD.Exif][ExifTags.Base.ExifImageWidth] == 28
    assert scaled.exif[MAIN] == metadata.exif[MAIN]
    if form != "WEBP":
        assert scaled.dpi == pytest.approx((400, 800), rel=1e-3)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])  # of JPEG, Pillow reads it
@pytest.mark.parametrize(("unit", "inches"), [(2, 1.0), (3, 2.54), (None, 1.0)])
def test_resolution_in_exif(form, unit, inches):
    exif = Image.Exif()
    exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution] = 300.0, 150.0
    if unit is not None:
        exif[ExifTags.Base.ResolutionUnit] = unit
    dpi = only_frame(saved(RGB, form, exif=exif)).metadata.dpi
    assert dpi == pytest.approx((300 * inches, 150 * inches), rel=1e-3)


def test_senseless_metadata_is_left_out():
    assert only_frame(saved(RGB[:, :, 0], "PNG", icc_profile=SRGB)).metadata == Metadata()
    assert only_frame(saved(RGB, "PNG", icc_profile=b"no profile")).metadata == Metadata()
    assert only_frame(saved(RGB, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff")).metadata == Metadata()
    assert only_frame(saved(RGB, "TIFF")).metadata == Metadata()  # Pillow says 1 dpi


def test_animations():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    first, *others = (Image.new("RGB", (8, 6), colour) for colour in colours)
    for form, plays in (("GIF", 4), ("WEBP", 3), ("PNG", 3)):
        options = {"lossless": True} if form == "WEBP" else {}
        several = {"append_images": others, "duration": [50, 60, 70], "loop": 3}
        picture = Picture(saved(first, form, save_all=True, **several, **options))
        assert (picture.format, len(picture), picture.plays) == (form, 3, plays)
        assert picture.is_animation
        for frame, colour, duration in zip(picture.frames(), colours, (50, 60, 70), strict=True):
            assert frame.metadata.duration == duration
            np.testing.assert_array_equal(frame.pixels[:, :, :3].reshape(-1, 3), [colour] * 48)
    assert Picture(saved(first, "GIF", save_all=True, append_images=others)).plays == 1
    endless = {"save_all": True, "append_images": others, "loop": 0}
    assert Picture(saved(first, "GIF", **endless)).plays == 0


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_animations_are_turned_upright(form):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    options = {"lossless": True} if form == "WEBP" else {}
    others = [Image.fromarray(np.ascontiguousarray(x)) for x in (RGB[::-1], RGB[:, ::-1])]
    data = saved(RGB, form, save_all=True, append_images=others, exif=exif.tobytes(), **options)
    for frame, pixels in zip(Picture(data).frames(), (RGB, *others), strict=True):
        np.testing.assert_array_equal(frame.pixels[:, :, :3], np.rot90(pixels, -1))


def test_frames_do_not_outgrow_an_animation():
    first, second = Image.new("L", (8, 6), 9), Image.new("L", (8, 6), 90)
    data = bytearray(saved(first, "GIF", save_all=True, append_images=[second]))
    place = data.rfind(b"," + struct.pack("<4H", 0, 0, 8, 6))
    data[place + 1] = 4  # the second frame starts in the fifth column
    shapes = [frame.pixels.shape for frame in Picture(bytes(data)).frames()]
    assert shapes == [(6, 8, 4)] * 2


def test_pages():
    grey = Image.fromarray(RGB[:3, :4, 0])
    data = saved(RGB, "TIFF", save_all=True, append_images=[grey], dpi=(90, 90))
    picture = Picture(data)
    assert (len(picture), picture.is_animation) == (2, False)
    assert picture.most_bytes == 5 * 7 * 3 + 3 * 4
    rgb, page = (frame.pixels for frame in picture.frames())
    np.testing.assert_array_equal(rgb, RGB)
    np.testing.assert_array_equal(page, RGB[:3, :4, :1])

    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:  # a thumbnail is no page
        writer.write(RGB[::2, ::2], subfiletype=1, photometric="rgb")
        writer.write(RGB, photometric="rgb")
    assert_read(file.getvalue(), RGB)


def test_memory_of_reading(tmp_path, monkeypatch):
    """Pixels are held once, and what Pillow has decoded is freed with the last frame."""
    opened = []

    def keep(*arguments):
        opened.append(open_image(*arguments))
        return opened[-1]

    open_image = Image.open
    monkeypatch.setattr(Image, "open", keep)
    pixels = np.tile(RGB, (400, 100, 1))
    picture = Picture(saved(pixels, "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))]))
    frames = picture.frames()
    tracemalloc.start()
    try:
        first = next(frames)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * pixels.nbytes
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(first.pixels, pixels)
    assert next(frames).pixels.shape == (9, 9, 1)
    with pytest.raises(ValueError, match="closed image"):
        opened[-1].getpixel((0, 0))


def test_previews_behind_a_jpeg_are_no_frames():
    data = saved(RGB, "MPO", save_all=True, append_images=[Image.fromarray(RGB[:2])])
    picture = Picture(data)
    assert (picture.format, len(picture)) == ("JPEG", 1)


def test_what_is_no_picture_is_named(tmp_path):
    def half(form):
        data = saved(np.tile(RGB, (20, 20, 1)), form)
        return data[: len(data) // 2]

    files = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"no picture", "is no PNG, JPEG"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no PNG, JPEG"),
        "half.png": (half("PNG"), "cannot be read"),
        "half.jpg": (half("JPEG"), "truncated"),
        "half.gif": (half("GIF"), "truncated"),
        "half.tif": (half("TIFF"), "cannot be read"),
        "half.webp": (half("WEBP"), "cannot be read"),
        "half.bmp": (half("BMP"), "truncated"),
        "float.tif": (tiff(np.zeros((3, 4), np.float32)), "32-bit or signed pixels"),
    }
    for name, (data, reason) in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ImageError, match=f"{name}: .*{reason}"):
            list(Picture(path).frames())
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        Picture(tmp_path / "missing.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png: is no regular file"):
        Picture(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="standard input: is empty"):
        Picture(b"")


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG"])
def test_size_is_checked_before_decoding(form, monkeypatch):
    data = saved(Image.new("RGB", (200, 100)), form)
    limit = Image.MAX_IMAGE_PIXELS
    assert len(Picture(data, max_pixels=20_000)) == 1
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ImageError, match=r"megapixels.*--max-megapixels"):
        Picture(data, max_pixels=19_998)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_frames_count_together(form):
    first, *others = (Image.new("RGB", (200, 100), colour) for colour in ("red", "lime", "blue"))
    data = saved(first, form, save_all=True, append_images=others)
    assert len(Picture(data, max_pixels=60_000)) == 3
    with pytest.raises(ImageError, match=r"megapixels.*--max-megapixels"):
        Picture(data, max_pixels=59_998)
    pages = saved(first, "TIFF", save_all=True, append_images=others)
    assert len(Picture(pages, max_pixels=20_000)) == 3


def test_frames_that_are_only_claimed():
    """Counting them takes neither time nor memory."""
    still = png(1, 1, 8, 2, [[1, 2, 3]])
    claim = b"acTL" + struct.pack(">2I", 2**30, 0)
    chunk = struct.pack(">I", 8) + claim + zlib.crc32(claim).to_bytes(4)
    forged = still[:33] + chunk + still[33:]
    with pytest.raises(ImageError, match="megapixels"):
        Picture(forged)
    picture = Picture(forged, max_pixels=2**31)
    with pytest.raises(ImageError, match="cannot be read"):
        list(picture.frames())


def test_pillow_images():
    for pixels in (RGB, RGBA, RGBA[:, :, :2], RGB[:, :, :1], DEEP[:, :, :1]):
        again = from_pillow(to_pillow(pixels)).pixels
        assert again.dtype == pixels.dtype
        np.testing.assert_array_equal(again, pixels)
    with pytest.raises(ImageError, match="16-bit"):
        to_pillow(DEEP)
    with pytest.raises(ImageError, match="32-bit"):
        from_pillow(Image.new("F", (3, 3)))

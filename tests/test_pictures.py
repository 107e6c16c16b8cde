"""Picture files are read with exact pixels, upright, and with their metadata."""

import io
import os
import struct
import sys
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms

from dvmsr_jax.images import ImageError
from dvmsr_jax.pictures import jobs
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


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + zlib.crc32(kind + data).to_bytes(4)


def png(width, height, depth, colour_type, lines, *, transparent=b""):
    """A PNG of unfiltered lines of bytes."""
    header = struct.pack(">2I5B", width, height, depth, colour_type, 0, 0, 0)
    chunks = [chunk(b"IHDR", header)]
    if transparent:
        chunks.append(chunk(b"tRNS", transparent))
    data = zlib.compress(b"".join(b"\0" + bytes(line) for line in lines))
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, chunk(b"IDAT", data), chunk(b"IEND", b"")])


# One row of four pixels in Adam7's first, fourth and sixth passes.
INTERLACED = png(4, 1, 8, 0, [[10], [30], [20, 40]])
INTERLACED = INTERLACED.replace(
    chunk(b"IHDR", struct.pack(">2I5B", 4, 1, 8, 0, 0, 0, 0)),
    chunk(b"IHDR", struct.pack(">2I5B", 4, 1, 8, 0, 0, 0, 1)),
)


def twelve_bits(values):
    """A TIFF of one row of an even number of 12-bit samples."""
    packed = b"".join(
        (a << 12 | b).to_bytes(3) for a, b in zip(values[::2], values[1::2], strict=True)
    )
    tags = [(256, len(values)), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, 1), (279, len(packed))]
    directory = b"".join(struct.pack("<2HI2H", tag, 3, 1, value, 0) for tag, value in tags)
    start = b"II*\0" + (8 + len(packed)).to_bytes(4, "little") + packed
    return start + len(tags).to_bytes(2, "little") + directory + bytes(4)


TWELVE_BITS = twelve_bits([0, 1000, 2000, 4095])
TWELVE_SCALED = np.rint(np.array([0, 1000, 2000, 4095]) * (65535 / 4095)).astype(np.uint16)
TWELVE_SCALED = TWELVE_SCALED.reshape(1, 4, 1)


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
        opaque_or_clear = RGBA.copy()  # WebP drops the colour of clear pixels
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
    if byteorder == "<":  # Pillow supports no others
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
    # Four bits of grey; the transparent colour has four bits, too.
    data = png(2, 1, 4, 0, [[0x5A]], transparent=struct.pack(">H", 5))
    expected = np.array([[[0x55, 0], [0xAA, 255]]], np.uint8)
    assert_read(data, expected)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(from_pillow(image).pixels, expected)
    # A palette with its own alpha.
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
    assert not frame.metadata.exif  # it contained nothing else


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
    """Pixels are held once, and Pillow's copy is freed with the last frame."""
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


def test_previews_after_a_jpeg_are_not_frames():
    data = saved(RGB, "MPO", save_all=True, append_images=[Image.fromarray(RGB[:2])])
    picture = Picture(data)
    assert (picture.format, len(picture)) == ("JPEG", 1)


def test_files_that_are_not_pictures_are_named(tmp_path):
    def half(form):
        data = saved(np.tile(RGB, (20, 20, 1)), form)
        return data[: len(data) // 2]

    files = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"no picture", "is not a PNG, JPEG"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a PNG, JPEG"),
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
    with pytest.raises(ImageError, match=r"pipe\.png: not a regular file"):
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
    assert len(Picture(data, max_pixels=80_000)) == 3  # of 4 bytes a pixel, which count as RGB
    with pytest.raises(ImageError, match=r"megapixels.*--max-megapixels"):
        Picture(data, max_pixels=79_998)
    pages = saved(first, "TIFF", save_all=True, append_images=others)
    assert len(Picture(pages, max_pixels=20_000)) == 3


def test_bytes_are_limited_too(monkeypatch):
    """A 49 kB file may claim 201 megapixels of 16-bit RGBA, which take 1.6 GB."""
    deep = {"photometric": "rgb", "compression": "zlib", "extrasamples": ["unassalpha"]}
    claims = tiff(np.zeros((100, 200, 4), np.uint16), **deep)
    claims_png = png(200, 100, 16, 6, [bytes(200 * 8)] * 100)
    monkeypatch.setattr(Image.Image, "load", None)
    for data in (claims, claims_png):
        assert len(Picture(data, max_pixels=54_000)) == 1  # 20,000 * 8 bytes / 3
        with pytest.raises(ImageError, match=r"megapixels of 8-bit RGB.*--max-megapixels"):
            Picture(data, max_pixels=53_000)


def test_threads_share_pillows_limit(tmp_path):
    """The limit and the warning filters are restored afterwards."""
    path = tmp_path / "a.png"
    path.write_bytes(saved(np.tile(RGB, (30, 30, 1)), "PNG"))
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        for frames in pool.map(lambda _: list(Picture(path).frames()), range(100)):
            assert len(frames) == 1
    assert before == (Image.MAX_IMAGE_PIXELS, warnings.filters)


@pytest.mark.parametrize("kind", ["still", "interlaced", "animation"])
def test_every_flipped_bit_in_a_png_is_found(kind):
    """Flips bits in the signature and all chunks, and truncates the file everywhere."""
    image = Image.fromarray(RGB)
    if kind == "animation":
        others = {"append_images": [image.rotate(180)], "duration": [50, 60]}
        data = saved(image, "PNG", save_all=True, **others)
    elif kind == "still":
        data = saved(image, "PNG", dpi=(72, 72), icc_profile=SRGB[:200])
    else:
        data = INTERLACED
    assert len(list(Picture(data).frames())) == (2 if kind == "animation" else 1)
    flipped = (
        data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :]
        for i in range(len(data))
        for bit in range(0, 8, 3)
    )
    for other in (*flipped, *(data[:end] for end in range(len(data)))):
        with pytest.raises(ImageError, match="standard input: "):
            list(Picture(other).frames())


def test_pngs_with_intact_chunks_and_damaged_pixels():
    lines = [b"\0" + bytes(line) for line in RGB.reshape(5, -1)]
    whole = zlib.compress(b"".join(lines))
    for pixels, damage in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "damaged.*incorrect data check"),
        (whole[:-4], "the checksum of its pixels is missing"),
        (zlib.compress(b"".join(lines[:3])), "rows of pixels are missing"),
    ):
        data = png(7, 5, 8, 2, RGB.reshape(5, -1))
        data = data.replace(chunk(b"IDAT", whole), chunk(b"IDAT", pixels))
        with pytest.raises(ImageError, match=damage):
            list(Picture(data).frames())
    data = png(7, 5, 8, 2, RGB.reshape(5, -1))
    wrong = data.replace(zlib.crc32(b"IDAT" + whole).to_bytes(4), b"oops")
    with pytest.raises(ImageError, match="the checksum of its chunk IDAT is wrong"):
        list(Picture(wrong).frames())
    # Surplus pixels are not damage.
    surplus = data.replace(
        chunk(b"IDAT", whole), chunk(b"IDAT", zlib.compress(b"".join(lines) + bytes(99)))
    )
    assert_read(surplus, RGB)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("layout", ["strips", "tiles"])
def test_missing_strips_and_tiles(compression, layout):
    pixels = np.tile(RGB, (8, 8, 1))
    where = {"tile": (16, 16)} if layout == "tiles" else {"rowsperstrip": 8}
    data = tiff(pixels, photometric="rgb", compression=compression, **where)
    assert_read(data, pixels)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        offsets = page.tags["TileOffsets" if layout == "tiles" else "StripOffsets"]
        sizes = page.tags["TileByteCounts" if layout == "tiles" else "StripByteCounts"]
    number = offsets.count
    for tag in (offsets, sizes):
        half = bytearray(data)
        width = {3: 2, 4: 4}[tag.dtype]
        for i in range(number // 2, number):
            half[tag.valueoffset + width * i : tag.valueoffset + width * (i + 1)] = bytes(width)
        with pytest.raises(
            ImageError, match=rf"{number - number // 2} of its {number} {layout} are missing"
        ):
            list(Picture(bytes(half)).frames())
    fewer = bytearray(data)  # the directory lists the first half only
    for tag in (offsets, sizes):
        fewer[tag.offset + 4 : tag.offset + 8] = (number // 2).to_bytes(4, "little")
    with pytest.raises(ImageError, match=rf"of its {number} {layout} are missing"):
        list(Picture(bytes(fewer)).frames())


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_gif_frames_are_cleared_to_transparent(mode):
    """Viewers do this even without a declared transparent colour."""
    frames = []
    for colour, place in (("red", (0, 0, 4, 6)), ("lime", (4, 0, 8, 6)), ("blue", (2, 2, 6, 4))):
        frame = Image.new("RGB", (8, 6), "black")
        frame.paste(colour, place)
        frames.append(frame.convert(mode))
    data = bytearray(saved(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2))
    places, start = [], 0
    while (start := data.find(b"\x21\xf9\x04", start) + 1) > 0:
        data[start + 2] &= ~1  # no transparent colour
        places.append(start)
    start, placed = 0, 0
    while (start := data.find(b",\0\0\0\0\x08\0\x06\0", start) + 1) > 0:
        if placed:  # later frames are the four columns on the right
            data[start : start + 8] = struct.pack("<4H", 4, 0, 4, 6)
        placed += 1
    assert len(places) == 3
    assert placed == 3
    first, second, third = (frame.pixels for frame in Picture(bytes(data)).frames())
    assert (first[:, :, 3] == 255).all()
    for later in (second, third):
        assert later.shape == (6, 8, 4)
        assert (later[:, :4, 3] == 0).all()
        assert (later[:, 4:, 3] == 255).all()


def test_avif():
    smooth = np.asarray(Image.linear_gradient("L").resize((40, 30)).convert("RGB"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pixels = only_frame(saved(smooth, "AVIF", quality=100, exif=exif)).pixels
    assert np.abs(pixels.astype(int) - np.rot90(smooth, -1)).max() <= 3
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    picture = Picture(saved(frames[0], "AVIF", save_all=True, append_images=frames[1:]))
    assert picture.is_animation
    assert [frame.pixels[8, 8].argmax() for frame in picture.frames()] == [0, 1]


def test_heic_requires_a_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(99))
    with pytest.raises(ImageError, match=r"a\.heic: is HEIC.*pip install pillow-heif"):
        Picture(path)


def test_heic():
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif, which is optional")
    smooth = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    contents = io.BytesIO()
    heif.from_pillow(smooth).save(contents, quality=-1)
    pixels = only_frame(contents.getvalue()).pixels
    assert np.abs(pixels.astype(int) - np.asarray(smooth)).max() <= 3


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".jp2", "JPEG 2000"), (".JXL", "JPEG XL"), (".nef", "camera raw")]
)
def test_unsupported_kinds(tmp_path, suffix, kind):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(saved(RGB, "TIFF"))  # like raw files, whose first page is a preview
    with pytest.raises(ImageError, match=f"a{suffix}: {kind} is not supported; convert it to PNG"):
        Picture(path)


@pytest.mark.parametrize("pattern", ["", "/*"])
def test_no_picture_of_a_folder_is_silently_skipped(tmp_path, monkeypatch, pattern):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("a.png", "b.avif", "c.heic", "d.jp2", "e.nef", "notes.txt", "link/f.gif"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "link").rename(tmp_path / "elsewhere")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    found = jobs.plan([f"{tmp_path}/in{pattern}"], None, scale=4.0, suffix=None)
    failed = {job.source.name: job.what for job in found if isinstance(job, jobs.Outcome)}
    assert {name: what.split()[0] for name, what in failed.items()} == {
        "d.jp2": "JPEG",
        "e.nef": "camera",
    }
    files = ["a.png", "b.avif", "c.heic"]
    planned = [job.source.name for job in found if isinstance(job, jobs.Job)]
    assert planned == (files if pattern else [*files, "f.gif"])


def test_a_link_to_the_output_folder_is_left_out(tmp_path):
    for name in ("in/a.png", "out/link/a_x4.png", "out/b_x4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    found = jobs.plan([f"{tmp_path}/in"], f"{tmp_path}/out", scale=4.0, suffix=None)
    assert [job.source for job in found] == [tmp_path / "in" / "a.png"]


def test_claimed_frames_that_do_not_exist():
    """Counting claimed frames takes neither time nor memory."""
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
    with pytest.raises(ImageError, match="no pixels: its size is 0x0"):
        from_pillow(Image.new("RGB", (0, 0)))


@pytest.mark.parametrize("loaded", [False, True])
def test_pillow_images_of_white_is_zero_and_12_bit_tiffs(loaded):
    inverted = tiff(DEEP[:, :, 0], photometric="miniswhite")
    for data, expected in ((inverted, 65535 - DEEP[:, :, :1]), (TWELVE_BITS, TWELVE_SCALED)):
        assert_read(data, expected)
        with Image.open(io.BytesIO(data)) as image:
            if loaded:
                image.load()
            np.testing.assert_array_equal(from_pillow(image).pixels, expected)

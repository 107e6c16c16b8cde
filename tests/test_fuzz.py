"""Damaged files of every format are either upscaled or reported."""

import faulthandler
import io
import zlib
from collections import Counter

import numpy as np
import tifffile
from PIL import Image, ImageCms, ImageSequence

from dvmsr_jax.pictures import jobs, png
from dvmsr_jax.pictures.metadata import Metadata
from dvmsr_jax.pictures.reading import BandedFrame
from dvmsr_jax.pictures.upscaler import PictureUpscaler

FILES = 2_000
SECONDS = 60  # limit for one file; it should take milliseconds


def originals():
    """Yields small intact files with their suffixes."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8))
    grey, palette = rgb.convert("L"), rgb.quantize(7)
    rgba = rgb.copy()
    rgba.putalpha(grey)
    deep = rng.integers(0, 2**16, (9, 13, 4), np.uint16)
    frames = [rgb, rgb.rotate(180), rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    exif = Image.Exif()
    exif[271], exif[274] = "maker", 6
    exif.get_ifd(0x8769)[0xA002] = 13
    exif.get_ifd(0x8825)[2] = (50.0, 3.0, 1.5)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rich = {"exif": exif.tobytes(), "icc_profile": profile, "dpi": (72, 72)}
    several = {"save_all": True, "append_images": frames[1:], "duration": [50, 60, 70]}

    def saved(image, form, **options):
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    def deep_png(pixels):
        file = io.BytesIO()
        png.write(file, iter([BandedFrame(pixels.shape, pixels.dtype, [pixels], Metadata())]), 1, 0)
        return file.getvalue()

    def tiff(pixels, **options):
        file = io.BytesIO()
        tifffile.imwrite(file, pixels, **options)
        return file.getvalue()

    yield from ((".png", saved(image, "PNG", **rich)) for image in (rgb, grey, rgba, palette))
    yield ".png", saved(palette, "PNG", transparency=bytes([0, 100, 200]))
    yield ".png", saved(rgb, "PNG", **several)
    yield from ((".png", deep_png(deep[:, :, :channels])) for channels in (1, 2, 3, 4))
    yield from (
        (".jpg", saved(image, "JPEG", **rich)) for image in (rgb, grey, rgb.convert("CMYK"))
    )
    yield ".jpg", saved(rgb, "JPEG", progressive=True)
    yield ".avif", saved(rgb, "AVIF", exif=exif.tobytes(), icc_profile=profile)
    yield ".avif", saved(rgb, "AVIF", **several)
    yield from ((".webp", saved(image, "WEBP", lossless=True)) for image in (rgb, rgba))
    yield ".webp", saved(rgba, "WEBP", exif=rich["exif"], icc_profile=profile)
    yield ".webp", saved(rgb, "WEBP", **several)
    yield from ((".gif", saved(image, "GIF", transparency=0)) for image in (palette, grey))
    yield ".gif", saved(rgb, "GIF", **several, loop=2)
    yield from ((".bmp", saved(image, "BMP", dpi=(72, 72))) for image in (rgb, rgba, palette))
    yield ".tif", saved(rgb, "TIFF", **rich)
    yield ".tif", saved(grey, "TIFF", compression="tiff_lzw", icc_profile=profile)
    yield ".tif", saved(rgba, "TIFF", compression="tiff_adobe_deflate", dpi=(72, 72))
    yield ".tif", saved(rgb, "TIFF", compression="jpeg")
    yield ".tif", saved(rgb.convert("1"), "TIFF", compression="group4")
    yield ".tif", saved(rgb, "TIFF", save_all=True, append_images=[grey, rgba])
    yield ".tif", tiff(deep[:, :, :3], photometric="rgb")
    yield ".tif", tiff(deep, photometric="rgb", extrasamples=["unassalpha"], compression="zlib")


def damaged(rng, intact, other):
    """Damages a file in one or two places."""
    data = bytearray(intact)
    for _ in range(rng.integers(1, 3)):
        place = int(rng.integers(len(data)))
        match rng.integers(8):
            case 0:  # it ends early
                del data[place:]
            case 1:  # a piece of another file
                start = int(rng.integers(len(other)))
                data[place : place + 20] = other[start : start + int(rng.integers(1, 40))]
            case 2:  # a number becomes extreme
                data[place : place + 2] = bytes([rng.choice([0, 1, 127, 128, 255])]) * 2
            case 3:  # a piece is lost or repeated
                data[place:place] = data[max(place - 8, 0) : place] * int(rng.integers(2))
                del data[place : place + int(rng.integers(8))]
            case _:  # a bit flips
                data[place] ^= 1 << rng.integers(8)
        if not data:
            break
    if data.startswith(b"\x89PNG") and rng.integers(2):
        renew_checksums(data)
    return bytes(data)


def renew_checksums(data):
    """Recomputes the CRCs of PNG chunks, so that damage to their contents reaches the decoder."""
    start = 8
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4])
        data[end : end + 4] = zlib.crc32(data[start + 4 : end]).to_bytes(4)[: len(data) - end]
        start = end + 4


def test_damaged_files(tmp_path, capfd, doubling):
    rng = np.random.default_rng(1)
    intact = list(originals())
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(FILES):
        suffix, data = intact[i % len(intact)]
        other = intact[rng.integers(len(intact))][1]
        (folder / f"{i:04}{suffix}").write_bytes(damaged(rng, data, other))
    files = sorted(map(str, folder.iterdir()))

    statuses: Counter[str] = Counter()
    for i, suffix in enumerate((None, ".png", ".tif", ".jpg", ".webp", ".gif", ".bmp")):
        results = tmp_path / f"results{suffix}"
        planned = jobs.plan(files[i::7], f"{results}/", scale=2.0, suffix=suffix)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        for outcome in jobs.run(planned, PictureUpscaler(doubling, 2), max_pixels=20_000):
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            statuses[outcome.status] += 1
            written = list(results.glob(f"*{outcome.source.stem}*"))
            if outcome.status == "done":
                assert list(map(str, written)) == [outcome.what]
                assert_whole(written[0])
            else:
                assert outcome.what
                assert not outcome.what.startswith("unexpected")
                assert not written
    faulthandler.cancel_dump_traceback_later()
    assert statuses["done"] + statuses["failed"] == FILES
    assert min(statuses["done"], statuses["failed"]) > FILES // 5
    printed = capfd.readouterr()
    assert not printed.out
    assert "Traceback" not in printed.err  # where libtiff reports errors


def assert_whole(path):
    """Every frame can be read."""
    if path.suffix == ".tif":  # Pillow does not support some 16-bit TIFFs
        with tifffile.TiffFile(path) as file:
            assert all(page.asarray().size for page in file.pages)
        return
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()

"""Pictures are read as upright uint8 RGB, or an error names the file."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dvmsr_jax.images import (
    ImageError,
    find_images,
    read_rgb,
    write_png,
)
from dvmsr_jax.samples import SAMPLES
from tests.test_pictures import TWELVE_BITS, TWELVE_SCALED


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_png_round_trip(tmp_path, rgb):
    path = tmp_path / "new" / "folder" / "picture.png"
    write_png(path, rgb)
    np.testing.assert_array_equal(read_rgb(path), rgb)
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_leaves_the_old_file(tmp_path, rgb, monkeypatch):
    path = tmp_path / "picture.png"
    write_png(path, rgb)

    def fill_the_disk(image, file, format):
        file.write_bytes(b"half a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        write_png(path, 255 - rgb)
    np.testing.assert_array_equal(read_rgb(path), rgb)
    assert list(tmp_path.iterdir()) == [path]


def test_every_mode_becomes_rgb(tmp_path, rgb):
    path = tmp_path / "picture.png"
    grey = rgb[:, :, 0]

    Image.fromarray(grey).save(path)
    np.testing.assert_array_equal(read_rgb(path), np.stack([grey] * 3, axis=2))

    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    np.testing.assert_array_equal(read_rgb(path), np.stack([grey] * 3, axis=2))

    Image.fromarray(np.dstack([rgb, grey])).save(path)
    np.testing.assert_array_equal(read_rgb(path), rgb)

    palette = Image.fromarray(rgb).quantize(4)
    palette.save(path, transparency=bytes([0, 100, 200, 255]))
    np.testing.assert_array_equal(read_rgb(path), np.asarray(palette.convert("RGB")))


def test_exif_orientation_is_applied(tmp_path, rgb):
    image = Image.fromarray(rgb)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_rgb(tmp_path / "turned.png"), np.rot90(rgb, -1))


def test_unreadable_files_are_named(tmp_path, rgb):
    whole = tmp_path / "whole.png"
    write_png(whole, rgb)
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(whole.read_bytes()[:-40])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name in ("missing.png", "folder.png", "text.png", "truncated.png", "float.tif"):
        with pytest.raises(ImageError, match=f"^{re.escape(str(tmp_path / name))}: "):
            read_rgb(tmp_path / name)


def test_training_pictures_are_read_as_others_are(tmp_path):
    """Only upscale.py's formats are allowed: of Pillow's others, EPS would run Ghostscript."""
    deep = np.random.default_rng(1).integers(0, 2**16, (5, 7, 4), np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ImageError, match=r"a\.png: is not a PNG, JPEG"):
        read_rgb(path)
    Image.fromarray(deep[:, :, 0].astype(np.uint8)).save(path, "PPM")
    with pytest.raises(ImageError, match=r"a\.png: is not a PNG, JPEG"):
        read_rgb(path)

    path = tmp_path / "a.tif"
    scaled = np.rint(deep / 257).astype(np.uint8)
    tifffile.imwrite(path, deep, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_rgb(path), scaled[:, :, :3])
    tifffile.imwrite(path, deep[:, :, 0], photometric="miniswhite")
    inverted = np.rint((65535 - deep[:, :, :1]) / 257).astype(np.uint8)
    np.testing.assert_array_equal(read_rgb(path), np.repeat(inverted, 3, axis=2))
    path.write_bytes(TWELVE_BITS)
    grey = np.rint(TWELVE_SCALED / 257).astype(np.uint8)
    np.testing.assert_array_equal(read_rgb(path), np.repeat(grey, 3, axis=2))


def test_find_images(tmp_path):
    names = ["b.PNG", "a.jpeg", "sub/c.webp", "sub/d.tif"]
    ignored = ["notes.txt", "png", ".hidden.png", ".cache/e.png", "sub/._c.png"]
    for name in names + ignored:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a.jpeg", "b.PNG", "sub/c.webp", "sub/d.tif"]

    for folder in (tmp_path / "folder.png", tmp_path / "missing"):
        with pytest.raises(ImageError, match=re.escape(str(folder))):
            find_images(folder)


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("in/a.png", "in/sub/b.png", "elsewhere/c.png", "outside.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = tmp_path / "in"
    for name, target in (
        *(("in/1_again", "in/sub"), ("in/2_loop", "in"), ("in/3_up", ""), ("in/gone", "nowhere")),
        *(("in/link", "elsewhere"), ("in/link2", "elsewhere"), ("elsewhere/back", "in")),
    ):
        (tmp_path / name).symlink_to(tmp_path / target)
    found = [path.relative_to(folder).as_posix() for path in find_images(folder)]
    assert found == ["a.png", "link/c.png", "sub/b.png"]
    (tmp_path / "entry").symlink_to(folder)
    assert len(find_images(tmp_path / "entry")) == 3


def test_unsupported_pictures_are_reported(tmp_path):
    for name in ("a.png", "b.avif", "c.HEIC", "d.jp2", "e.dng", "f.jxl", "notes.txt"):
        (tmp_path / name).touch()
    reported = {}
    found = find_images(tmp_path, on_error=lambda path, error: reported.update({path.name: error}))
    assert [path.name for path in found] == ["a.png", "b.avif", "c.HEIC"]
    assert sorted(reported) == ["d.jp2", "e.dng", "f.jxl"]
    assert re.search(r"d\.jp2: JPEG 2000 is not supported; convert it", str(reported["d.jp2"]))
    with pytest.raises(ImageError, match="is not supported"):
        find_images(tmp_path)


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    """os.scandir is replaced, since root can read every folder."""
    for name in ("a.png", "locked/b.png", "open/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(ImageError, match=r"locked: cannot be read \(Permission denied\)$"):
        find_images(tmp_path)
    left_out = {}
    found = find_images(tmp_path, on_error=left_out.__setitem__)
    assert [path.name for path in found] == ["a.png", "c.png"]
    assert list(left_out) == [tmp_path / "locked"]
    with pytest.raises(ImageError, match="Permission denied"):
        find_images(tmp_path / "locked", on_error=left_out.__setitem__)


def test_samples_are_colour_photographs():
    for path in SAMPLES:
        image = read_rgb(path)
        assert min(image.shape[:2]) >= 300
        assert np.ptp(image.astype(int), axis=2).mean() > 5

"""What is read is RGB, uint8 and upright, or an error that names the file."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvmsr_jax.images import (
    SAMPLES,
    ImageError,
    find_images,
    read_rgb,
    to_uint8,
    write_png,
)


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_png_comes_back_as_written(tmp_path, rgb):
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


def test_unreadable_files_are_named(tmp_path, rgb, monkeypatch):
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

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match=r"whole\.png: .*decompression bomb"):
        read_rgb(whole)


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


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    """Root can read them all, so the system's call is replaced."""
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


def test_to_uint8():
    values = np.array([-1, 0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1, 1.5], np.float32)
    np.testing.assert_array_equal(to_uint8(values), np.array([0, 0, 0, 1, 255, 255, 255], np.uint8))


def test_samples_are_colour_photographs():
    for path in SAMPLES:
        image = read_rgb(path)
        assert min(image.shape[:2]) >= 300
        assert np.ptp(image.astype(int), axis=2).mean() > 5

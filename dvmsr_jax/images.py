"""Pictures as uint8 RGB arrays: finding, reading and writing them."""

import contextlib
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from dvmsr_jax import files
from dvmsr_jax.pictures.reading import STILL_SUFFIXES, ImageError, Picture, check_is_read


def read_rgb(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a picture as RGB, upright according to its EXIF orientation.

    Grey becomes three equal channels, 16 bits are scaled to 8, transparency is dropped, and only
    the first of several frames or pages is read. Raises ImageError for a file that is missing,
    damaged, truncated, in a format that `Picture` does not read, or larger than its default limit.
    """
    with contextlib.closing(Picture(path).frames()) as frames:
        pixels = next(frames).pixels
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.shape[2] < 3:
        return np.repeat(pixels[:, :, :1], 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, :3])


def write_png(path: str | os.PathLike[str], image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes an RGB picture atomically, and creates its folder if needed."""
    with files.replacing(Path(path)) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def find_images(
    folder: str | os.PathLike[str],
    suffixes: Collection[str] = STILL_SUFFIXES,
    on_error: Callable[[Path, ImageError], None] | None = None,
) -> list[Path]:
    """The pictures in a folder and its subfolders, found by suffix, sorted.

    Hidden files and folders are skipped. Links to folders are followed, but no folder is visited
    twice, and none that contains `folder`.

    Raises ImageError if the folder is missing or contains no pictures, if a subfolder cannot be
    read, and for pictures in formats that are not supported (`reading.UNREAD`). In the last two
    cases, `on_error` is called instead if given, with the path and the error.
    """

    def report(path: Path, problem: ImageError) -> None:
        if on_error is None or path == Path(folder):
            raise problem
        on_error(path, problem)

    def unreadable(error: OSError) -> None:
        path = Path(error.filename)
        report(path, ImageError(f"{path}: cannot be read ({error.strerror})"))

    if not os.path.isdir(folder):
        raise ImageError(f"{folder}: no such folder")
    found = []
    top = Path(os.path.realpath(folder))
    visited = {*top.parents}  # a link to one of them would lead out of the folder
    waiting = [Path(folder)]  # links come last, so that files are listed by their real folder
    while waiting:
        for parent, folders, names in os.walk(waiting.pop(0), onerror=unreadable):
            real = Path(os.path.realpath(parent))
            if real in visited:
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [path for name in folders if (path := Path(parent, name)).is_symlink()]
            for path in (Path(parent, name) for name in names if not name.startswith(".")):
                if path.suffix.lower() in suffixes:
                    found.append(path)
                    continue
                try:
                    check_is_read(path)
                except ImageError as error:
                    report(path, error)
    if not found:
        raise ImageError(f"{folder}: no pictures ({' '.join(sorted(suffixes))})")
    return sorted(found)


def side_by_side(
    panels: Mapping[str, UInt8[np.ndarray, "h w 3"]],
) -> UInt8[np.ndarray, "H W 3"]:
    """Places pictures of equal size in a row, each under its label."""
    height, width, _ = next(iter(panels.values())).shape
    gap, header = 8, 20
    canvas = Image.new("RGB", (len(panels) * (width + gap) - gap, height + header), color="white")
    draw = ImageDraw.Draw(canvas)
    for i, (label, panel) in enumerate(panels.items()):
        canvas.paste(Image.fromarray(panel), (i * (width + gap), header))
        draw.text((i * (width + gap) + 4, 4), label, fill="black")
    return np.asarray(canvas)

"""Reading and writing pictures: uint8 RGB arrays in memory, files by Pillow."""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import skimage.data
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageOps

from dvmsr_jax import files
from dvmsr_jax.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff"})
"""What `find_images` takes for a picture, in lower case."""

SAMPLES = tuple(
    Path(skimage.data.__file__).parent / name
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
)
"""The colour photographs inside scikit-image's wheel, so there without a download."""


class ImageError(UserError):
    """A picture, or a folder of them, that cannot be used; the message names it."""


def read_rgb(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture as RGB, upright by its EXIF orientation.

    Grey becomes three equal channels, 16-bit grey is scaled to 8 bits, transparency is dropped, and
    of several frames the first is taken. Raises ImageError for a file that is missing, is no
    picture, is damaged or truncated, is larger than Pillow's limit against decompression bombs
    (`PIL.Image.MAX_IMAGE_PIXELS` sets it), or has 32-bit pixels, whose range nothing tells.
    """
    if not Path(path).is_file():
        raise ImageError(f"{path}: no such file")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.info.pop("transparency", None)  # Pillow warns about dropping it
            if image.mode.startswith("I;16"):  # convert() would saturate all above 255
                grey = np.rint(np.asarray(image) / 257).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise ValueError("32-bit pixels; save it with 8 or 16 bits")
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise whatever they trip over
        raise ImageError(f"{path}: not a readable picture ({error})") from error


def write_png(path: str | os.PathLike[str], image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes an RGB picture, making its folder; whatever happens, PATH is whole or untouched."""
    with files.replacing(Path(path)) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def find_images(
    folder: str | os.PathLike[str],
    suffixes: Collection[str] = SUFFIXES,
    on_error: Callable[[Path, ImageError], None] | None = None,
) -> list[Path]:
    """The pictures in a folder and its subfolders, by suffix and sorted; hidden ones are skipped.

    Raises ImageError if the folder is missing or holds none, or a subfolder cannot be read; with
    `on_error`, that is called with it and the error instead, and the subfolder left out.
    """

    def unreadable(error: OSError) -> None:
        path = Path(error.filename)
        problem = ImageError(f"{path}: cannot be read ({error.strerror})")
        if on_error is None or path == Path(folder):
            raise problem from error
        on_error(path, problem)

    if not os.path.isdir(folder):
        raise ImageError(f"{folder}: no such folder")
    found = []
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in suffixes]
    if not found:
        raise ImageError(f"{folder}: no pictures ({' '.join(sorted(suffixes))}) in it")
    return sorted(found)


def to_uint8(image: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Values in [0, 1] to the nearest of 0 .. 255; what leaves that range is clamped."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def side_by_side(
    panels: Mapping[str, UInt8[np.ndarray, "h w 3"]],
) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures of one size in a row, each under its label."""
    height, width, _ = next(iter(panels.values())).shape
    gap, header = 8, 20
    canvas = Image.new("RGB", (len(panels) * (width + gap) - gap, height + header), color="white")
    draw = ImageDraw.Draw(canvas)
    for i, (label, panel) in enumerate(panels.items()):
        canvas.paste(Image.fromarray(panel), (i * (width + gap), header))
        draw.text((i * (width + gap) + 4, 4), label, fill="black")
    return np.asarray(canvas)

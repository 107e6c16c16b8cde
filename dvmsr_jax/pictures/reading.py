"""Pictures as people have them: what is in a file, frame by frame, and what has to stay with it.

Pixels are (h, w, channels), uint8 or uint16: 1 channel is grey, 2 grey and alpha, 3 RGB, 4 RGB and
alpha. Palettes become RGB, bilevel pictures grey, and CMYK and Lab sRGB.
"""

import contextlib
import io
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from dvmsr_jax import images
from dvmsr_jax.images import ImageError
from dvmsr_jax.pictures.metadata import Metadata, is_turned, read_exif, read_metadata, tiff_tag

SUFFIXES = images.SUFFIXES | {".gif", ".apng"}
"""What is taken for a picture in a folder, in lower case."""

MAX_PIXELS = 500_000_000
"""Default limit of a picture's size, against decompression bombs."""

Pixels = UInt8[np.ndarray, "_ _ _"] | UInt16[np.ndarray, "_ _ _"]

_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
Image.init()  # open() with a list of formats does not load their plugins


@dataclass(frozen=True)
class Frame:
    """A frame of an animation, a page, or the whole picture, upright."""

    pixels: Pixels
    metadata: Metadata


@dataclass(frozen=True)
class BandedFrame:
    """A frame whose pixels come in bands of rows, from top to bottom."""

    shape: tuple[int, int, int]
    """Of the whole: height, width, channels."""
    dtype: np.dtype
    """uint8 or uint16."""
    bands: Iterable[Pixels]
    metadata: Metadata

    def regrouped(self, rows: int) -> Iterator[Pixels]:
        """The pixels in bands of this many rows; the last may have fewer."""
        held: list[np.ndarray] = []
        for band in self.bands:
            held.append(band)
            if sum(map(len, held)) < rows:
                continue
            band = np.concatenate(held) if len(held) > 1 else band
            whole = len(band) - len(band) % rows
            yield from (band[i : i + rows] for i in range(0, whole, rows))
            held = [band[whole:]] if whole < len(band) else []
        if held:
            yield np.concatenate(held)


class Picture:
    """A file. Its frames are decoded one at a time, when they are asked for.

    Args:
        source: path of a PNG, JPEG, WebP, TIFF, BMP or GIF file, or the contents of one. What it
            is shows in what it holds and not in its name.
        max_pixels: limit of the size, a page's or that of an animation's frames together, checked
            before anything is decoded.

    Raises:
        ImageError: the file is missing, empty, no picture, damaged or too large; names it.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS):
        self._source, self._max_pixels = source, max_pixels
        with self._reading():
            if not isinstance(source, bytes) and not os.path.isfile(source):
                there = os.path.exists(source)
                raise ImageError("is no regular file; - reads pipes" if there else "no such file")
            if not (len(source) if isinstance(source, bytes) else os.path.getsize(source)):
                raise ImageError("is empty")
        with self._reading(), self._open() as image:
            # MPO is JPEG with more pictures behind it: previews, depth maps and the like.
            self.format = "JPEG" if image.format == "MPO" else str(image.format)
            """Pillow's name of it."""
            self._size = image.size
            count = 1 if self.format == "JPEG" else getattr(image, "n_frames", 1)
            self._frames: Sequence[int]
            self.most_bytes: int
            """That the pixels of all pages, or of all frames of an animation, may have."""
            if self.format == "TIFF":
                self._frames, self.most_bytes = _find_pages(image, count)
            else:
                shown_apart = image.info.get("default_image", False)  # to viewers without APNG
                self._frames = range(int(shown_apart), count)
                pixels = math.prod(image.size) * len(self._frames)
                if pixels > max_pixels:  # an animation is held whole, if it is not written to PNG
                    raise Image.DecompressionBombError
                self.most_bytes = 4 * pixels
            if not self._frames:
                raise ImageError("holds nothing but thumbnails and masks")
            self.plays = _plays(image)
            """How often an animation is shown; 0: forever."""

    def __len__(self) -> int:
        """Number of frames or pages."""
        return len(self._frames)

    @property
    def is_animation(self) -> bool:
        """Whether there are several frames, and not pages."""
        return len(self) > 1 and self.format != "TIFF"

    def frames(self) -> Iterator[Frame]:
        """Every frame or page. Raises ImageError, naming the file, if one cannot be decoded."""
        with self._reading():
            image = self._open()
        with contextlib.closing(image):
            for i in self._frames:
                with self._reading():
                    image.seek(i)
                    frame = self._read(image, i)
                if i == self._frames[-1]:
                    image.close()  # frees what it has decoded, while the frame is used
                yield frame

    def _read(self, image: Image.Image, i: int) -> Frame:
        rawmode = _rawmode(image)  # before the image is loaded, which reading EXIF does to PNG
        exif, turned = read_exif(image), is_turned(image)
        planes = tiff_tag(image, TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
        bits = tiff_tag(image, TiffImagePlugin.BITSPERSAMPLE, ())
        if planes and 16 in bits:  # Pillow misreads them
            raise ImageError("16-bit samples in separate planes; save it with interleaved ones")
        if ";16" in rawmode and image.mode in ("RGB", "RGBA") and not self.is_animation:
            pixels = self._read_16_bit(image, i, rawmode)
        elif self.format == "GIF" and self.is_animation:  # its mode and size change on the way
            width, height = self._size
            pixels = np.array(image.convert("RGBA"))[:height, :width]
        elif self.is_animation:  # whose decoder goes on from what it has
            pixels = _pixels(ImageOps.exif_transpose(image), rawmode)
        else:
            ImageOps.exif_transpose(image, in_place=True)
            pixels = _pixels(image, rawmode)
        return Frame(pixels, read_metadata(image, exif, turned, channels=pixels.shape[2]))

    def _read_16_bit(self, image: Image.Image, i: int, rawmode: str) -> Pixels:
        """Pillow keeps one byte of such samples, so it is asked once for each."""

        def decode(rawmode: str) -> np.ndarray:
            with self._open() as image:
                image.seek(i)
                image.tile = [  # type: ignore[attr-defined]
                    tile._replace(
                        args=rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:])
                    )
                    for tile in image.tile  # type: ignore[attr-defined]
                ]
                ImageOps.exif_transpose(image, in_place=True)
                return np.array(image, np.uint16)

        samples, _, order = rawmode.partition(";16")
        if samples == "LA":  # as four samples of 8 bits
            pixels = decode("RGBA")
            pixels = pixels[:, :, ::2] << 8 | pixels[:, :, 1::2]
        else:
            order = {"N": "L" if sys.byteorder == "little" else "B"}.get(order, order)
            straight = samples.replace("a", "A")
            high, low = f"{straight};16{order}", f"{straight};16{'B' if order == 'L' else 'L'}"
            pixels = decode(high) << 8 | decode(low)
        if samples == "RGBa":  # premultiplied
            alpha = np.maximum(pixels[:, :, 3:], 1).astype(np.float32)
            colour = np.minimum(np.rint(pixels[:, :, :3] * (65535 / alpha)), 65535)
            pixels[:, :, :3] = colour.astype(np.uint16)
        return _transparent_colour(pixels, image.info.get("transparency"))

    def _open(self) -> Image.Image:
        source = self._source
        return Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, "r", _FORMATS
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Whatever Pillow trips over becomes an ImageError that names the file."""
        name = "standard input" if isinstance(self._source, bytes) else self._source
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = self._max_pixels // 2  # from there on it warns
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error
        except MemoryError:
            raise
        except Image.DecompressionBombError as error:
            megapixels = self._max_pixels / 1e6
            raise ImageError(
                f"{name}: has more than {megapixels:g} megapixels; if you trust it, raise the limit"
                " (--max-megapixels)"
            ) from error
        except UnidentifiedImageError as error:
            kinds = "PNG, JPEG, WebP, TIFF, BMP or GIF"
            raise ImageError(
                f"{name}: is no {kinds} picture, or is damaged, or of a rare kind"
            ) from error
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"{name}: cannot be read ({reason})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def from_pillow(image: Image.Image) -> Frame:
    """The current frame of a Pillow image, which stays as it is.

    Raises ImageError for 32-bit pixels, whose range nothing tells.
    """
    rawmode = _rawmode(image)  # before the image is loaded
    exif, turned = read_exif(image), is_turned(image)
    upright = ImageOps.exif_transpose(image)
    pixels = _pixels(upright, rawmode)
    return Frame(pixels, read_metadata(image, exif, turned, channels=pixels.shape[2]))


def to_pillow(pixels: Pixels) -> Image.Image:
    """A Pillow image. It holds 16 bits of grey only: raises ImageError if there is more."""
    if pixels.shape[2] == 1:
        return Image.fromarray(pixels[:, :, 0])
    if pixels.dtype != np.uint8:
        raise ImageError("Pillow's images cannot hold 16-bit pixels with colour or alpha")
    return Image.fromarray(pixels)


def _pixels(image: Image.Image, rawmode: str) -> Pixels:
    """The pixels of a loaded image."""
    mode = image.mode
    if mode in ("I", "F"):
        raise ImageError("32-bit or signed pixels, of unknown range; save it with 8 or 16 bits")
    key = image.info.get("transparency")
    if mode.startswith("I;16"):
        pixels = _converted(image, mode).astype(np.uint16, copy=False)[:, :, None]
        if rawmode == "I;12":
            pixels = np.rint(pixels * (65535 / 4095)).astype(np.uint16)
        if tiff_tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) == 0:  # 0 is white
            pixels = 65535 - pixels
        return _transparent_colour(pixels, key)
    if mode in ("1", "L"):
        if isinstance(key, int) and rawmode in ("L;2", "L;4"):  # counted in the file's bits
            key *= 255 // (2 ** int(rawmode[2:]) - 1)
        return _transparent_colour(_converted(image, "L")[:, :, None], key)
    if mode == "RGB":
        return _transparent_colour(_converted(image, "RGB"), key)
    if mode in ("CMYK", "LAB"):
        return np.array(_to_srgb(image))
    if mode in ("LA", "La"):
        return _converted(image, "LA")
    alpha = image.has_transparency_data or mode in ("RGBA", "RGBa", "PA")
    return _converted(image, "RGBA" if alpha else "RGB")


def _converted(image: Image.Image, mode: str) -> np.ndarray:
    """np.array(image.convert(mode)), but by rows: Pillow copies thrice on the way there."""

    def rows(top: int, bottom: int) -> np.ndarray:
        return np.asarray(image.crop((0, top, image.width, bottom)).convert(mode))

    one = rows(0, 1)
    pixels = np.empty((image.height, *one.shape[1:]), one.dtype)
    step = max(1, _CONVERTED // max(1, image.width))
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        pixels[top:bottom] = rows(top, bottom)
    return pixels


_CONVERTED = 2**18  # pixels at a time


def _transparent_colour(pixels: Pixels, colour: Any) -> Pixels:
    """With alpha 0 where pixels have the one colour that PNG and GIF can declare transparent."""
    if colour is None:
        return pixels
    maximum = np.iinfo(pixels.dtype).max
    alpha = np.where((pixels == np.asarray(colour)).all(axis=2, keepdims=True), 0, maximum)
    return np.concatenate([pixels, alpha.astype(pixels.dtype)], axis=2)


def _to_srgb(image: Image.Image) -> Image.Image:
    """By the image's profile if it has one that is intact, and otherwise by Pillow's formula."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        if image.mode == "LAB":
            profile: Any = ImageCms.createProfile("LAB")
        else:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
        return cast(Image.Image, converted)
    except (KeyError, OSError, ImageCms.PyCMSError):
        return image.convert("RGB")


def _rawmode(image: Image.Image) -> str:
    """How the decoder is told that a file's pixels lie."""
    for tile in getattr(image, "tile", ()):
        return tile.args if isinstance(tile.args, str) else str(tile.args and tile.args[0])
    return ""


def _find_pages(image: Image.Image, count: int) -> tuple[list[int], int]:
    """Which of a TIFF's images are pages, and how many bytes their pixels may have."""
    pages, most_bytes = [], 0
    for i in range(count):
        image.seek(i)
        if tiff_tag(image, 254, 0) & 0b101:  # a thumbnail or a mask
            continue
        pages.append(i)
        samples = tiff_tag(image, TiffImagePlugin.SAMPLESPERPIXEL, 1)
        if tiff_tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) == 3:  # a palette
            samples += 2
        deep = max(tiff_tag(image, TiffImagePlugin.BITSPERSAMPLE, (1,)), default=1) > 8
        most_bytes += math.prod(image.size) * samples * (2 if deep else 1)
    return pages, most_bytes


def _plays(image: Image.Image) -> int:
    loop = image.info.get("loop", 1 if image.format == "PNG" else None)
    if image.format == "GIF":  # counts repetitions, and says nothing if there are none
        loop = 1 if loop is None else loop + (loop > 0)
    return int(loop or 0)

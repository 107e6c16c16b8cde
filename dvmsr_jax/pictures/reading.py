"""Reads picture files frame by frame, with their metadata.

Pixels are (h, w, channels), uint8 or uint16: 1 channel is grey, 2 grey and alpha, 3 RGB, 4 RGB and
alpha. Palettes are converted to RGB, bilevel pictures to grey, and CMYK and Lab to sRGB.
"""

import contextlib
import io
import math
import os
import struct
import sys
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import (
    GifImagePlugin,
    Image,
    ImageCms,
    ImageOps,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from dvmsr_jax.errors import UserError
from dvmsr_jax.pictures import integrity
from dvmsr_jax.pictures.metadata import Metadata, is_turned, read_exif, read_metadata, tiff_tag

STILL_SUFFIXES = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".hif"),
    }
)
"""Suffixes of files that usually hold one picture, in lower case."""

SUFFIXES = STILL_SUFFIXES | {".gif", ".apng"}
"""Suffixes of all files that are read, in lower case."""

UNREAD = {
    **dict.fromkeys((".jp2", ".j2k", ".jpf", ".jpx"), "JPEG 2000"),
    ".jxl": "JPEG XL",
    **dict.fromkeys(
        (
            *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".orf", ".rw2"),
            *(".raf", ".pef", ".srw"),
        ),
        "camera raw",
    ),
}
"""Suffixes of photographs that are reported but not read, in lower case, with their format."""

MAX_PIXELS = 500_000_000
"""Default limit on a picture's size, in pixels of 8-bit RGB, against decompression bombs."""

_LIMITED_BYTES = 3  # bytes of such a pixel

Pixels = UInt8[np.ndarray, "_ _ _"] | UInt16[np.ndarray, "_ _ _"]

_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
Image.init()  # open() with a list of formats does not load their plugins


class ImageError(UserError):
    """A picture, or a folder of them, that cannot be used; the message names it."""


def check_is_read(path: str | os.PathLike[str]) -> None:
    """Raises ImageError, naming the file, if its suffix is one of UNREAD."""
    kind = UNREAD.get(os.path.splitext(path)[1].lower())
    if kind is not None:
        raise ImageError(f"{path}: {kind} is not supported; convert it to PNG or TIFF first")


@dataclass(frozen=True)
class Frame:
    """A frame of an animation, a page of a document, or a whole picture, upright."""

    pixels: Pixels
    metadata: Metadata


@dataclass(frozen=True)
class BandedFrame:
    """A frame whose pixels arrive in bands of rows, from top to bottom."""

    shape: tuple[int, int, int]
    """Height, width and channels of the whole frame."""
    dtype: np.dtype
    """uint8 or uint16."""
    bands: Iterable[Pixels]
    metadata: Metadata

    def regrouped(self, rows: int) -> Iterator[Pixels]:
        """Yields the pixels in bands of `rows` rows; the last band may have fewer."""
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
    """A picture file, whose frames are decoded lazily, one at a time.

    Args:
        source: path of a PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF file, or the contents of one; also
            HEIC if pillow-heif is installed. The format is recognised by the contents.
        max_pixels: limit on the size of a page, or of all frames of an animation together. It also
            limits the decoded bytes, to those of as many pixels of 8-bit RGB. Both are checked
            before anything is decoded.

    Raises:
        ImageError: the file is missing, empty, damaged, too large or not a picture.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS):
        self._source, self._max_pixels = source, max_pixels
        if not isinstance(source, bytes):
            check_is_read(source)
        with self._reading():
            if not isinstance(source, bytes) and not os.path.isfile(source):
                there = os.path.exists(source)
                raise ImageError("not a regular file; use - for pipes" if there else "no such file")
            if not self._length():
                raise ImageError("is empty")
        with self._reading(), self._open() as image:
            # MPO is JPEG followed by more pictures: previews, depth maps and the like.
            self.format = "JPEG" if image.format == "MPO" else str(image.format)
            """The format's name in Pillow."""
            self._size = image.size
            # HEIC may hold several pictures too, and opens at the primary one.
            single = self.format in ("JPEG", "HEIF")
            self._frames: Sequence[int]
            self.pixels: int
            """Of all pages, or of all frames of an animation."""
            self.most_bytes: int
            """Upper limit of the bytes of all pages, or of all frames of an animation."""
            if self.format == "TIFF":
                self._frames, self.pixels, page_bytes = _find_pages(image, image.n_frames)  # type: ignore[attr-defined]
                self.most_bytes = sum(page_bytes)
                largest = max(page_bytes, default=0)
            else:
                shown_apart = image.info.get("default_image", False)  # to viewers without APNG
                count = getattr(image, "n_frames", 1)
                self._frames = [image.tell()] if single else range(int(shown_apart), count)
                self.pixels = pixels = math.prod(image.size) * len(self._frames)
                if pixels > max_pixels:  # most formats are written with all frames in memory
                    raise Image.DecompressionBombError
                self.most_bytes = pixels * (4 if self.is_animation else _bytes_per_pixel(image))
                largest = self.most_bytes
            if largest > _LIMITED_BYTES * max_pixels:
                raise Image.DecompressionBombError
            if not self._frames:
                raise ImageError("contains only thumbnails and masks")
            self.plays = _plays(image)
            """Number of times that an animation plays; 0 means endlessly."""

    def __len__(self) -> int:
        """The number of frames or pages."""
        return len(self._frames)

    @property
    def is_animation(self) -> bool:
        """Whether there are several frames, as opposed to pages."""
        return len(self) > 1 and self.format != "TIFF"

    def is_lossless_webp(self) -> bool:
        """Whether this is a WebP whose first frame is compressed without loss."""
        if self.format != "WEBP":
            return False
        with self._reading(), self._file() as file:
            return _first_webp_frame(file, 12, self._length()) == b"VP8L"

    def frames(self) -> Generator[Frame, None, None]:
        """Yields every frame or page. Raises ImageError if one is damaged."""
        with self._reading():
            if self.format == "PNG":
                with self._file() as file:
                    integrity.check_png(file)
            image = self._open()
        with contextlib.closing(image):
            for i in self._frames:
                with self._reading():
                    image.seek(i)
                    if self.format == "TIFF":
                        integrity.check_tiff(image, self._length())
                    frame = self._read(image, i)
                if i == self._frames[-1]:
                    image.close()  # frees its decoded pixels while the frame is used
                yield frame

    def _read(self, image: Image.Image, i: int) -> Frame:
        rawmode = _rawmode(image)  # before reading EXIF, which loads a PNG
        exif, turned = read_exif(image), is_turned(image)
        planes = tiff_tag(image, TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
        bits = tiff_tag(image, TiffImagePlugin.BITSPERSAMPLE, ())
        if planes and 16 in bits:  # which Pillow misreads
            raise ImageError("16-bit samples in separate planes; save it with interleaved ones")
        if ";16" in rawmode and image.mode in ("RGB", "RGBA") and not self.is_animation:
            pixels = self._read_16_bit(image, i, rawmode)
        elif self.format == "GIF" and self.is_animation:  # mode and size may change between frames
            width, height = self._size
            rgba = image.convert("RGBA")
            pixels = np.array(rgba)[:height, :width]
            _clear_disposed(cast(GifImagePlugin.GifImageFile, image), rgba)
        elif self.is_animation:  # the decoder needs the unchanged image for the next frame
            pixels = _pixels(ImageOps.exif_transpose(image), rawmode)
        else:
            ImageOps.exif_transpose(image, in_place=True)
            pixels = _pixels(image, rawmode, white_is_zero=_is_white_zero(image))
        return Frame(pixels, read_metadata(image, exif, turned, channels=pixels.shape[2]))

    def _read_16_bit(self, image: Image.Image, i: int, rawmode: str) -> Pixels:
        """Decodes twice, for the high and the low bytes: Pillow keeps one byte of each sample."""

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
                return _converted(image, image.mode)

        samples, _, order = rawmode.partition(";16")
        if samples == "LA":  # as four samples of 8 bits
            both = decode("RGBA")
            pixels, lower = both[:, :, ::2].astype(np.uint16), both[:, :, 1::2]
        else:
            order = {"N": "L" if sys.byteorder == "little" else "B"}.get(order, order)
            straight = samples.replace("a", "A")
            high, low = f"{straight};16{order}", f"{straight};16{'B' if order == 'L' else 'L'}"
            pixels, lower = decode(high).astype(np.uint16), decode(low)
        pixels <<= 8
        pixels |= lower
        if samples == "RGBa":  # premultiplied
            alpha = np.maximum(pixels[:, :, 3:], 1).astype(np.float32)
            colour = np.minimum(np.rint(pixels[:, :, :3] * (65535 / alpha)), 65535)
            pixels[:, :, :3] = colour.astype(np.uint16)
        return _transparent_colour(pixels, image.info.get("transparency"))

    def _file(self) -> io.BufferedIOBase:
        source = self._source
        return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")

    def _length(self) -> int:
        source = self._source
        return len(source) if isinstance(source, bytes) else os.path.getsize(source)

    def _open(self) -> Image.Image:
        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source
        try:
            return Image.open(source, "r", _FORMATS)
        except UnidentifiedImageError:
            with self._file() as file:
                start = file.read(12)
            if start[4:8] != b"ftyp" or start[8:] not in _HEIC_BRANDS:
                raise
            try:
                import pillow_heif
            except ImportError as error:
                raise ImageError(
                    "is HEIC, which requires an optional library: pip install pillow-heif"
                ) from error
            pillow_heif.register_heif_opener()
            return Image.open(source, "r", ("HEIF",))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Converts any exception of Pillow to an ImageError that names the file."""
        name = "standard input" if isinstance(self._source, bytes) else self._source
        try:
            with _lenient_pillow(self._max_pixels):
                yield
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error
        except MemoryError:
            raise
        except Image.DecompressionBombError as error:
            megapixels = self._max_pixels / 1e6
            raise ImageError(
                f"{name}: needs more memory than {megapixels:g} megapixels of 8-bit RGB; if you"
                " trust it, raise the limit (upscale.py --max-megapixels)"
            ) from error
        except UnidentifiedImageError as error:
            kinds = "PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF or HEIC"
            raise ImageError(
                f"{name}: is not a {kinds} picture, or is damaged, or of a rare kind"
            ) from error
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"{name}: cannot be read ({reason})") from error


_lenient_lock, _lenient_undo = threading.Lock(), contextlib.ExitStack()
_lenient_count = 0


@contextlib.contextmanager
def _lenient_pillow(max_pixels: int) -> Iterator[None]:
    """Sets Pillow's size limit and silences warnings.

    Both are global to the process: if several threads read at once, the first changes them and the
    last restores them.
    """
    global _lenient_count
    with _lenient_lock:
        if not _lenient_count:
            _lenient_undo.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _lenient_undo.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            Image.MAX_IMAGE_PIXELS = max_pixels // 2  # above it Pillow warns, above twice it raises
        _lenient_count += 1
    try:
        yield
    finally:
        with _lenient_lock:
            _lenient_count -= 1
            if not _lenient_count:
                _lenient_undo.close()


def from_pillow(image: Image.Image) -> Frame:
    """Copies the current frame of a Pillow image.

    Raises ImageError if the image has no pixels, or 32-bit pixels, whose range is unknown.
    """
    if 0 in image.size:
        raise ImageError(f"the image has no pixels: its size is {image.width}x{image.height}")
    rawmode = _rawmode(image)  # before the image is loaded
    exif, turned = read_exif(image), is_turned(image)
    upright = ImageOps.exif_transpose(image)  # a copy, without a TIFF's tags
    pixels = _pixels(upright, rawmode, white_is_zero=_is_white_zero(image))
    return Frame(pixels, read_metadata(image, exif, turned, channels=pixels.shape[2]))


def to_pillow(pixels: Pixels) -> Image.Image:
    """Converts pixels to a Pillow image. Raises ImageError for 16-bit pixels that are not grey."""
    if pixels.shape[2] == 1:
        return Image.fromarray(pixels[:, :, 0])
    if pixels.dtype != np.uint8:
        raise ImageError("Pillow's images cannot hold 16-bit pixels with colour or alpha")
    return Image.fromarray(pixels)


def _pixels(image: Image.Image, rawmode: str, white_is_zero: bool = False) -> Pixels:
    """The pixels of a loaded image. In 16-bit images, Pillow ignores that zero may be white."""
    mode = image.mode
    if mode in ("I", "F"):
        raise ImageError("32-bit or signed pixels, of unknown range; save it with 8 or 16 bits")
    key = image.info.get("transparency")
    if mode.startswith("I;16"):
        pixels = _converted(image, mode).astype(np.uint16, copy=False)[:, :, None]
        if rawmode == "I;12":
            pixels = np.rint(pixels * (65535 / 4095)).astype(np.uint16)
        if white_is_zero:
            pixels = 65535 - pixels
        return _transparent_colour(pixels, key)
    if mode in ("1", "L"):
        if isinstance(key, int) and rawmode in ("L;2", "L;4"):  # given in the file's bits
            key *= 255 // (2 ** int(rawmode[2:]) - 1)
        return _transparent_colour(_converted(image, "L")[:, :, None], key)
    if mode == "RGB":
        return _transparent_colour(_converted(image, "RGB"), key)
    if mode in ("CMYK", "LAB"):
        return np.array(to_srgb(image))
    if mode in ("LA", "La"):
        return _converted(image, "LA")
    alpha = image.has_transparency_data or mode in ("RGBA", "RGBa", "PA")
    return _converted(image, "RGBA" if alpha else "RGB")


def _converted(image: Image.Image, mode: str) -> np.ndarray:
    """np.array(image.convert(mode)), row by row, because Pillow would hold three copies."""

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
    """Adds an alpha channel that is 0 for the single transparent colour that PNG and GIF allow."""
    if colour is None:
        return pixels
    maximum = np.iinfo(pixels.dtype).max
    alpha = np.where((pixels == np.asarray(colour)).all(axis=2, keepdims=True), 0, maximum)
    return np.concatenate([pixels, alpha.astype(pixels.dtype)], axis=2)


def to_srgb(image: Image.Image) -> Image.Image:
    """Converts using the image's profile, or Pillow's formula if it has no intact profile."""
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


def _first_webp_frame(file: io.BufferedIOBase, start: int, end: int) -> bytes:
    """The kind of the first chunk with pixels at or after `start`; b"" if there is none."""
    while start + 8 <= end:
        file.seek(start)
        kind, size = struct.unpack("<4sI", file.read(8))
        if kind == b"ANMF":  # a frame: its position and duration, then its chunks
            return _first_webp_frame(file, start + 24, end)
        if kind in (b"VP8 ", b"VP8L"):
            return kind
        start += 8 + size + size % 2
    return b""


def _is_white_zero(image: Image.Image) -> bool:
    return tiff_tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) == 0


def _clear_disposed(image: GifImagePlugin.GifImageFile, rgba: Image.Image) -> None:
    """Makes Pillow clear a frame with disposal to background to transparent, as viewers do.

    Without a declared transparent colour, Pillow would fill it with the background colour. Before
    the next frame, Pillow pastes `image.dispose` into `image.im` at `image.dispose_extent`.
    """
    if image.disposal_method == 2 and image.dispose is not None and image.dispose_extent:
        left, top, right, bottom = image.dispose_extent
        image.im, image._mode = rgba.im, "RGBA"
        image.info.pop("transparency", None)
        image.dispose = Image.new("RGBA", (right - left, bottom - top)).im


def _bytes_per_pixel(image: Image.Image) -> int:
    """Bytes per decoded pixel, in formats other than TIFF."""
    samples = 3 if image.mode == "P" else len(image.getbands())
    samples += "transparency" in image.info
    return samples * (2 if "16" in _rawmode(image) + image.mode else 1)


def _rawmode(image: Image.Image) -> str:
    """Pillow's name for the layout of the pixels in a file; "" if the image is already loaded."""
    if tiff_tag(image, TiffImagePlugin.BITSPERSAMPLE, ()) == (12,):
        return "I;12"  # even if it is loaded
    for tile in getattr(image, "tile", ()):
        return tile.args if isinstance(tile.args, str) else str(tile.args and tile.args[0])
    return ""


def _find_pages(image: Image.Image, count: int) -> tuple[list[int], int, list[int]]:
    """The indices of a TIFF's pages, their pixels, and the upper limit of each page's bytes."""
    pages, pixels, page_bytes = [], 0, []
    for i in range(count):
        image.seek(i)
        if tiff_tag(image, 254, 0) & 0b101:  # a thumbnail or a mask
            continue
        pages.append(i)
        samples = tiff_tag(image, TiffImagePlugin.SAMPLESPERPIXEL, 1)
        if tiff_tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) == 3:  # a palette
            samples += 2
        deep = max(tiff_tag(image, TiffImagePlugin.BITSPERSAMPLE, (1,)), default=1) > 8
        size = math.prod(image.size)
        pixels += size
        page_bytes.append(size * samples * (2 if deep else 1))
    return pages, pixels, page_bytes


def _plays(image: Image.Image) -> int:
    loop = image.info.get("loop", 1 if image.format == "PNG" else None)
    if image.format == "GIF":  # counts repetitions, and omits the field if there are none
        loop = 1 if loop is None else loop + (loop > 0)
    return int(loop or 0)

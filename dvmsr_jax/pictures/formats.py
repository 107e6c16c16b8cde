"""Writes pictures, adapted to the limits of each format.

PNG and TIFF are written row by row. The other formats are written by Pillow, with the whole picture
in memory, in 8 bits.
"""

import io
import itertools
import math
import os
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from PIL import ExifTags, Image, TiffImagePlugin, TiffTags

from dvmsr_jax.errors import UserError
from dvmsr_jax.pictures import png
from dvmsr_jax.pictures.metadata import MAIN, Metadata
from dvmsr_jax.pictures.reading import BandedFrame, Picture, Pixels, to_pillow, to_srgb


class FormatError(UserError):
    """A picture that cannot be written as requested; the message names an alternative."""


@dataclass(frozen=True)
class Format:
    """The limits of a file format."""

    name: str
    """Its name in Pillow."""
    max_side: int
    """Largest height and width in pixels."""
    animations: bool = False
    max_seconds: float = math.inf
    """Longest time that a frame of an animation can be shown."""
    max_plays: int = 0
    """Largest number of times that an animation can be played, apart from endlessly."""
    pages: bool = False
    alpha: bool = True
    grey: bool = True
    deep: bool = False
    """Samples of 16 bits."""
    profiles: bool = True
    """ICC profiles."""
    max_bytes: int = sys.maxsize
    """Limit on the size of the pixels."""


PNG = Format(
    name="PNG",
    max_side=2**31 - 1,
    animations=True,
    max_seconds=65_535.0,
    max_plays=2**31 - 1,
    deep=True,
)
TIFF = Format("TIFF", 2**31 - 1, animations=True, pages=True, deep=True)  # frames become pages
WEBP = Format(
    name="WEBP",
    max_side=16_383,
    animations=True,
    max_seconds=16_777.215,
    max_plays=65_535,
    grey=False,
)
GIF = Format(
    name="GIF",
    max_side=65_535,
    animations=True,
    max_seconds=655.35,
    max_plays=65_536,  # it counts repetitions
    profiles=False,  # Pillow writes none
)
JPEG = Format("JPEG", 65_500, alpha=False)
BMP = Format(
    name="BMP",
    max_side=2**31 - 1,
    alpha=False,
    profiles=False,
    max_bytes=2**32 - 2**11,  # leaves room for a header
)

CLASSIC_TIFF = int(0.98 * 2**32)
"""Pictures with more bytes of pixels become BigTIFFs, which fewer programs read."""

BY_SUFFIX = {
    **{".png": PNG, ".apng": PNG, ".tif": TIFF, ".tiff": TIFF, ".webp": WEBP, ".gif": GIF},
    **{".jpg": JPEG, ".jpeg": JPEG, ".bmp": BMP},
}
"""Formats by file name suffix, in lower case."""


SAME = ".same"
"""Stands for the suffix of the picture's own format."""

Quality = int | Literal["lossless"] | None
"""Quality of JPEG and WebP; see `write`."""


def choose_suffix(picture: Picture, asked: str | None) -> str:
    """The suffix for a result: the one asked for or, by default, PNG's.

    With SAME, or by default for several frames or pages, it is that of the picture's own format.
    Formats that can only be read become PNG.
    """
    if asked not in (None, SAME):
        return asked
    if asked is None and len(picture) == 1:
        return ".png"
    same = (suffix for suffix, form in BY_SUFFIX.items() if form.name == picture.format)
    return next(same, ".png")


def check_holds(form: Format, picture: Picture, quality: Quality = None) -> None:
    """Raises FormatError if the format cannot hold the picture's frames or pages, or if the quality
    of a JPEG is to be "lossless"."""
    if form is JPEG and quality == "lossless":
        raise FormatError("JPEG cannot be lossless: choose --format webp or png")
    able = form.animations if picture.is_animation else form.pages
    if len(picture) > 1 and not able:
        kind = "frames" if picture.is_animation else "pages"
        others = ("gif", "webp", "png", "tiff") if picture.is_animation else ("tiff",)
        raise FormatError(
            f"has {len(picture)} {kind}, and {form.name} cannot hold them: choose"
            f" --format {' or '.join(others)}"
        )


def write(
    path: Path,
    form: Format,
    frames: Iterable[BandedFrame],
    picture: Picture,
    *,
    scale: float,
    quality: Quality,
) -> None:
    """Writes the frames of `picture`, which have been enlarged by `scale`.

    They are adapted to the format if necessary: 16 bits are rounded to 8, alpha is blended with
    white, grey becomes RGB, and colours are converted to sRGB if their profile cannot be kept.
    Durations are rounded so that their sum stays the same. The number of plays is limited to the
    largest that the format can express.

    Args:
        path: the file to write.
        form: its format.
        frames: the enlarged frames or pages.
        picture: the picture they were made from.
        scale: enlargement factor.
        quality: of JPEG and WebP: from 1 to 100, "lossless" (WebP only), or None for 95, except
            that a lossless WebP stays lossless.

    Raises:
        FormatError: a frame is too large for the format, or is shown for too long.
    """
    fitted = (_fit(form, frame) for frame in frames)
    if form is PNG:
        with open(path, "wb") as file:
            png.write(file, fitted, len(picture), min(picture.plays, form.max_plays))
    elif form is TIFF:
        first = next(fitted)
        size: float = math.prod(first.shape) * first.dtype.itemsize
        if len(picture) > 1:  # the sizes of the others are not known yet
            size = picture.most_bytes * scale**2
        big = size > CLASSIC_TIFF
        _write_tiff(path, itertools.chain([first], fitted), big=big)
    else:
        _write_with_pillow(path, form, fitted, picture, quality)


def _fit(form: Format, frame: BandedFrame) -> BandedFrame:
    height, width, channels = frame.shape
    if max(height, width) > form.max_side:
        raise FormatError(
            f"{width}x{height} pixels are too many for {form.name}, which holds at most"
            f" {form.max_side:,} per side: choose --format png or tiff"
        )
    seconds = frame.metadata.duration / 1000
    if seconds > form.max_seconds:
        raise FormatError(
            f"shows a frame for {seconds:g} seconds; {form.name} allows {form.max_seconds:g}:"
            f" choose --format {'webp or ' * (form is GIF)}png"
        )
    flatten = channels in (2, 4) and not form.alpha
    colour = channels < 3 and not form.grey
    channels += 2 * colour - flatten
    dtype = frame.dtype if form.deep else np.dtype(np.uint8)
    lost = None if form.profiles and not colour else frame.metadata.icc
    if height * (width * channels + 3) > form.max_bytes:  # lines are padded
        raise FormatError(
            f"is too large for {form.name}, which is limited to 4 GB: choose --format png or tiff"
        )

    def fit(band: Pixels) -> Pixels:
        if flatten:
            maximum = np.iinfo(band.dtype).max
            alpha = band[:, :, -1:] / np.float32(maximum)
            white = maximum * (1 - alpha)
            band = np.rint(band[:, :, :-1] * alpha + white).astype(band.dtype)
        if band.dtype != dtype:
            band = np.rint(band / np.float32(257)).astype(dtype)
        if lost is not None:
            band = _to_srgb(band, lost)
        if colour:
            grey = np.repeat(band[:, :, :1], 3, axis=2)
            band = np.concatenate([grey, band[:, :, 1:]], axis=2)
        return band

    bands = map(fit, frame.bands)
    metadata = frame.metadata if lost is None else replace(frame.metadata, icc=None)
    return BandedFrame((height, width, channels), dtype, bands, metadata)


def _to_srgb(pixels: Pixels, icc: bytes) -> Pixels:
    """Converts 8-bit pixels from an ICC profile to sRGB. Grey stays grey, alpha stays the same."""
    count = 3 if pixels.shape[2] > 2 else 1  # without alpha
    image = to_pillow(np.ascontiguousarray(pixels[:, :, :count]))
    image.info["icc_profile"] = icc
    colours = np.asarray(to_srgb(image))[:, :, :count]
    return np.concatenate([colours, pixels[:, :, count:]], axis=2)


def _whole_durations(metadata: Iterable[Metadata], unit: int) -> list[int]:
    """The frames' durations rounded to multiples of `unit` milliseconds, with the same sum."""
    ends = itertools.accumulate((one.duration for one in metadata), initial=0.0)
    return [
        unit * (round(end / unit) - round(start / unit)) for start, end in itertools.pairwise(ends)
    ]


def _write_tiff(path: Path, frames: Iterator[BandedFrame], *, big: bool) -> None:
    metadata = Metadata()
    with tifffile.TiffWriter(path, bigtiff=big, byteorder="<") as writer:
        for i, frame in enumerate(frames):
            height, width, channels = frame.shape
            rows = max(1, _STRIP // (width * channels * frame.dtype.itemsize))
            if i == 0:
                metadata = frame.metadata
            writer.write(
                _strips(frame, rows),
                shape=(height, width, channels) if channels > 1 else (height, width),
                dtype=frame.dtype,
                photometric="rgb" if channels > 2 else "minisblack",
                planarconfig="contig" if channels > 1 else None,
                extrasamples=("unassalpha",) if channels in (2, 4) else None,
                rowsperstrip=rows,
                compression="zlib",
                predictor="horizontal",
                iccprofile=frame.metadata.icc,
                resolution=frame.metadata.dpi,
                software=False,
                metadata=None,
                extratags=_exif_tags(metadata, big) if i == 0 else None,
            )
    _append_directories(path, metadata, big)


_STRIP = 2**18  # bytes, before compression


def _strips(frame: BandedFrame, rows: int) -> Iterator[bytes]:
    """Yields compressed strips, because tifffile compresses only whole pictures."""
    for band in frame.regrouped(rows):
        differences = band.astype(frame.dtype.newbyteorder("<"))
        differences[:, 1:] -= band[:, :-1]
        yield zlib.compress(differences.tobytes(), png.LEVEL)


def _exif_tags(metadata: Metadata, big: bool) -> list[tuple[int | str, int, int, Any, bool]]:
    """EXIF's main directory as tifffile's extra tags, with placeholders for the offsets of the
    other directories."""
    tags: list[tuple[int | str, int, int, Any, bool]] = []
    for tag, value in metadata.exif.get(MAIN, {}).items():
        if isinstance(value, str):
            text = value.encode() + b"\0"
            tags.append((tag, TiffTags.ASCII, len(text), text, True))
        elif isinstance(value, bytes):
            tags.append((tag, TiffTags.BYTE, len(value), value, True))
        elif isinstance(value, int) and -(2**31) <= value < 2**32:
            number = TiffTags.LONG if value >= 0 else TiffTags.SIGNED_LONG
            tags.append((tag, number, 1, value, True))
    for name, directory in (("ExifTag", ExifTags.IFD.Exif), ("GPSTag", ExifTags.IFD.GPSInfo)):
        if directory in metadata.exif:
            # A placeholder: the page's own directory, because tifffile reads from the offset.
            kind, first = (TiffTags.LONG8, 16) if big else (TiffTags.LONG, 8)
            tags.append((name, kind, 1, first, True))
    return tags


def _append_directories(path: Path, metadata: Metadata, big: bool) -> None:
    """Appends EXIF's other directories to the file, which tifffile cannot do."""
    header = b"II\x2b\0\x08\0\0\0" + bytes(8) if big else b"II\x2a\0" + bytes(4)
    for directory in metadata.exif.keys() - {MAIN}:
        ifd = TiffImagePlugin.ImageFileDirectory_v2(header, group=directory)
        ifd.update(metadata.exif[directory])
        with tifffile.TiffFile(path, mode="r+") as file:
            offset = file.filehandle.seek(0, os.SEEK_END)
            offset += file.filehandle.write(bytes(offset % 2))  # directories start on words
            file.filehandle.write(ifd.tobytes(offset))
            file.pages.first.tags[directory].overwrite(offset)


def _write_with_pillow(
    path: Path, form: Format, frames: Iterator[BandedFrame], picture: Picture, quality: Quality
) -> None:
    metadata: list[Metadata] = []
    held: list[Image.Image] = []
    for frame in frames:
        metadata.append(frame.metadata)
        held.append(_to_palette(_hold(frame)) if form is GIF else _hold(frame))
    first = metadata[0]
    options: dict[str, Any] = {"icc_profile": first.icc}
    if first.dpi and max(first.dpi) < 2**16:
        options["dpi"] = first.dpi
        if form is WEBP:  # EXIF is its only place for the resolution
            resolution: dict[int, Any] = {
                ExifTags.Base.XResolution: first.dpi[0],
                ExifTags.Base.YResolution: first.dpi[1],
                ExifTags.Base.ResolutionUnit: 2,
            }
            main = {**first.exif.get(MAIN, {}), **resolution}
            first = replace(first, exif={**first.exif, MAIN: main})
    exif = first.exif_bytes()
    if exif and (form is not JPEG or len(exif) <= 65_533):
        options["exif"] = exif
    if quality is None:
        quality = "lossless" if form is WEBP and picture.is_lossless_webp() else _QUALITY
    if form is JPEG:
        # Without "optimize", for which Pillow's buffer can be too small for the file.
        options |= {"quality": quality, "subsampling": 0}
    elif form is WEBP:
        lossless = quality == "lossless"
        options |= {"lossless": lossless, "quality": _EFFORT if lossless else quality, "method": 4}
    if len(held) > 1:
        options |= {"save_all": True, "append_images": held[1:]}
        options["duration"] = _whole_durations(metadata, 10 if form is GIF else 1)
        plays = min(picture.plays, form.max_plays)
        if form is WEBP:
            options["loop"] = plays
        elif plays != 1:
            options["loop"] = max(plays - 1, 0)
        if form is GIF:
            options["disposal"] = 2 if any("transparency" in one.info for one in held) else 1
    encoded = io.BytesIO()  # Pillow does not say why it cannot write to a file
    try:
        held[0].save(encoded, form.name, **options)
    except (OSError, ValueError, RuntimeError, SystemError, ArithmeticError, struct.error) as error:
        raise FormatError(f"cannot be written as {form.name} ({error})") from error
    path.write_bytes(encoded.getbuffer())


_QUALITY = 95
_EFFORT = 75  # of lossless compression, 0 to 100: the default of WebP's own tools


def _hold(frame: BandedFrame) -> Image.Image:
    height, width, channels = frame.shape
    image = Image.new({1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels], (width, height))
    y = 0
    for band in frame.bands:
        image.paste(to_pillow(band), (0, y))
        y += len(band)
    return image


def _to_palette(image: Image.Image) -> Image.Image:
    """Reduces an image to 255 colours, dithered, and one for pixels over half transparent."""
    if image.mode == "L":
        return image
    colours = image.convert("RGB")
    palette = colours.quantize(255, Image.Quantize.MEDIANCUT)
    indices = colours.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    if image.mode in ("LA", "RGBA"):
        hidden = image.getchannel("A").point(lambda alpha: 255 * (alpha < 128))
        if hidden.getbbox():
            indices.paste(255, mask=hidden)
            indices.info["transparency"] = 255
    return indices

"""Metadata kept with a picture's pixels: ICC profile, DPI, EXIF and an animation's timing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import ExifTags, Image, TiffImagePlugin

# Tags about the scene and the photographer; the others in EXIF's first directory describe layout.
_DESCRIPTIVE_TAGS = [
    ExifTags.Base[name]
    for name in (
        *("ImageDescription", "Make", "Model", "Software", "DateTime", "Artist", "HostComputer"),
        *("Copyright", "Rating", "RatingPercent"),
        *("XPTitle", "XPComment", "XPAuthor", "XPKeywords", "XPSubject"),
    )
]

MAIN = 0
DIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


@dataclass(frozen=True)
class Metadata:
    """The metadata of a frame."""

    icc: bytes | None = None
    """ICC profile."""
    dpi: tuple[float, float] | None = None
    """Pixels per inch, horizontally and vertically."""
    exif: Mapping[int, Mapping[int, Any]] = field(default_factory=dict)
    """Descriptive values, by directory (MAIN and those in DIRECTORIES) and by tag, without
    orientation, thumbnail and empty directories."""
    duration: float = 0.0
    """Time for which an animation shows the frame, in milliseconds."""

    def scaled(self, scale: float, height: int, width: int) -> "Metadata":
        """The metadata of the frame enlarged to this size, with its printed size unchanged."""
        dpi = self.dpi and (self.dpi[0] * scale, self.dpi[1] * scale)
        sizes: dict[int, int] = {
            ExifTags.Base.ExifImageWidth: width,
            ExifTags.Base.ExifImageHeight: height,
        }
        exif = {
            directory: {tag: sizes.get(tag, value) for tag, value in entries.items()}
            for directory, entries in self.exif.items()
        }
        return Metadata(self.icc, dpi, exif, self.duration)

    def exif_bytes(self) -> bytes:
        """EXIF as stored in files, starting with "Exif" and two zeros; b"" if there is none."""
        if not self.exif:
            return b""
        exif = Image.Exif()
        exif.update(self.exif.get(MAIN, {}))
        for directory in DIRECTORIES:
            if directory in self.exif:
                exif.get_ifd(directory).update(self.exif[directory])
        return exif.tobytes()


def read_metadata(
    image: Image.Image, exif: Mapping[int, Mapping[int, Any]], turned: bool, channels: int
) -> Metadata:
    """Reads the metadata of a loaded image's current frame, without damaged or implausible values.

    `turned` swaps the two resolutions. `channels` is the number of channels of the decoded pixels.
    """
    icc = image.info.get("icc_profile")
    if image.format == "TIFF":  # `info` may still hold an earlier page's
        icc = tiff_tag(image, TiffImagePlugin.ICCPROFILE, None)
    space = b"RGB " if channels > 2 else b"GRAY"
    if not (isinstance(icc, bytes) and icc[16:20] == space and icc[36:40] == b"acsp"):
        icc = None
    try:
        x, y = (float(value) for value in _dpi(image)[:: -1 if turned else 1])
        dpi = (x, y) if 1 < x < 1e5 and 1 < y < 1e5 else None  # (1, 1) stands for none
    except Exception:  # missing, not numbers, or damaged: Pillow does not check EXIF
        dpi = None
    duration = image.info.get("duration", 0)
    return Metadata(icc, dpi, exif, float(duration))


def _dpi(image: Image.Image) -> tuple[Any, Any]:
    """The resolution, from the format's own field or, as always for WebP, from EXIF."""
    if "dpi" in image.info:
        return image.info["dpi"]
    exif = image.getexif()
    inches = {2: 1.0, 3: 2.54}[exif.get(ExifTags.Base.ResolutionUnit, 2)]
    x, y = exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution]
    return float(x) * inches, float(y) * inches


def read_exif(image: Image.Image) -> Mapping[int, Mapping[int, Any]]:
    """Reads the descriptive EXIF (see `Metadata.exif`); empty if any part of it is damaged."""
    try:
        exif = image.getexif()
        kept: dict[int, dict[int, Any]] = {
            MAIN: {tag: exif[tag] for tag in _DESCRIPTIVE_TAGS if tag in exif},
            **{directory: dict(exif.get_ifd(directory)) for directory in DIRECTORIES},
        }
        if ExifTags.IFD.Interop in kept[ExifTags.IFD.Exif]:  # an offset in the old bytes
            interop = dict(exif.get_ifd(ExifTags.IFD.Interop))
            kept[ExifTags.IFD.Exif][ExifTags.IFD.Interop] = _keep_bytes(interop)
        kept = {key: _keep_bytes(entries) for key, entries in kept.items() if entries}
        Metadata(exif=kept).exif_bytes()
    except Exception:  # Pillow does not check EXIF
        return {}
    return kept


def is_turned(image: Image.Image) -> bool:
    """Whether turning the image upright swaps its height and width."""
    return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


class _Text(str):
    """Text in EXIF, written back with its original bytes, in any encoding.

    Pillow decodes each byte to one character, and would only write ASCII.
    """

    def encode(self, encoding: str = "latin-1", errors: str = "replace") -> bytes:
        return super().encode("latin-1", errors)


def _keep_bytes(entries: Mapping[int, Any]) -> dict[int, Any]:
    return {
        tag: _Text(value) if isinstance(value, str) else value for tag, value in entries.items()
    }


def tiff_tag(image: Image.Image, tag: int, default: Any) -> Any:
    """The tag's value in a TIFF's current page; the default in other formats."""
    return getattr(image, "tag_v2", {}).get(tag, default)

"""Damage that Pillow overlooks: wrong checksums and missing rows in PNG, missing strips in TIFF."""

import math
import struct
import zlib
from io import BufferedIOBase

from PIL import Image, TiffImagePlugin

from dvmsr_jax.pictures.metadata import tiff_tag

_PIECE = 2**16  # bytes at a time
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# Adam7's passes: first column and row, and the steps between them.
_PASSES = [
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)),
    (0, 1, 1, 2),
]


def check_png(file: BufferedIOBase) -> None:
    """Checks every chunk's CRC, every pixel stream's Adler sum, and that no row is missing.

    Raises ValueError, naming the damage.
    """
    file.seek(8)  # past the signature
    header, pixels, size = b"", None, (0, 0)
    while True:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("truncated: it ends before the chunk IEND")
        length, kind = int.from_bytes(start[:4]), start[4:]
        if not (kind.isalpha() and kind.isascii()):
            raise ValueError("damaged: there is no chunk where one should start")
        name, crc, contents = kind.decode(), zlib.crc32(kind), b""
        if kind in (b"IDAT", b"fdAT") and pixels is None:
            pixels = _PixelStream(_raw_bytes(header, *size))
        for done in range(0, length, _PIECE):
            piece = file.read(min(_PIECE, length - done))
            if not piece:
                raise ValueError(f"truncated: it ends inside the chunk {name}")
            crc = zlib.crc32(piece, crc)
            if kind in (b"IDAT", b"fdAT") and pixels is not None:
                pixels.add(piece[4:] if kind == b"fdAT" and not done else piece)
            elif not done:
                contents = piece
        if file.read(4) != crc.to_bytes(4):
            raise ValueError(f"damaged: the checksum of its chunk {name} is wrong")
        if kind == b"IHDR":
            header, size = contents, struct.unpack(">2I", contents[:8])
        if kind in (b"fcTL", b"IEND") and pixels is not None:
            pixels.finish()
            pixels = None
        if kind == b"fcTL":
            size = struct.unpack(">2I", contents[4:12])
        if kind == b"IEND":
            return


class _PixelStream:
    """One zlib stream, which may span chunks. Its output is counted and not kept."""

    def __init__(self, expected: int):
        self._missing = expected
        self._inflating = zlib.decompressobj()

    def add(self, data: bytes) -> None:
        # Surplus data is not decompressed: decoders ignore it, and it may be endless.
        while data and not self._inflating.eof and self._missing >= 0:
            try:
                self._missing -= len(self._inflating.decompress(data, 16 * _PIECE))
            except zlib.error as error:
                raise ValueError(f"damaged: its compressed pixels are wrong ({error})") from error
            data = self._inflating.unconsumed_tail

    def finish(self) -> None:
        if self._missing >= 0:
            self._missing -= len(self._inflating.flush())  # output that is still buffered
        if self._missing > 0:
            raise ValueError("truncated: rows of pixels are missing")
        if self._missing == 0 and not self._inflating.eof:
            raise ValueError("truncated: the checksum of its pixels is missing")


def _raw_bytes(header: bytes, width: int, height: int) -> int:
    """Bytes of a PNG's filtered rows."""
    depth, colour_type, _, _, interlaced = header[8:13]
    bits = depth * _SAMPLES[colour_type]
    passes = _PASSES if interlaced else [(0, 0, 1, 1)]
    total = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def check_tiff(image: Image.Image, length: int) -> None:
    """Checks that the current page's strips or tiles all start within the file's `length` bytes.

    If one is cut short, the decoder raises. Raises ValueError, naming the damage.
    """
    width, height = (tiff_tag(image, tag, 0) for tag in (256, 257))
    tiled = tiff_tag(image, TiffImagePlugin.TILEOFFSETS, None) is not None
    if tiled:
        across, down = (max(1, tiff_tag(image, tag, 1)) for tag in (322, 323))
        offsets = tiff_tag(image, TiffImagePlugin.TILEOFFSETS, ())
        sizes = tiff_tag(image, TiffImagePlugin.TILEBYTECOUNTS, None)
    else:
        across, down = width, max(1, tiff_tag(image, TiffImagePlugin.ROWSPERSTRIP, height))
        offsets = tiff_tag(image, TiffImagePlugin.STRIPOFFSETS, ())
        sizes = tiff_tag(image, TiffImagePlugin.STRIPBYTECOUNTS, None)
    needed = math.ceil(width / across) * math.ceil(height / down)
    if tiff_tag(image, TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2:
        needed *= tiff_tag(image, TiffImagePlugin.SAMPLESPERPIXEL, 1)
    # Old files may not contain the sizes.
    sizes = [1] * needed if sizes is None else sizes
    there = sum(
        0 < offset < length and size > 0
        for offset, size in zip(offsets[:needed], sizes[:needed], strict=False)
    )
    if there < needed:
        kind = "tiles" if tiled else "strips"
        raise ValueError(f"truncated: {needed - there} of its {needed} {kind} are missing")

"""Writes PNG (https://www.w3.org/TR/png-3) row by row: 8 and 16 bits, stills and animations.

Pillow needs the whole picture in memory, and cannot write 16-bit colour.
"""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from jaxtyping import UInt8

from dvmsr_jax.pictures.metadata import Metadata
from dvmsr_jax.pictures.reading import BandedFrame

_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by number of channels
# Approximate number of bytes filtered at a time, and of compressed bytes written at a time.
_CHUNK = 2**18
# zlib's default, 6, makes photographs 5% smaller and takes three times as long.
LEVEL = 4


def write(file: io.BufferedIOBase, frames: Iterator[BandedFrame], count: int, plays: int) -> None:
    """Writes a picture, or an animation if there is more than one frame.

    Args:
        file: need not be seekable.
        frames: frames of equal shape and type, each shown for at most 65,535 seconds.
        count: number of frames.
        plays: number of times that an animation is shown; 0: endlessly.
    """
    file.write(b"\x89PNG\r\n\x1a\n")
    sequence = 0
    for i, frame in enumerate(frames):
        height, width, channels = frame.shape
        if i == 0:
            depth = 8 * frame.dtype.itemsize
            header = (width, height, depth, _COLOUR_TYPES[channels], 0, 0, 0)
            _chunk(file, b"IHDR", struct.pack(">2I5B", *header))
            _write_metadata(file, frame.metadata)
            if count > 1:
                _chunk(file, b"acTL", struct.pack(">2I", count, plays))
        if count > 1:
            delay = _seconds(frame.metadata.duration).as_integer_ratio()
            control = (sequence, width, height, 0, 0, *delay, 0, 0)
            _chunk(file, b"fcTL", struct.pack(">5I2H2B", *control))
            sequence += 1
        for data in _compress(frame):
            if i == 0:
                _chunk(file, b"IDAT", data)
            else:
                _chunk(file, b"fdAT", struct.pack(">I", sequence) + data)
                sequence += 1
    _chunk(file, b"IEND", b"")


def _seconds(milliseconds: float) -> Fraction:
    """The duration in seconds, as a fraction of two 16-bit numbers."""
    seconds = Fraction(milliseconds / 1000)
    largest = 2**16 - 1  # of numerator and denominator
    return seconds.limit_denominator(max(1, largest // max(1, math.ceil(seconds))))


def _chunk(file: io.BufferedIOBase, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data)
    file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))


def _write_metadata(file: io.BufferedIOBase, metadata: Metadata) -> None:
    if metadata.icc is not None:
        _chunk(file, b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc))
    if metadata.dpi is not None:
        per_metre = (round(value / 0.0254) for value in metadata.dpi)
        _chunk(file, b"pHYs", struct.pack(">2IB", *per_metre, 1))
    if metadata.exif:
        _chunk(file, b"eXIf", metadata.exif_bytes().removeprefix(b"Exif\0\0"))


def _compress(frame: BandedFrame) -> Iterator[bytes]:
    """Yields the frame's pixels as a zlib stream."""
    compressor = zlib.compressobj(LEVEL)
    _, width, channels = frame.shape
    above = np.zeros((1, width * channels * frame.dtype.itemsize), np.uint8)
    pending = b""
    for band in frame.regrouped(max(1, _CHUNK // above.size)):
        lines = band.astype(frame.dtype.newbyteorder(">")).reshape(len(band), -1).view(np.uint8)
        filtered = _filter(np.concatenate([above, lines]), channels * frame.dtype.itemsize)
        above = lines[-1:]
        pending += compressor.compress(filtered.tobytes())
        if len(pending) >= _CHUNK:
            yield pending
            pending = b""
    yield pending + compressor.flush()


def _filter(lines: UInt8[np.ndarray, "h n"], step: int) -> UInt8[np.ndarray, "h-1 n+1"]:
    """Encodes each line after the first as its filter's number and differences from a prediction.

    For each line, the filter with the smallest sum of absolute differences is chosen, as the
    standard recommends, from four of the five. `step` is the number of bytes per pixel.
    """
    left_of = np.pad(lines, ((0, 0), (step, 0)))[:, :-step]
    here, up, left, corner = lines[1:], lines[:-1], left_of[1:], left_of[:-1]
    # Paeth's prediction is the neighbour nearest to left + up - corner.
    from_left = np.abs(up.astype(np.int16) - corner)
    from_up = np.abs(left.astype(np.int16) - corner)
    from_corner = np.abs(up.astype(np.int16) + left - 2 * corner.astype(np.int16))
    paeth = np.where(from_up <= from_corner, up, corner)
    paeth = np.where((from_left <= from_up) & (from_left <= from_corner), left, paeth)
    best = np.full(len(here), np.inf)
    filtered = np.empty((len(here), here.shape[1] + 1), np.uint8)
    for number, prediction in ((0, 0), (1, left), (2, up), (4, paeth)):
        difference = here - prediction
        cost = np.abs(difference.view(np.int8).astype(np.int16)).sum(axis=1)
        better = cost < best
        filtered[better, 0] = number
        filtered[better, 1:] = difference[better]
        best = np.minimum(best, cost)
    return filtered

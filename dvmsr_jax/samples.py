"""Photographs to try things with."""

from pathlib import Path

import skimage.data

SAMPLES = tuple(
    Path(skimage.data.__file__).parent / name
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
)
"""Colour photographs from scikit-image's wheel, available without a download."""

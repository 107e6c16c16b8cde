"""Crops of photographs, bicubic | x4 | x4-real | HR: `python -m benchmarks.crops docs/crops.png`.

In the upper rows, the inputs are clean; in the lower ones, they are noisy JPEGs. The photographs
come with scikit-image. None of them was used in training.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tyro

from dvmsr_jax import images
from dvmsr_jax.data import degradations
from dvmsr_jax.evaluation import comparison, sample_benchmark
from dvmsr_jax.inference import make_upscaler
from dvmsr_jax.model import DVMSR

WEIGHTS = "x4", "x4-real"
NOISY_JPEG = {"noise": 6.0, "jpeg": 75}
# Photograph, first row and column of the crop in HR pixels, and degradations of the input.
ROWS: tuple[tuple[str, tuple[int, int], dict[str, Any]], ...] = (
    ("astronaut", (40, 120), {}),
    ("chelsea", (60, 110), {}),
    ("astronaut", (40, 120), NOISY_JPEG),
    ("coffee", (60, 200), NOISY_JPEG),
)
SIZE = 160


def main(target: Path) -> None:
    """Writes the picture.

    Args:
        target: a PNG file.
    """
    models = {name: DVMSR.from_pretrained(name) for name in WEIGHTS}
    upscalers = {name: make_upscaler(model) for name, model in models.items()}
    (scale,) = {model.config.scale for model in models.values()}
    examples = {example.name: example for example in sample_benchmark(scale)}
    rows = []
    for name, (top, left), strengths in ROWS:
        lr = degradations.apply(examples[name].lr, seed=0, **strengths)
        upscaled = {label: upscale(lr) for label, upscale in upscalers.items()}
        part = slice(top, top + SIZE), slice(left, left + SIZE)
        rows.append(comparison(examples[name]._replace(lr=lr), upscaled, part))
    images.write_png(target, np.concatenate(rows))


if __name__ == "__main__":
    tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(main), description=__doc__)

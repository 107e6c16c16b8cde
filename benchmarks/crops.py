"""Crops of photographs, bicubic | ours | HR: `python -m benchmarks.crops docs/crops.png`.

The photographs come with scikit-image. None of them was used in training.
"""

from pathlib import Path

import numpy as np
import tyro

from dvmsr_jax import images
from dvmsr_jax.evaluation import comparison, sample_benchmark
from dvmsr_jax.inference import make_upscaler
from dvmsr_jax.pretrained import load_model
from dvmsr_jax.registry import DEFAULT

# First row and column of each crop, in HR pixels.
CROPS = {"astronaut": (40, 120), "chelsea": (60, 110), "coffee": (60, 200)}
SIZE = 160


def main(target: Path, ckpt: Path = Path(DEFAULT)) -> None:
    """Writes the picture.

    Args:
        target: a PNG file.
        ckpt: a name of weights, a checkpoint directory, a .safetensors or a .pth file.
    """
    model = load_model(ckpt)
    upscale = make_upscaler(model)
    rows = []
    for example in sample_benchmark(model.config.scale):
        if example.name not in CROPS:
            continue
        top, left = CROPS[example.name]
        part = slice(top, top + SIZE), slice(left, left + SIZE)
        rows.append(comparison(example, {"ours": upscale(example.lr)}, part))
    images.write_png(target, np.concatenate(rows))


if __name__ == "__main__":
    tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(main))

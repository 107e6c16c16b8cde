"""Time to score pictures of many sizes, such as Urban100's: `python -m benchmarks.evaluation`.

`streamed` is what evaluation does: pictures of many sizes share a program. `whole` compiles one for
each size. Both include compilation, metrics and bicubic upscaling; programs from earlier runs are
not reused. The pictures are one of scikit-image's photographs, resized to Urban100's range: 1,024
pixels on one side and 512 to 1,020 on the other.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import Image

from benchmarks import machine
from benchmarks.table import Measured, Report
from dvmsr_jax import bicubic
from dvmsr_jax.evaluation import Example, evaluate
from dvmsr_jax.inference import make_upscaler, make_whole, upscale_pixels
from dvmsr_jax.model import DVMSR
from dvmsr_jax.registry import DEFAULT
from dvmsr_jax.samples import SAMPLES


def main(pictures: int = 12, json: Path | None = None) -> None:
    """Prints both times.

    Args:
        pictures: number of pictures; Urban100 has 100.
        json: also write the tables to this file.
    """
    model = DVMSR.from_pretrained(DEFAULT)
    scale = model.config.scale
    photo = Image.open(SAMPLES[0]).convert("RGB")
    examples = []
    for number, side in enumerate(np.random.default_rng(0).permutation(128)[:pictures]):
        sides = 1024, 512 + 4 * int(side)
        hr = np.asarray(photo.resize(sides if number % 4 else sides[::-1]))
        examples.append(Example(f"{number}", bicubic.downscale(hr, scale), hr))

    report = Report(machine.describe(), json)
    report.table(("", "time", "PSNR-Y"), text=("",), title=f"{pictures} pictures")
    for name, make in (("whole", _whole), ("streamed", make_upscaler)):
        start = time.perf_counter()
        scores, _ = evaluate(make(model), examples, scale, name=name)
        seconds = Measured(time.perf_counter() - start, "s")
        report.row((name, seconds, f"{scores['psnr_y']:.5f}"))


def _whole(
    model: DVMSR,
) -> Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "H W 3"]]:
    upscale = make_whole(model)
    return lambda picture: upscale_pixels(upscale, picture[None], self_ensemble=False)[0]


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

"""What a run tells: metrics.jsonl, TensorBoard scalars, sample pictures and curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
import tensorboardX
from jaxtyping import UInt8
from PIL import Image, ImageDraw


class Log:
    """Writes a phase's metrics, to `directory`/metrics.jsonl and as TensorBoard scalars."""

    def __init__(self, directory: Path, start: int):
        """Continues at step `start`; what was logged after it, in a run cut short, is dropped."""
        self._path = directory / "metrics.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self._path) if line["step"] <= start]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._tensorboard = tensorboardX.SummaryWriter(
            str(directory / "tensorboard"), purge_step=start + 1
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of the file, one point of each curve."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes what is still buffered."""
        self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, int | float]]:
    """The lines of a metrics.jsonl, none if there is no such file; a half-written last one is not
    counted."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def side_by_side(
    panels: Mapping[str, UInt8[np.ndarray, "h w 3"]],
) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures of one size in a row, each under its label."""
    height, width, _ = next(iter(panels.values())).shape
    gap, header = 8, 20
    canvas = Image.new("RGB", (len(panels) * (width + gap) - gap, height + header), color="white")
    draw = ImageDraw.Draw(canvas)
    for i, (label, panel) in enumerate(panels.items()):
        canvas.paste(Image.fromarray(panel), (i * (width + gap), header))
        draw.text((i * (width + gap) + 4, 4), label, fill="black")
    return np.asarray(canvas)


def plot_training(directories: Sequence[Path], path: Path) -> None:
    """L1 to HR and validation PSNR-Y over the steps, a curve for each phase directory, as a PNG."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    loss_axes, psnr_axes = figure.subplots(1, 2)
    for directory in directories:
        lines = read_metrics(directory / "metrics.jsonl")
        for axes, key in ((loss_axes, "pixel_loss"), (psnr_axes, "val_psnr_y")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points, strict=True), label=directory.name)
    bicubic_scores = [line["val_bicubic_psnr_y"] for line in lines if "val_bicubic_psnr_y" in line]
    psnr_axes.axhline(bicubic_scores[-1], color="grey", linestyle="--", label="bicubic")
    loss_axes.set(xlabel="step", ylabel="L1 to HR in training", yscale="log")
    psnr_axes.set(xlabel="step", ylabel="validation PSNR-Y, dB")
    for axes in (loss_axes, psnr_axes):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)

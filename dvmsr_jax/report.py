"""What a run tells: metrics.jsonl, TensorBoard, sample pictures and curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
import tensorboardX
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from dvmsr_jax import images


class Log:
    """Writes a phase's metrics, to `directory`/metrics.jsonl and as TensorBoard scalars."""

    def __init__(self, directory: Path, start: int):
        """Continues at step `start`; what was logged after it, in a run cut short, is dropped."""
        self._directory = directory
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

    def sample(self, step: int, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """A picture in `directory`/samples and in TensorBoard; redraws `directory`/curves.png."""
        images.write_png(self._directory / "samples" / f"{step:07d}.png", picture)
        self._tensorboard.add_image("sample", picture, step, dataformats="HWC")
        plot_training([self._directory], self._directory / "curves.png")

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
    """Losses, validation PSNR-Y and learning rate over the steps, as a PNG.

    A curve for each phase directory, and for a student's its teacher's PSNR-Y as a line.
    """
    figure = matplotlib.figure.Figure(figsize=(15, 4), layout="constrained")
    losses, psnr, rate = figure.subplots(1, 3)
    for directory in directories:
        lines, name = read_metrics(directory / "metrics.jsonl"), directory.name
        _plot(losses, lines, "pixel_loss", f"{name}, to HR")
        _plot(losses, lines, "distill_loss", f"{name}, to its teacher")
        _plot(psnr, lines, "val_psnr_y", name)
        _plot(psnr, lines, "val_teacher_psnr_y", f"the {name}'s teacher", "--")
        _plot(rate, lines, "learning_rate", name)
    _plot(psnr, lines, "val_bicubic_psnr_y", "bicubic", ":")
    losses.set(xlabel="step", ylabel="L1 in training", yscale="log")
    psnr.set(xlabel="step", ylabel="validation PSNR-Y, dB")
    rate.set(xlabel="step", ylabel="learning rate")
    for axes in (losses, psnr, rate):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=100)


def _plot(axes, lines, key, label, style="-"):
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label)

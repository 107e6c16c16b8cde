"""What a run tells: metrics.jsonl, TensorBoard, sample pictures and curves."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dvmsr_jax import files, images


class Log:
    """Writes what a phase tells into its directory.

    TensorBoard's events are written at once, not by tensorboardX's thread, in which a full disk
    would go unnoticed. Raises OSError where something cannot be written.
    """

    def __init__(self, directory: Path, start: int):
        """Continues at step `start`; what was logged after it, in a run cut short, is dropped."""
        self._directory = directory
        self._path = directory / "metrics.jsonl"
        (directory / "tensorboard").mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self._path) if line["step"] <= start]
        with files.replacing(self._path) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
        prefix = directory / "tensorboard" / "events"
        self._events = EventsWriter(str(prefix), filename_suffix=f".{os.getpid()}")
        self._write_event(start + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, one point of each of TensorBoard's curves."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._write_event(step, summary=summary.scalar(name, value))
        self._events.flush()

    def sample(self, step: int, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """A picture in samples/ and in TensorBoard; redraws curves.png."""
        images.write_png(self._directory / "samples" / f"{step:07d}.png", picture)
        self._write_event(step, summary=summary.image("sample", picture, dataformats="HWC"))
        plot_training([self._directory], self._directory / "curves.png")

    def close(self) -> None:
        """Flushes what is still buffered."""
        self._events.close()

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))


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
    with files.replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format="png")


def _plot(axes, lines, key, label, style="-"):
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        marker = "." if len(points) == 1 else ""
        axes.plot(*zip(*points, strict=True), style, marker=marker, label=label)

"""A run's log: metrics.jsonl, TensorBoard, sample pictures and curves."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dvmsr_jax import files, images
from dvmsr_jax.errors import UserError


class Log:
    """The log of a phase, in its directory.

    TensorBoard's events are written directly, and not in tensorboardX's thread, where a full disk
    would go unnoticed. Raises UserError, naming the directory, if something cannot be written.
    """

    def __init__(self, directory: Path, start: int):
        """Continues at step `start`; later lines, from an interrupted run, are dropped."""
        self._directory = directory
        self._path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] <= start]
        with self._writing():
            with files.replacing(self._path) as unfinished:
                unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
            (directory / "tensorboard").mkdir(parents=True, exist_ok=True)
            prefix = directory / "tensorboard" / "events"
            self._events = EventsWriter(str(prefix), filename_suffix=f".{os.getpid()}")
            self._write_event(start + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line to metrics.jsonl, and a point to each of TensorBoard's curves."""
        with self._writing():
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._write_event(step, summary=summary.scalar(name, value))
            self._events.flush()

    def sample(self, step: int, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Adds a picture to samples/ and to TensorBoard, and redraws curves.png."""
        with self._writing():
            images.write_png(self._directory / "samples" / f"{step:07d}.png", picture)
            self._write_event(step, summary=summary.image("sample", picture, dataformats="HWC"))
            plot_training([self._directory], self._directory / "curves.png")

    def close(self) -> None:
        """Flushes what is still buffered."""
        with self._writing():
            self._events.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the log in {self._directory} cannot be written ({error}). Once that is fixed, "
                "the same command resumes from the last checkpoint."
            ) from error

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))


def read_metrics(path: Path) -> list[dict[str, int | float]]:
    """Reads metrics.jsonl, without a half-written last line; empty if there is no such file.

    Raises:
        UserError: the file contains something else.
    """
    if not path.exists():
        return []
    *whole, last = path.read_text(errors="replace").split("\n")
    lines = [_parse(line) for line in (*whole, *([last] if _parse(last) else []))]
    if None in lines:
        raise UserError(
            f"{path}: line {lines.index(None) + 1} is not a line of metrics; move the file "
            "elsewhere, or use another --workdir"
        )
    return [line for line in lines if line]


def _parse(line: str) -> dict[str, int | float] | None:
    """The metrics of a line; None if it contains something else."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return None
    return values if all(isinstance(value, int | float) for value in values.values()) else None


def plot_training(directories: Sequence[Path], path: Path) -> None:
    """Plots losses, validation PSNR-Y and learning rate over the steps, as a PNG.

    There is a curve for each phase directory, with the PSNR-Y of its start and of its teacher.
    """
    figure = matplotlib.figure.Figure(figsize=(15, 4), layout="constrained")
    losses, psnr, rate = figure.subplots(1, 3)
    for directory in directories:
        lines, name = read_metrics(directory / "metrics.jsonl"), directory.name
        _plot(losses, lines, "pixel_loss", f"{name}, to HR")
        _plot(losses, lines, "distill_loss", f"{name}, to its teacher")
        _plot(psnr, lines, "val_psnr_y", name)
        _plot(psnr, lines, "val_teacher_psnr_y", f"the {name}'s teacher", "--")
        _plot(psnr, lines, "val_start_psnr_y", f"the {name}'s start", "-.")
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

"""Speed and memory of training steps: both phases, kinds of distillation, ways to save memory.

python -m benchmarks.training
python -m benchmarks.training --smoke

The rows of a table take steps in turn, so that a busy machine affects all of them equally. Pictures
are random and weights untrained, which does not affect the cost.
"""

import dataclasses
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from flax import nnx

from benchmarks import machine
from benchmarks.table import Cell, Measured, Report
from dvmsr_jax import data, images
from dvmsr_jax.config import Compute, ModelConfig, TrainConfig
from dvmsr_jax.configs import PRESETS
from dvmsr_jax.cost import cost
from dvmsr_jax.errors import is_out_of_memory
from dvmsr_jax.model import build
from dvmsr_jax.pretrained import save_safetensors
from dvmsr_jax.training.run import Run
from dvmsr_jax.training.step import memory_of
from dvmsr_jax.training.targets import distill

COLUMNS = ("step", "batch", "steps/s", "crops/s", "time", "waits for data", "TFLOP/s", "memory")
# Parts of a step in the rows that accumulate.
ACCUMULATE = 4


class Row(NamedTuple):
    """A row of a table: its label and the run to measure."""

    label: str
    config: TrainConfig


class Runner:
    """Takes and times the steps of a run one by one."""

    def __init__(self, row: Row):
        self.label, self.config = row
        run = Run(self.config)
        self._teacher = None if run.teacher is None else run.teacher.config
        self._state, self._batches = run.initial_state(), run.batches(0)
        self._step = run.make_step()
        self._memory = memory_of(self._step.compile(self._state, next(self._batches)))
        self._seconds: list[float] = []
        self._waited: list[float] = []

    def step(self) -> None:
        """Takes and times one step."""
        begin = time.perf_counter()
        batch = next(self._batches)
        self._waited.append(time.perf_counter() - begin)
        self._state, _ = jax.block_until_ready(self._step(self._state, batch))
        self._seconds.append(time.perf_counter() - begin)

    def forget(self) -> None:
        """Drops the timings so far, of the warm-up."""
        self._seconds, self._waited = [], []

    def flops(self) -> int:
        """FLOPs of a step: three forward passes, and one of the teacher if it is online."""
        crop = self.config.data.lr_crop
        own = cost(self.config.model, crop, crop)
        total = 3 * (2 * own.macs + own.scan_flops)
        if self._teacher and self.config.distill.targets == "online":
            teachers = cost(self._teacher, crop, crop)
            total += 2 * teachers.macs + teachers.scan_flops
        return total * self.config.data.batch_size

    def cells(self, first: "Runner") -> list[Cell]:
        """The row's cells, with the time relative to the first row's."""
        seconds, batch = statistics.median(self._seconds), self.config.data.batch_size
        return [
            self.label,
            size_of_batch(self.config),
            Measured(1 / seconds),
            Measured(batch / seconds),
            Measured(seconds / statistics.median(first._seconds)),
            Measured(100 * sum(self._waited) / sum(self._seconds), "%"),
            Measured(self.flops() / seconds / 1e12),
            Measured(self._memory / 2**20, "MiB"),
        ]


def phases(student: TrainConfig, teacher: TrainConfig, weights: Path) -> Iterator[Row]:
    """Yields the student without and with a teacher, and the teacher."""

    def taught(**options: Any) -> TrainConfig:
        options = {"teacher": weights, **options}
        return dataclasses.replace(student, distill=dataclasses.replace(student.distill, **options))

    yield Row("student, no teacher", dataclasses.replace(student, phase="teacher"))
    yield Row("student, precomputed targets", taught(targets="precomputed"))
    yield Row("student, online teacher", taught())
    yield Row("teacher", teacher)


def savers(student: TrainConfig) -> Iterator[Row]:
    """Yields the student without a teacher, with options that affect speed and memory."""
    plain = dataclasses.replace(student, phase="teacher")
    accumulated = dataclasses.replace(plain.optim, accumulate=ACCUMULATE)
    yield Row("float32", plain)
    yield Row(
        "--precision bfloat16", dataclasses.replace(plain, compute=Compute(precision="bfloat16"))
    )
    yield Row(f"--optim.accumulate {ACCUMULATE}", dataclasses.replace(plain, optim=accumulated))
    yield Row("--remat", dataclasses.replace(plain, remat=True))
    yield Row(
        f"--remat, accumulate {ACCUMULATE}",
        dataclasses.replace(plain, remat=True, optim=accumulated),
    )
    cached = dataclasses.replace(plain.data, cache="device")
    yield Row("--data.cache device", dataclasses.replace(plain, data=cached))


def measure(report: Report, title: str, rows: Iterator[Row], steps: int) -> None:
    """Measures the rows and reports their table."""
    runners, too_large = [], []
    for row in rows:
        try:
            runner = Runner(row)
            runner.step()
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            too_large.append(row)
            continue
        runner.forget()
        runners.append(runner)
    for _, runner in itertools.product(range(steps), runners):
        runner.step()
    report.table(COLUMNS, text=COLUMNS[:1], title=title)
    for runner in runners:
        report.row(runner.cells(runners[0]))
    for label, config in too_large:
        size = size_of_batch(config)
        report.row([label, size, "out of memory", *["-"] * (len(COLUMNS) - 3)])


def size_of_batch(config: TrainConfig) -> str:
    """The crops of a step, and their size."""
    return f"{config.data.batch_size} x {config.data.lr_crop}²"


def make_pictures(folder: Path, count: int) -> None:
    """Writes pictures of random numbers."""
    rng = np.random.default_rng(0)
    for i in range(count):
        images.write_png(folder / f"{i}.png", rng.integers(0, 256, (640, 320, 3), np.uint8))


def main(
    presets: tuple[Literal["paper", "demo"], ...] = ("demo", "paper"),
    tables: tuple[Literal["phases", "savers"], ...] = ("phases", "savers"),
    batch_size: int | None = None,
    steps: int = 5,
    smoke: bool = False,
    json: Path | None = None,
) -> None:
    """Prints speed and memory of training steps as Markdown tables.

    "time" is relative to the table's first row. FLOP/s count three forward passes of the trained
    model and one of an online teacher.

    Args:
        presets: models and crops.
        tables: phases: student and teacher, kinds of distillation. savers: precision, memory.
        batch_size: crops per step, rounded up so that accumulated parts divide evenly among the
            devices. None: the preset's, or 4 on a CPU.
        steps: steps to time for each row, after a first one that is not timed.
        smoke: a quick run of tiny models to check that everything works.
        json: also write the tables to this file.
    """
    tiny = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=2)
    if smoke:
        # Most of the time is compilation, which is faster with XLA's older emitters.
        hasty = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        os.environ.setdefault("XLA_FLAGS", hasty)
        presets, steps, batch_size = ("demo",), 1, 4
    if batch_size is None and jax.default_backend() == "cpu":
        batch_size = 4
    report = Report(machine.describe(), json)
    with tempfile.TemporaryDirectory(prefix="dvmsr-benchmark-") as temporary:
        folder = Path(temporary)
        # Rows share programs, above all the initial weights; compile these once.
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        make_pictures(folder / "photos", 5)
        parts = ACCUMULATE * jax.device_count()
        for preset in presets:
            configs = []
            for config in PRESETS[preset].values():
                size = math.ceil((batch_size or config.data.batch_size) / parts) * parts
                crops = dataclasses.replace(
                    config.data,
                    batch_size=size,
                    hr_dirs=(folder / "photos",),
                    data_dir=folder,
                    val_images=1,
                )
                model = tiny if smoke else config.model
                configs.append(dataclasses.replace(config, model=model, data=crops, steps=10_000))
            teacher, student = configs
            for table in tables:
                title = f"{preset}, {table}"
                if table == "savers":
                    measure(report, title, savers(student), steps)
                    continue
                weights = folder / f"{preset}.safetensors"
                save_safetensors(build(teacher.model, rngs=nnx.Rngs(0)), weights)
                records = data.load_records(student.data, student.model.scale)
                distill(weights, records.folder, self_ensemble=False, batch_size=1)
                measure(report, title, phases(student, teacher, weights), steps)


if __name__ == "__main__":
    tyro.cli(main)

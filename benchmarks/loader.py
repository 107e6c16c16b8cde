"""Training crops per second, from disk and from device memory: `python -m benchmarks.loader`.

This includes degraded LR, which the reading threads compute from HR. For comparison, it also
measures how many crops the models' steps (forward and backward, float32, without the optimizer)
consume on this machine's devices. Crops per CPU-second count the CPU time of
the process's threads, on which other programs have little influence; crops per second require an
idle machine.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
import tyro
from flax import nnx

from benchmarks import machine
from benchmarks.table import Cell, Measured, Report
from dvmsr_jax import data
from dvmsr_jax.config import DataConfig, ModelConfig, NetworkConfig
from dvmsr_jax.configs import PRESETS
from dvmsr_jax.data.prepare import prepare
from dvmsr_jax.data.sources import Source
from dvmsr_jax.model import Weights, build, named_parameters
from dvmsr_jax.training import losses

SCALE = 4
COLUMNS = ("", "crops/s", "crops per CPU-second", "CPU ms per crop", "cores busy")


def make_records(folder: Path, pictures: int) -> None:
    """Prepares mosaics of a photograph, with 64 sub-images each."""
    square = skimage.data.astronaut()[:320, :320]

    def picture(i: int) -> Source:
        def load():
            return np.tile(np.roll(square, 40 * i, axis=0), (8, 8, 1))

        return Source(f"mosaic {i}", f"mosaic {i}", load)

    train = [picture(i) for i in range(pictures)]
    prepare({"train": train, "val": [picture(pictures)]}, SCALE, folder)


def measure(name: str, batches: Iterable[Any], batch_size: int, warm_up: int) -> list[Cell]:
    """Measures a row of the table, ignoring the first `warm_up` batches."""
    count = 0
    for i, batch in enumerate(batches):
        if i == warm_up:
            start, cpu_start, count = time.perf_counter(), time.process_time(), 0
        jax.block_until_ready(batch)
        count += batch_size
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    numbers = (
        count / seconds,
        count / cpu_seconds,
        1000 * cpu_seconds / count,
        cpu_seconds / seconds,
    )
    return [name, *map(Measured, numbers)]


def make_step(config: NetworkConfig) -> Callable[[dict[str, jax.Array]], Any]:
    """Returns a function of a batch: the gradients of L1 by a new model's weights."""

    def loss(parameters, batch):
        lr, hr = (batch[name].astype(jnp.float32) / 255 for name in ("lr", "hr"))
        return losses.l1(Weights(config, parameters).model()(lr), hr)

    parameters = named_parameters(build(config, rngs=nnx.Rngs(0)))
    gradients = jax.jit(jax.grad(loss))
    return lambda batch: gradients(parameters, batch)


def main(
    records: Path | None = None,
    workers: tuple[int, ...] = (1, 2, 4),
    lr_crop: int = 64,
    batch_size: int = 128,
    step_batch_size: int = 8,
    batches: int = 60,
    smoke: bool = False,
    json: Path | None = None,
) -> None:
    """Prints how fast crops are cut, and how fast training consumes them, as a Markdown table.

    Args:
        records: a folder made by `dvmsr data prepare`. None: 512 new sub-images,
            which are then in the page cache.
        workers: numbers of threads that read from disk.
        lr_crop: side of the LR crops.
        batch_size: crops in a batch.
        step_batch_size: crops in a step of the models, and in a batch of degraded crops.
        batches: batches to measure.
        smoke: a quick run to check that everything works.
        json: also write the tables to this file.
    """
    models = {
        f"the {phase}'s step": PRESETS["paper"][phase].model for phase in ("student", "teacher")
    }
    pictures, warm_up, steps = 8, 5, 3
    if smoke:
        models = {"a small step": ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1)}
        pictures, warm_up, steps, workers = 1, 1, 1, workers[:1]
        lr_crop, batch_size, step_batch_size, batches = 16, 8, 2, 2
    report = Report(machine.describe(), json)
    title = f"crops of {lr_crop}x{lr_crop} and {lr_crop * SCALE}x{lr_crop * SCALE} pixels, batches "
    report.table(COLUMNS, text=COLUMNS[:1], title=f"{title}of {batch_size}")
    with tempfile.TemporaryDirectory() as temporary:
        if records is None:
            records = Path(temporary) / "records"
            make_records(records, pictures)
        train = data.load_records(DataConfig(prepared=records, lr_crop=lr_crop), SCALE).train
        span: dict[str, Any] = {"seed": 0, "start": 0, "stop": warm_up + batches}

        def show(name: str, batches: Iterable[Any], size: int = batch_size, skip: int = warm_up):
            report.row(measure(name, batches, size, skip))

        for threads in workers:
            config = DataConfig(lr_crop=lr_crop, batch_size=batch_size, workers=threads)
            feed = data.make_feed(train, config, scale=SCALE)
            show(f"from disk, {threads} workers", feed.inputs(**span))

        degraded = DataConfig(lr_crop=lr_crop, batch_size=step_batch_size, degradation="mild")
        for config in (degraded, dataclasses.replace(degraded, degradation="real")):
            for threads in workers:
                config = dataclasses.replace(config, workers=threads)
                feed = data.make_feed(train, config, scale=SCALE)
                name = f"from disk, {config.degradation}, {threads} workers"
                show(name, feed.inputs(**span), step_batch_size)

        config = DataConfig(lr_crop=lr_crop, batch_size=batch_size, cache="device")
        feed = data.make_feed(train, config, scale=SCALE)
        show("plans alone", feed.inputs(**span))
        cache, crops = jax.device_put(feed.load_cache()), jax.jit(feed.crops)
        show("from device memory", (crops(cache, plan) for plan in feed.inputs(**span)))

        config = DataConfig(lr_crop=lr_crop, batch_size=step_batch_size)
        (crops_of_a_step,) = data.make_feed(train, config, scale=SCALE).inputs(
            seed=0, start=0, stop=1
        )
        batch = jax.device_put(crops_of_a_step)
        for name, model in models.items():
            step = make_step(model)
            show(name, (step(batch) for _ in range(1 + steps)), step_batch_size, 1)


if __name__ == "__main__":
    tyro.cli(main)

"""Pictures a second with Ray and without: `python -m benchmarks.cluster`.

The first table is of upscaling with the default weights. The second is of copies in place of a
network, which take next to no time, so that what remains is files and Ray's own overhead; with
pictures sent to workers one by one, and in batches as `dvmsr upscale --ray` does.

Every worker has one core. Without Ray, one process uses all cores. `start` is the time until the
first results are there; the rates are of what follows.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import skimage.data
import tyro
from PIL import Image

from benchmarks import machine
from benchmarks.table import Cell, Measured, Report
from dvmsr_jax.pictures import jobs, spread
from dvmsr_jax.pictures.upscaler import PictureUpscaler, Upscaler
from dvmsr_jax.rgb import RgbUpscale

COLUMNS = ("", "start", "pictures/s", "ms per picture")


def copies() -> PictureUpscaler:
    """Leaves pictures as they are."""
    upscale: RgbUpscale = lambda image: iter([np.asarray(image)])  # noqa: E731
    return PictureUpscaler(upscale, 1)


@contextmanager
def cluster(workers: int) -> Iterator[tuple[str]]:
    """The address of a Ray with room for so many workers."""
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings(action="ignore"):  # JAX's about forks
        ray = Cluster(
            initialize_head=True, head_node_args={"num_cpus": workers, "include_dashboard": False}
        )
    try:
        yield (ray.address,)
    finally:
        ray.shutdown()


def make_pictures(folder: Path, count: int, side: int) -> None:
    """Writes different parts of a photograph."""
    folder.mkdir()
    photo = skimage.data.astronaut()
    rng = np.random.default_rng(0)
    for i in range(count):
        top, left = rng.integers(0, 512 - side, 2)
        Image.fromarray(photo[top : top + side, left : left + side]).save(folder / f"{i}.png")


def measure(name: str, outcomes: Iterable[jobs.Outcome]) -> list[Cell]:
    """A row of the table."""
    begin = time.perf_counter()
    times = []
    for outcome in outcomes:
        if outcome.status != "done":
            raise RuntimeError(f"{outcome.source}: {outcome.what}")
        times.append(time.perf_counter())
    # Those of a batch come at once.
    later = [moment for moment in times if moment - times[0] > 1e-2]
    rate = len(later) / (times[-1] - times[0])
    return [name, Measured(times[0] - begin, "s"), Measured(rate), Measured(1000 / rate)]


def compare(
    report: Report,
    make_upscaler: Callable[[], PictureUpscaler],
    source: Path,
    workers: Sequence[int],
    batches: Sequence[int],
) -> None:
    """Adds rows without Ray, and with these numbers of workers and sizes of batches."""

    def plan(scale: float, out: Path) -> list[jobs.Job | jobs.Outcome]:
        return jobs.plan([str(source)], f"{out}/", scale=scale, suffix=None)

    with tempfile.TemporaryDirectory() as out:
        upscaler = make_upscaler()
        scale = upscaler.scale
        report.row(measure("without Ray", jobs.run(plan(scale, Path(out)), upscaler)))
    for count in workers:
        with cluster(count) as ray:
            for size in batches:
                spread.BATCH = size
                with tempfile.TemporaryDirectory() as out:
                    outcomes: Generator[jobs.Outcome, None, None] = spread.run(
                        plan(scale, Path(out)), make_upscaler, ray=ray, device="cpu"
                    )
                    report.row(measure(f"workers: {count}, batches of {size}", outcomes))


def main(
    workers: tuple[int, ...] = (1, 2),
    count: int = 60,
    side: int = 128,
    small: int = 1_000,
    json: Path | None = None,
) -> None:
    """Prints pictures a second with Ray and without, as Markdown tables.

    Args:
        workers: numbers of workers.
        count: pictures to upscale.
        side: their side in pixels, below 512.
        small: pictures of 64x64 to copy.
        json: also write the tables to this file.
    """
    report = Report(machine.describe(), json)
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder, "in"), count, side)
        report.table(COLUMNS, text=COLUMNS[:1], title=f"upscaling {count} of {side}x{side}")
        compare(report, Upscaler, Path(folder, "in"), workers, [spread.BATCH])
        make_pictures(Path(folder, "small"), small, 64)
        report.table(COLUMNS, text=COLUMNS[:1], title=f"copying {small:,} of 64x64")
        compare(report, copies, Path(folder, "small"), workers, [1, spread.BATCH])


if __name__ == "__main__":
    tyro.cli(main)

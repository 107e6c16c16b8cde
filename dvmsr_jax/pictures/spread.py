"""Runs jobs on Ray's workers, many pictures at a time."""

import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dvmsr_jax import cluster
from dvmsr_jax.errors import UserError
from dvmsr_jax.pictures import places
from dvmsr_jax.pictures.jobs import STANDARD, Job, Outcome, Runner
from dvmsr_jax.pictures.places import Place
from dvmsr_jax.pictures.upscaler import PictureUpscaler

# Limits of a batch: small pictures are sent to a worker together, because one may take no longer
# than sending it. A batch usually takes seconds, so that workers end at about the same time.
BATCH, BATCH_BYTES = 16, 128 * 1024


def run(
    jobs: Sequence[Job | Outcome],
    make_upscaler: Callable[[], PictureUpscaler],
    *,
    ray: cluster.Where,
    device: str | None = None,
    keep: Iterable[str] = (),
    **options: Any,
) -> Generator[Outcome, None, None]:
    """`jobs.run` on a cluster: the same results, and the same outcomes in another order.

    Each worker makes its own upscaler. The largest pictures are begun first. A picture with which
    two workers died has failed.

    Args:
        jobs: from `jobs.plan`.
        make_upscaler: called in each worker.
        ray: see `cluster.spread`, as for `device`.
        keep: see `Runner`, as for the other options.

    Raises:
        UserError: as `cluster.spread`, and for standard input and output.
    """
    yield from (job for job in jobs if isinstance(job, Outcome))
    waiting = [job for job in jobs if isinstance(job, Job)]
    if any(STANDARD in (job.source, job.target) for job in waiting):
        raise UserError("--ray is for files: leave it out for standard input and output")
    options |= {"sources": _endangered(waiting), "keep": tuple(keep)}
    prepare = functools.partial(_prepare, make_upscaler, **options)
    folder = next((job.target.parent for job in waiting if isinstance(job.target, Path)), None)
    answers = cluster.spread(ray, prepare, _batches(waiting), device=device, folder=folder)
    for job, answer in answers:
        if isinstance(answer, cluster.Lost):
            yield Outcome(job.source, "failed", answer.reason)
        else:
            yield answer


def _prepare(
    make_upscaler: Callable[[], PictureUpscaler], stopped: cluster.Stopped, **options: Any
) -> Runner:
    return Runner(make_upscaler(), stopped=stopped, **options)


def _endangered(jobs: Iterable[Job]) -> list[Place]:
    """The sources that have the name of a result.

    Workers are not told the others, which may be millions. Links to them that have the name of a
    result may be replaced, which leaves the source as it is.
    """
    jobs = list(jobs)
    names = {places.real(job.target) for job in jobs}
    sources = ((job.source, places.real(job.source)) for job in jobs)
    return [path for path, real in sources if {real, os.path.splitext(real)[0]} & names]


def _batches(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """The jobs, largest files first; small ones in batches."""
    sizes = {job.source: places.size(job.source) for job in jobs}
    ordered = sorted(jobs, key=lambda job: sizes[job.source], reverse=True)
    batch: list[Job] = []
    size = 0
    for job in ordered:
        if batch and (len(batch) == BATCH or size + sizes[job.source] > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += sizes[job.source]
    if batch:
        yield batch

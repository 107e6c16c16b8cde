"""Runs tasks: each once, whatever number of processes share the folders."""

import contextlib
import datetime
import functools
import gc
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax

from benchmarks import machine
from dvmsr_jax import files
from experiments.tasks import Facts, Place, Task, in_order, is_done, write_result
from experiments.training import Training

# Tasks after which compiled programs are dropped, which would fill the memory.
KEPT = 8
# Seconds between looks at the tasks of other processes.
POLL = 5.0


def possible(tasks: Iterable[Task]) -> list[Task]:
    """The tasks that this machine can run and what they need, each after those that it needs."""
    return [task for task in in_order(tasks) if task.possible]


def without_training(tasks: Sequence[Task], place: Place) -> list[Task]:
    """Those of the tasks that depend on no training run which is still to be done."""

    def depends(task: Task) -> bool:
        return any(
            isinstance(needed, Training) and not is_done(needed, place)
            for needed in in_order([task])
        )

    return [task for task in tasks if not depends(task)]


def run(tasks: Sequence[Task], place: Place) -> None:
    """Runs those of the tasks that have no result; returns when all of them have one.

    They are `possible` ones: each comes after those that it needs.

    Tasks that other processes are at are left to them, and taken over if they end without a result.

    Raises:
        StoppedError: a signal stopped a training run.
        UserError: a task cannot be run.
    """
    _version()
    pace, waiting = _Pace(), False
    while left := [task for task in tasks if not is_done(task, place)]:
        for task in left:
            if not all(is_done(needed, place) for needed in task.needs):
                continue
            with _claim(task, place) as mine:
                if not mine or is_done(task, place):
                    continue
                time_left = duration(pace.of(sum(task.seconds() for task in left)))
                number = len(tasks) - len(left) + 1
                print(f"[{number}/{len(tasks)}, {time_left} left] {task}", flush=True)
                with pace.measuring(task):
                    _run_one(task, place)
            if number % KEPT == 0:
                jax.clear_caches()
                gc.collect()
            waiting = False
            break
        else:
            if not waiting:
                print(f"waiting for other processes: {', '.join(map(str, left[:3]))}", flush=True)
            waiting = True
            time.sleep(POLL)


def _run_one(task: Task, place: Place) -> None:
    _reset_peak_memory()
    begin = time.monotonic()
    result = task.run(place)
    origin: Facts = {
        "seconds": round(time.monotonic() - begin, 1),
        "peak_memory": machine.peak_memory(),
        "machine": machine.describe(),
        "version": _version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    write_result(task, place, result, origin)


@contextlib.contextmanager
def _claim(task: Task, place: Place) -> Iterator[bool]:
    """Whether this process alone may run the task in the body."""
    folder = place.work / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / task.id).open("w") as file:
        yield files.lock(file, wait=False) is not False


class _Pace:
    """How long tasks take in this process, relative to their estimates."""

    def __init__(self) -> None:
        self._estimated, self._taken = 0.0, 0.0

    @contextlib.contextmanager
    def measuring(self, task: Task) -> Iterator[None]:
        """Counts the body as this task."""
        begin = time.monotonic()
        yield
        self._taken += time.monotonic() - begin
        self._estimated += task.seconds()

    def of(self, seconds: float) -> float:
        """What an estimate amounts to."""
        return seconds * self._taken / self._estimated if self._estimated else seconds


def duration(seconds: float) -> str:
    """A time in words."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} s"


def _reset_peak_memory() -> None:
    """So that `machine.peak_memory` counts from here on, on Linux and for the host's memory."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@functools.cache
def _version() -> str:
    """The commit of the code, with a + if it was changed; "unknown" outside a repository.

    That of the first call, at the start: files may change while a process runs.
    """
    command = ["git", "describe", "--always", "--abbrev=10", "--dirty=+"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()

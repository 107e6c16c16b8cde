"""Work spread over the GPUs or cores of one or many machines by Ray.

Each worker, an actor of Ray, prepares itself once, and is given further items as it becomes free. A
worker on CPUs has one core: several of them at once are faster than one on all cores.
"""

import collections
import contextlib
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import tyro

from dvmsr_jax.errors import UserError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

Where = tuple[()] | tuple[str]
"""Value of the option --ray [ADDRESS]: (), for a Ray on this machine only, or the address of a
running one: "auto" or HOST:PORT."""

RayOption = Annotated[Where | None, tyro.conf.arg(metavar="[ADDRESS]")]
"""Type of the option; None without it."""

Stopped = Callable[[], bool]
"""Whether the work is to be abandoned. Workers ask it often, and then raise KeyboardInterrupt."""

_OBJECT_STORE = 200 * 2**20  # bytes; items and answers are small
# Bytes that a worker occupies beyond its items: Python, JAX, the compiled network and its bands.
_IDLE_WORKER = 700 * 2**20
_DEATHS = 2  # of its workers, after which an item is given up
_STILLBIRTHS = 3  # workers in a row that end while they start, when no other has started
_TICK, _GRACE = 2.0, 15.0  # seconds between looks at the cluster, and for workers to clean up
# Environment of the workers. XLA has as many threads as NPROC says; JAX reports a missing GPU.
_PLATFORMS = {
    "cpu": {"JAX_PLATFORMS": "cpu", "NPROC": "1"},
    "gpu": {"JAX_PLATFORMS": "cuda"},
}


class TooLargeError(Exception):
    """Raised by workers: an item needs more memory than the worker's share of its machine's."""

    def __init__(self, needed: int):
        super().__init__(needed)
        self.needed = needed
        """Bytes."""


class Lost(NamedTuple):
    """Takes the place of an item's answer if its workers died."""

    reason: str


def spread(
    where: Where,
    prepare: Callable[[Stopped], Callable[[Item, float], Answer]],
    batches: Iterable[Sequence[Item]],
    *,
    device: str | None = None,
) -> Iterator[tuple[Item, Answer | Lost]]:
    """Yields each item with its answer, as they come in.

    Batches are begun in the given order. The items that a dying worker had in hand are given to
    others, one at a time, and an item with which two workers died is `Lost`.

    Args:
        where: the cluster. If one at an address can grow, it is asked to, and so does the number of
            workers.
        prepare: called once in each worker. Returns the function that answers an item, given the
            bytes of memory that it may use. That function may raise TooLargeError. The item then
            waits until its machine has enough memory, or nothing else to do.
        batches: items that are sent to a worker together.
        device: "cpu": a worker a core. "gpu": a worker a GPU. None: "gpu" if there is one now.

    Raises:
        UserError: Ray or the device is missing, the cluster does not answer, or workers cannot
            start.
        Exception: any other that a worker raises.
    """
    tasks = [_Task(batch) for batch in batches]
    if not tasks:
        return
    with _connected(where) as ray:
        pool: _Pool[Item, Answer] = _Pool(ray, prepare, tasks, device, grows=bool(where))
        try:
            yield from pool.answers()
        except ray.exceptions.RayTaskError:  # a worker's exception that has no cause
            raise
        except ray.exceptions.RayError as error:
            raise UserError(
                f"--ray: the cluster fails ({_line(error)}); run the same command again to resume"
            ) from error
        finally:
            pool.close()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def _connected(where: Where) -> Iterator[ModuleType]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if importlib.util.find_spec("ray") is None:
        raise UserError('--ray needs Ray: pip install "dvmsr-jax[ray]"')
    import ray

    # It would print every death of a worker on standard output, even without log_to_driver.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    (address,) = where or ("local",)
    own: dict[str, Any] = (
        {} if where else {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    )
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        try:
            with warnings.catch_warnings(action="ignore"):  # JAX's about forks; these only exec
                ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **own)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"--ray {' '.join(where)}: {reason}") from error
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has replaced it
        yield ray
    finally:
        ray.shutdown()


class _Actor:
    """What runs in the worker's process; `stop` in a thread of its own."""

    def __init__(self, prepare: Callable[[Stopped], Callable[[Any, float], Any]], folder: str):
        self._prepare, self._stop = prepare, threading.Event()
        with contextlib.suppress(OSError):  # this machine may not have it, nor need it
            os.chdir(folder)

    def start(self) -> str:
        self._answer = self._prepare(self._stop.is_set)
        return self.machine()

    def machine(self) -> str:
        """The name of the worker's machine in Ray."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def answer(self, items: Sequence[Any], memory: float) -> list[Any]:
        answers: list[Any] = []
        for item in items:
            try:
                answers.append(self._answer(item, memory))
            except TooLargeError as error:
                answers.append(error)
        return answers

    def stop(self) -> None:
        self._stop.set()


@dataclass(frozen=True, eq=False)
class _Task(Generic[Item]):
    items: Sequence[Item]
    memory: int | None = None
    """Bytes; None: a worker's share, as far as is known."""
    deaths: int = 0


class _Machine(NamedTuple):
    memory: int
    """Bytes for items, beyond what idle workers occupy."""
    share: int
    """Bytes for one worker's items."""


@dataclass(eq=False)
class _Worker(Generic[Item]):
    actor: Any
    machine: str | None = None
    """None until it has started."""
    free: bool = False
    task: _Task[Item] | None = None
    """What it has in hand."""


class _Pool(Generic[Item, Answer]):
    """The workers, and the tasks that wait for them."""

    def __init__(
        self,
        ray: ModuleType,
        prepare: Callable[[Stopped], Callable[[Item, float], Answer]],
        tasks: "Iterable[_Task[Item]]",
        device: str | None,
        grows: bool,
    ):
        self._ray, self._grows = ray, grows
        self._waiting = collections.deque(tasks)
        self._workers: list[_Worker[Item]] = []
        self._calls: dict[Any, _Worker[Item]] = {}
        """What runs in the workers, by Ray's reference to its result."""
        self._machines: dict[str, _Machine] = {}
        self._stillbirths = 0
        self._counted = -_TICK
        if device is None:
            device = "gpu" if ray.cluster_resources().get("GPU") else "cpu"
        if device not in _PLATFORMS:
            raise UserError(f"--device {device}: --ray uses CPUs or NVIDIA GPUs only")
        self._kind = device.upper()
        if not ray.cluster_resources().get(self._kind):
            if not grows:
                raise UserError(f"--device {device}: Ray finds none on this machine")
            print(f"--ray: the cluster has no {self._kind}; waiting for one", file=sys.stderr)
        # Bytes reserved for a worker: with more, none would start on machines that have less.
        most = max((there.get("memory", 0) for there in self._alive().values()), default=0)
        self._reserved = int(min(most, _IDLE_WORKER))
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
        self._actor = ray.remote(_Actor).options(
            num_cpus=1,
            num_gpus=int(self._kind == "GPU"),
            memory=self._reserved,
            max_concurrency=2,  # for `stop`
            runtime_env={
                "env_vars": _PLATFORMS[device]
                | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
            },
        )
        self._arguments = ray.put(prepare), os.getcwd()

    def answers(self) -> Iterator[tuple[Item, Answer | Lost]]:
        while self._waiting or any(worker.task for worker in self._workers):
            self._hire()
            self._hand_out()
            calls = list(self._calls)
            if not calls:  # there is no room for a worker at the moment
                time.sleep(_TICK)
                continue
            self._ray.wait(calls, timeout=_TICK)  # for one of them; then look for all
            done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
            for call in done:
                yield from self._receive(call)

    def close(self) -> None:
        """Gives the workers time to abandon their work, and ends them."""
        busy = [call for call, worker in self._calls.items() if worker.task is not None]
        for call in busy:
            self._calls[call].actor.stop.remote()
        if busy:
            self._ray.wait(busy, num_returns=len(busy), timeout=_GRACE)
        for worker in self._workers:
            self._ray.kill(worker.actor)

    def _hire(self) -> None:
        """Asks Ray for workers; they start when and where there is room."""
        if time.monotonic() - self._counted < _TICK:
            return
        self._counted = time.monotonic()
        room = sum(map(self._room, self._alive().values()))
        # What does not fit makes a cluster that can grow start machines.
        wanted = max(2 * room, 1) if self._grows else room
        wanted = min(wanted, len(self._waiting) + sum(w.task is not None for w in self._workers))
        while len(self._workers) < wanted:
            worker: _Worker[Item] = _Worker(self._actor.remote(*self._arguments))
            self._workers.append(worker)
            self._calls[worker.actor.start.remote()] = worker

    def _hand_out(self) -> None:
        for worker in self._workers:
            if not worker.free or worker.machine is None:
                continue
            task = next((task for task in self._waiting if self._fits(task, worker)), None)
            if task is None:
                continue
            self._waiting.remove(task)
            memory = self._machines[worker.machine].share if task.memory is None else float("inf")
            worker.free, worker.task = False, task
            self._calls[worker.actor.answer.remote(task.items, memory)] = worker

    def _fits(self, task: _Task[Item], worker: _Worker[Item]) -> bool:
        assert worker.machine is not None
        machine = self._machines[worker.machine]
        used = [
            machine.share if other.task.memory is None else other.task.memory
            for other in self._workers
            if other.machine == worker.machine and other.task is not None
        ]
        needed = machine.share if task.memory is None else task.memory
        return not used or sum(used) + needed <= machine.memory

    def _receive(self, call: Any) -> Iterator[tuple[Item, Answer | Lost]]:
        worker = self._calls.pop(call)
        try:
            result = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.RayError as error:
            yield from self._bury(worker, error)
            return
        if worker.task is None:
            if self._measure(result):
                worker.machine, worker.free, self._stillbirths = result, True, 0
            else:
                self._remove(worker)
            return
        task, worker.task, worker.free = worker.task, None, True
        for item, answer in zip(task.items, result, strict=True):
            if isinstance(answer, TooLargeError):
                self._waiting.appendleft(_Task((item,), answer.needed, task.deaths))
            else:
                yield item, answer

    def _bury(self, worker: _Worker[Item], error: Exception) -> Iterator[tuple[Item, Lost]]:
        """Removes a dead worker; its items wait for another, or are lost."""
        self._remove(worker)
        if worker.machine is not None:
            # Perhaps its machine is dead, and the free workers there, too. They must not get the
            # items that it has just lost, which would count as further deaths.
            for other in self._workers:
                if other.machine == worker.machine and other.free:
                    other.free = False
                    self._calls[other.actor.machine.remote()] = other
        task = worker.task
        if task is None:
            if worker.machine is None and all(other.machine is None for other in self._workers):
                self._stillbirths += 1
            if self._stillbirths == _STILLBIRTHS:
                raise UserError(
                    f"--ray: {_STILLBIRTHS} workers ended while they started: {_line(error)}"
                )
            return
        self._counted = -_TICK  # it is replaced at once
        for item in task.items:
            if task.deaths + 1 == _DEATHS:
                yield (
                    item,
                    Lost(f"its process was killed {_DEATHS} times, perhaps for lack of memory"),
                )
            else:
                self._waiting.appendleft(_Task((item,), task.memory, task.deaths + 1))

    def _remove(self, worker: _Worker[Item]) -> None:
        self._workers.remove(worker)
        self._ray.kill(worker.actor)  # Ray may only have lost sight of it

    def _alive(self) -> dict[str, dict[str, float]]:
        """What Ray has on each machine, by the machine's name."""
        nodes = (node for node in self._ray.nodes() if node["Alive"])
        return {node["NodeID"]: node["Resources"] for node in nodes}

    def _room(self, resources: dict[str, float]) -> int:
        """The number of workers that a machine has room for."""
        room = int(resources.get(self._kind, 0))
        if self._reserved:
            room = min(room, int(resources.get("memory", 0) // self._reserved))
        return room

    def _measure(self, machine: str) -> bool:
        """Learns how much memory a machine has. Returns False if it is dead."""
        if machine not in self._machines:
            resources = self._alive().get(machine)
            if resources is None:
                return False
            workers = max(self._room(resources), 1)
            memory = max(int(resources["memory"]) - workers * _IDLE_WORKER, 0)
            self._machines[machine] = _Machine(memory, memory // workers)
        return True

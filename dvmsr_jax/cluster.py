"""Work spread over the GPUs or cores of one or many machines by Ray.

Each worker, an actor of Ray, prepares itself once, and is given further items as it becomes free. A
worker on CPUs has one core: several of them at once are faster than one on all cores.
"""

import collections
import contextlib
import functools
import importlib.util
import logging
import os
import platform
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
from tqdm import tqdm

from dvmsr_jax import files
from dvmsr_jax.errors import DiskFullError, UserError

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
_WORKER = 1024 * 2**20  # bytes that Ray reserves for a worker
_DEATHS = 2  # of its workers, after which an item is given up
_STILLBIRTHS = 3  # workers that end while they start, after which their machine is left out
_TICK, _GRACE = 2.0, 15.0  # seconds between looks at the cluster, and for workers to clean up
# Seconds until Ray must have noticed that a machine has died: after a worker's death that the
# machine itself reported; and after a worker fell silent, by Ray's usual times.
_REPORTED, _SILENT = 5.0, 75.0
# The label that Ray gives to each machine.
_NODE = "ray.io/node-id"
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
    folder: Path | None = None,
) -> Iterator[tuple[Item, Answer | Lost]]:
    """Yields each item with its answer, as they come in.

    Batches are begun in the given order. The items that a dying worker had in hand are given to
    others, one at a time, and an item with which two workers died is `Lost`. The death of a whole
    machine does not count. A machine where workers cannot start, or whose disk is full, is left
    out, with a line on standard error.

    Args:
        where: the cluster. If one at an address can grow, it is asked to, and so does the number of
            workers.
        prepare: called once in each worker. Returns the function that answers an item, given the
            bytes of memory that it may use. That function may raise TooLargeError. The item then
            waits until its machine has enough memory, or nothing else to do.
        batches: items that are sent to a worker together.
        device: "cpu": a worker a core. "gpu": a worker a GPU. None: "gpu" if there is one now.
        folder: a local folder that the workers write to, made if it is missing. A machine that has
            another folder there is left out.

    Raises:
        UserError: Ray or the device is missing, the cluster does not answer, or all machines have
            been left out.
        Exception: any other that a worker raises.
    """
    tasks = [_Task(batch) for batch in batches]
    if not tasks:
        return
    with _connected(where) as ray, _sign(folder) as sign:
        pool: _Pool[Item, Answer] = _Pool(ray, prepare, tasks, device, sign, grows=bool(where))
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


def complete(
    answers: Iterable[tuple[Item, Answer | Lost]], name: Callable[[Item], object]
) -> Iterator[tuple[Item, Answer]]:
    """Yields the answers of `spread`. Raises UserError at the end if items were lost."""
    lost = []
    for item, answer in answers:
        if isinstance(answer, Lost):
            lost.append(f"{name(item)}: {answer.reason}")
        else:
            yield item, answer
    if lost:
        raise UserError("\n".join([*lost, "run the same command again to resume"]))


@contextlib.contextmanager
def _sign(folder: Path | None) -> Iterator[Path | None]:
    """A hidden file in the folder, by which workers see that their machine shares the folder.

    None if nothing can be written there, which the workers will report.
    """
    sign = None
    if folder is not None:
        sign = files.hidden(folder.absolute())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sign.touch()
        except OSError:
            sign = None
    try:
        yield sign
    finally:
        if sign is not None:
            sign.unlink(missing_ok=True)


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
            if isinstance(error, ConnectionError) and "RAY_AUTH_MODE" not in os.environ:
                reason += "; if it asks for a token, set RAY_AUTH_MODE=token"
            raise UserError(f"--ray {' '.join(where)}: {reason}") from error
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has replaced it
        yield ray
    finally:
        ray.shutdown()


class _Actor:
    """What runs in the worker's process; `stop` in a thread of its own."""

    def __init__(
        self,
        prepare: Callable[[Stopped], Callable[[Any, float], Any]],
        folder: str,
        sign: Path | None,
    ):
        self._prepare, self._sign, self._stop = prepare, sign, threading.Event()
        with contextlib.suppress(OSError):  # this machine may not have it, nor need it
            os.chdir(folder)

    def start(self) -> str:
        """Returns the name of the worker's machine in Ray."""
        if self._sign is not None and not files.appears(self._sign):
            raise UserError(
                f"{self._sign.parent}: {platform.node()} does not have the same folder there;"
                " name one that all machines share"
            )
        self._answer = self._prepare(self._stop.is_set)
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
    machine: str | None
    """None until a machine that has been asked for is there."""
    started: bool = False
    task: _Task[Item] | None = None
    """What it has in hand."""


class _Death(NamedTuple):
    """Of a worker whose machine may have died, too."""

    machine: str
    task: _Task[Any] | None
    """What it had in hand; None if it had not started."""
    known: float
    """When, by time.monotonic(), the machine is known to be alive if nothing else is heard."""
    error: Exception


class _Pool(Generic[Item, Answer]):
    """The workers, and the tasks that wait for them."""

    def __init__(
        self,
        ray: ModuleType,
        prepare: Callable[[Stopped], Callable[[Item, float], Answer]],
        tasks: "Iterable[_Task[Item]]",
        device: str | None,
        sign: Path | None,
        grows: bool,
    ):
        self._ray, self._grows = ray, grows
        self._waiting = collections.deque(tasks)
        self._large: collections.deque[_Task[Item]] = collections.deque()
        """Those that wait for more than a worker's share of memory."""
        self._workers: list[_Worker[Item]] = []
        self._calls: dict[Any, _Worker[Item]] = {}
        """What runs in the workers, by Ray's reference to its result."""
        self._machines: dict[str, _Machine] = {}
        self._left_out: dict[str, Exception] = {}
        """Machines that are not used, and why."""
        self._deaths: list[_Death] = []
        self._stillbirths: collections.Counter[str] = collections.Counter()
        """Workers that ended while they started, by machine."""
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
        self._reserved = int(min(most, _WORKER))
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
        self._make_actor = functools.partial(
            ray.remote(_Actor).options,
            num_cpus=1,
            num_gpus=int(self._kind == "GPU"),
            memory=self._reserved,
            max_concurrency=2,  # for `stop`
            runtime_env={
                "env_vars": _PLATFORMS[device]
                | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
            },
        )
        self._arguments = ray.put(prepare), os.getcwd(), sign

    def answers(self) -> Iterator[tuple[Item, Answer | Lost]]:
        while self._left():
            self._hire()
            self._hand_out()
            calls = list(self._calls)
            if calls:
                self._ray.wait(calls, timeout=_TICK)  # for one of them; then look for all
                done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
                for call in done:
                    if call in self._calls:  # its machine may have been left out meanwhile
                        yield from self._receive(call)
            else:  # there is no room for a worker at the moment
                time.sleep(_TICK)
            yield from self._judge()

    def close(self) -> None:
        """Gives the workers time to abandon their work, and ends them."""
        busy = [call for call, worker in self._calls.items() if worker.task is not None]
        for call in busy:
            self._calls[call].actor.stop.remote()
        if busy:
            self._ray.wait(busy, num_returns=len(busy), timeout=_GRACE)
        for worker in self._workers:
            self._ray.kill(worker.actor)

    def _left(self) -> int:
        """The number of tasks that are not done."""
        in_hand = sum(worker.task is not None for worker in self._workers)
        lost = sum(death.task is not None for death in self._deaths)
        return len(self._waiting) + len(self._large) + in_hand + lost

    def _hire(self) -> None:
        """Hires workers where there is room, and dismisses those that have nothing left to do."""
        if time.monotonic() - self._counted < _TICK:
            return
        self._counted = time.monotonic()
        alive, usable = self._alive(), self._usable()
        for worker in [one for one in self._workers if one.machine and one.task is None]:
            if worker.machine not in alive:
                self._remove(worker)
        lacking: list[tuple[int, str]] = []
        for machine, room in usable.items():
            taken = sum(worker.machine == machine for worker in self._workers)
            taken += sum(death.machine == machine and not death.task for death in self._deaths)
            lacking += [(i, machine) for i in range(taken, room)]
        lacking.sort()  # the same number on each machine, if they are few
        left = self._left()
        placed = sum(worker.machine is not None for worker in self._workers)
        for _, machine in lacking[: max(left - placed, 0)]:
            self._hire_on(machine, machine)
        if self._grows:  # as many again, on machines that are not there yet
            asked = sum(worker.machine is None for worker in self._workers)
            more = min(max(sum(usable.values()), 1) - asked, left - len(self._workers))
            for _ in range(more):
                self._hire_on(None, f"!in({','.join(alive)})")
        idle = [worker for worker in self._workers if worker.task is None]
        idle.sort(key=lambda worker: (worker.machine is not None, worker.started))
        for worker in idle[: max(len(self._workers) - left, 0)]:
            self._remove(worker)

    def _hire_on(self, machine: str | None, label: str) -> None:
        """Asks Ray for a worker on a machine with this label."""
        actor = self._make_actor(label_selector={_NODE: label}).remote(*self._arguments)
        worker = _Worker[Item](actor, machine)
        self._workers.append(worker)
        self._calls[actor.start.remote()] = worker

    def _hand_out(self) -> None:
        claimed = self._claimed()
        for worker in self._workers:
            if not worker.started or worker.task is not None:
                continue
            task = next((task for task in self._large if self._fits(task, worker)), None)
            memory = float("inf")
            if task is not None:
                self._large.remove(task)
            elif self._waiting and worker.machine != claimed and self._fits(None, worker):
                task = self._waiting.popleft()
                memory = self._machine(worker).share
            else:
                continue
            worker.task = task
            self._calls[worker.actor.answer.remote(task.items, memory)] = worker

    def _claimed(self) -> str | None:
        """The machine that gets no other tasks until there is room for the first of the large."""
        busy = {one.machine for one in self._workers if one.task and one.task.memory is not None}
        there = {one.machine for one in self._workers if one.machine is not None and one.started}
        if not self._large or not there:
            return None
        largest = max(there, key=lambda machine: (self._machines[machine].memory, machine))
        return None if largest in busy else largest

    def _machine(self, worker: _Worker[Item]) -> _Machine:
        assert worker.machine is not None
        return self._machines[worker.machine]

    def _fits(self, task: _Task[Item] | None, worker: _Worker[Item]) -> bool:
        """Whether the worker's machine has the memory for a task. None: for one that has to make do
        with a worker's share."""
        machine = self._machine(worker)

        def needed(task: _Task[Item] | None) -> int:
            return machine.share if task is None or task.memory is None else task.memory

        used = [
            needed(other.task)
            for other in self._workers
            if other.machine == worker.machine and other.task is not None
        ]
        return not used or sum(used) + needed(task) <= machine.memory

    def _receive(self, call: Any) -> Iterator[tuple[Item, Answer | Lost]]:
        worker = self._calls.pop(call)
        try:
            result = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            starting = not worker.started and isinstance(cause, UserError | OSError)
            if not (starting or isinstance(cause, DiskFullError)):
                raise cause from None
            if worker.machine is None:  # another worker on that machine will tell
                self._remove(worker)
            else:
                self._leave_out(worker.machine, cause)
            return
        except self._ray.exceptions.RayError as error:
            self._bury(worker, error)
            return
        if not worker.started:
            worker.machine, worker.started = result, True
            if result in self._left_out or not self._measure(result):
                self._remove(worker)
            else:
                del self._stillbirths[result]
            return
        task, worker.task = worker.task, None
        assert task is not None
        for item, answer in zip(task.items, result, strict=True):
            if isinstance(answer, TooLargeError):
                self._large.append(_Task((item,), answer.needed, task.deaths))
            else:
                yield item, answer

    def _leave_out(self, machine: str, reason: Exception) -> None:
        """Stops using a machine. Raises the reason if it was the last."""
        self._left_out[machine] = reason
        self._usable()
        names = {node["NodeID"]: node["NodeManagerHostname"] for node in self._ray.nodes()}
        tqdm.write(f"--ray: {names[machine]} is left out: {_line(reason)}", file=sys.stderr)
        for worker in [worker for worker in self._workers if worker.machine == machine]:
            self._remove(worker)
            if worker.task is not None:
                self._return(worker.task)

    def _return(self, task: _Task[Item]) -> None:
        (self._waiting if task.memory is None else self._large).appendleft(task)

    def _bury(self, worker: _Worker[Item], error: Exception) -> None:
        """Removes a dead worker. Its death is judged later."""
        self._remove(worker)
        if worker.machine is not None and (worker.task is not None or not worker.started):
            silent = isinstance(error, self._ray.exceptions.ActorUnavailableError)
            known = time.monotonic() + (_SILENT if silent else _REPORTED)
            self._deaths.append(_Death(worker.machine, worker.task, known, error))
        self._counted = -_TICK  # it is replaced at once

    def _judge(self) -> Iterator[tuple[Item, Lost]]:
        """Blames the deaths of workers on their items or machines, unless the machine died, too."""
        if not self._deaths:
            return
        alive, now = self._alive(), time.monotonic()
        judged = [one for one in self._deaths if one.known <= now or one.machine not in alive]
        self._deaths = [death for death in self._deaths if death not in judged]
        for death in judged:
            task = death.task
            if task is not None and death.machine not in alive:
                self._return(task)
            elif task is not None:
                for item in task.items:
                    if task.deaths + 1 == _DEATHS:
                        reason = "perhaps for lack of memory"
                        yield item, Lost(f"its process was killed {_DEATHS} times, {reason}")
                    else:
                        self._return(_Task((item,), task.memory, task.deaths + 1))
            elif death.machine in alive and death.machine not in self._left_out:
                self._stillbirths[death.machine] += 1
                if self._stillbirths[death.machine] == _STILLBIRTHS:
                    reason = f"{_STILLBIRTHS} workers ended while they started"
                    self._leave_out(
                        death.machine, UserError(f"--ray: {reason}: {_line(death.error)}")
                    )

    def _remove(self, worker: _Worker[Item]) -> None:
        self._workers.remove(worker)
        self._calls = {call: one for call, one in self._calls.items() if one is not worker}
        self._ray.kill(worker.actor)  # Ray may only have lost sight of it

    def _alive(self) -> dict[str, dict[str, float]]:
        """What Ray has on each machine, by the machine's name."""
        nodes = (node for node in self._ray.nodes() if node["Alive"])
        return {node["NodeID"]: node["Resources"] for node in nodes}

    def _usable(self) -> dict[str, int]:
        """The number of workers that there is room for on each machine that can be used.

        Raises the reason if the machines that there are have all been left out.
        """
        rooms = {machine: self._room(there) for machine, there in self._alive().items()}
        usable = {
            machine: room
            for machine, room in rooms.items()
            if room and machine not in self._left_out
        }
        refused = [reason for machine, reason in self._left_out.items() if machine in rooms]
        if refused and not usable:
            raise refused[-1]
        return usable

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

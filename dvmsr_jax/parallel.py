"""Several devices and processes: a mesh with the axis `data`, sharded batches, all else replicated.

Every process runs the same program on its own devices and its own share of each batch. Only the
first process writes to the terminal and the logs.
"""

import atexit
import collections
import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost
from tqdm import tqdm

from dvmsr_jax.config import Cluster
from dvmsr_jax.errors import UserError

AXIS = "data"

# Key under which JAX's coordinator stores the message of the first process that failed, and the
# interval at which each process looks for it, in seconds.
_FAILURE = "dvmsr/failure"
_POLL = 1.0
# Keys under which each process counts these looks, and the seconds after which one that no longer
# counts is taken for dead. JAX itself aborts all processes 100 s after the end of one.
_BEATS = "dvmsr/beats/"
_SILENCE = 60.0


def start(cluster: Cluster) -> None:
    """Joins the other processes, if there are any. Call it before using JAX.

    Without addresses, JAX detects the processes of SLURM, Open MPI 4 and TPU pods. If there are
    none, or if only `num_processes` = 1 is given, this process is the only one.

    Raises:
        UserError: the address and numbers are given only in part, the other processes cannot be
            reached, or they have different numbers of devices.
    """
    given = [cluster.coordinator_address, cluster.num_processes, cluster.process_id]
    if given == [None, 1, None]:
        return
    if any(value is not None for value in given) and None in given:
        raise UserError(
            "cluster.coordinator-address, cluster.num-processes and cluster.process-id belong "
            "together: pass all three or none"
        )
    if cluster.coordinator_address is not None and cluster.process_id:
        _wait_for(cluster.coordinator_address, cluster.timeout)
    # It would swallow a SIGTERM that arrives before the training loop, which has its own handler.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(cluster.timeout, _give_up, [cluster.timeout])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            cluster.coordinator_address,
            cluster.num_processes,
            cluster.process_id,
            initialization_timeout=cluster.timeout + 60,  # when JAX aborts the process itself
            # Otherwise, under SLURM, detection would limit each process to a single GPU.
            cluster_detection_method=None if None in given else "deactivate",
        )
    except ValueError as error:
        if not str(error).startswith("coordinator_address should be defined"):
            raise UserError(f"the cluster is described incompletely: {error}") from error
        # Otherwise there is no cluster.
    except RuntimeError as error:
        raise UserError(
            f"the processes of the cluster did not find each other ({error}); "
            "if there is only one, pass --cluster.num-processes 1"
        ) from error
    else:
        _failures.watch()
        _check_even()
    finally:
        late.cancel()


def is_first() -> bool:
    """Whether this is the process that prints and writes logs."""
    return jax.process_index() == 0


def say(line: str, file: Any = None) -> None:
    """Prints a line in the first process only."""
    if is_first():
        print(line, file=file, flush=True)


def wait_for_all(name: str) -> None:
    """Waits until every process has called this."""
    multihost_utils.sync_global_devices(name)


def from_first(value: float) -> float:
    """The first process's value, in all processes."""
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def everywhere(flag: bool) -> bool:
    """Whether the flag is true in all processes; returns the same in each."""
    return bool(np.all(multihost_utils.process_allgather(np.array(flag))))


def make_mesh(batch_size: int, accumulate: int = 1) -> Mesh:
    """A mesh over all devices of all processes.

    Raises:
        UserError: a batch of this size, in `accumulate` parts, does not divide evenly among them.
    """
    devices = jax.device_count()
    if accumulate < 1 or batch_size % (devices * accumulate):
        parts = "" if accumulate == 1 else f" in {accumulate} accumulated parts"
        raise UserError(
            f"the batch size is {batch_size}, which {devices} devices cannot share evenly{parts}: "
            "choose another, or fewer devices (for GPUs, CUDA_VISIBLE_DEVICES=0,1)"
        )
    return Mesh(np.asarray(jax.devices()), (AXIS,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies every array, which must be equal in all processes, to every device."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def copied(x):
        if isinstance(x, np.ndarray):  # device_put would gather all processes' copies to compare
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
        return jax.device_put(x, sharding)

    return jax.tree.map(copied, tree)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays, split over the devices along their first axis, from each process's rows."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def prefetch(batches: Iterable[Any], mesh: Mesh, ahead: int = 2) -> Iterator[Any]:
    """Yields the batches on the devices, starting each transfer `ahead` batches early."""
    batches = (shard_batch(batch, mesh) for batch in batches)
    queue = collections.deque(itertools.islice(batches, ahead))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(batches, 1))


def joined() -> bool:
    """Whether this is one of several processes."""
    return _failures.watching


def is_disconnection(error: BaseException) -> bool:
    """Whether a collective operation failed because another process did not answer."""
    return joined() and any(word in str(error) for word in ("Gloo", "NCCL", "oordination"))


def end_all(line: str) -> None:
    """Ends all processes, each with this line on stderr; returns if this is the only process.

    For an error in one process: otherwise the others would wait for it in collective operations
    until JAX aborts them.
    """
    _failures.end_all(line)


class _Failures:
    """Lets a process that fails end the others."""

    def __init__(self) -> None:
        self._client: Any = None
        self._ending = threading.Lock()  # acquired once, by the thread that ends this process
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._stopped = threading.Event()

    @property
    def watching(self) -> bool:
        """Whether there are other processes."""
        return self._client is not None

    def watch(self) -> None:
        """Starts a thread that ends this process when another has failed."""
        self._client = multihost.get_jax_distributed_client()
        self._watcher.start()
        # Runs before JAX's own exit handler, which was registered earlier. A thread that is inside
        # JAX's client when the interpreter exits would abort the process.
        atexit.register(self._stop)

    def end_all(self, line: str) -> None:
        """See the function of this name."""
        if not self.watching:
            return
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the watching thread is about to end the process
        try:
            self._client.key_value_set(_FAILURE, line)
        except Exception:  # another process failed first, which may have caused this failure
            line = self._found() or line
        self._end(line, linger=2 * _POLL)

    def _watch(self) -> None:
        last: dict[str, tuple[str, float]] = {}  # process -> its count, time of last change
        for beat in itertools.count():
            if self._stopped.wait(_POLL):
                return
            if (line := self._found()) and self._ending.acquire(blocking=False):
                self._end(line, linger=0)
            now = time.monotonic()
            with contextlib.suppress(Exception):  # JAX is shutting down
                self._client.key_value_set(
                    f"{_BEATS}{jax.process_index()}", str(beat), allow_overwrite=True
                )
                if not is_first():
                    continue
                for key, count in self._client.key_value_dir_get(_BEATS):
                    if last.get(key, ("", now))[0] != count:
                        last[key] = count, now
                    elif now - last[key][1] > _SILENCE:
                        self.end_all(
                            f"error: process {key.rpartition('/')[2]} of the run has ended or does "
                            "not answer; start all of them again to resume"
                        )

    def _stop(self) -> None:
        self._stopped.set()
        self._watcher.join()
        with contextlib.suppress(Exception):  # so that the others do not take it for dead
            self._client.key_value_delete(f"{_BEATS}{jax.process_index()}")

    def _found(self) -> str | None:
        try:
            return self._client.key_value_try_get(_FAILURE)
        except Exception:  # there is none, or JAX is shutting down
            return None

    def _end(self, line: str, linger: float) -> None:
        sys.stdout.flush()
        tqdm.write(line, file=sys.stderr)  # not in the middle of a progress bar
        # The others lose their connections when this process ends, and the coordinator when the
        # first process ends, which therefore waits longest.
        time.sleep(linger + (2 * _POLL if is_first() else 0))
        os._exit(1)  # sys.exit would wait for the others


_failures = _Failures()


def _give_up(timeout: int) -> None:
    """Ends this process, which waits in a call of JAX that nothing else can interrupt."""
    print(
        f"error: not all processes of the cluster started within {timeout} s: start the others, or "
        "raise --cluster.timeout",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _check_even() -> None:
    """Raises UserError, in every process, if they have different numbers of devices."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        numbers = ", ".join(str(counts[i]) for i in sorted(counts))
        raise UserError(
            f"the processes have different numbers of devices ({numbers}): give each the same (for "
            "GPUs, with CUDA_VISIBLE_DEVICES)"
        )


def _wait_for(address: str, timeout: int) -> None:
    """Waits until HOST:PORT accepts connections: JAX would end the process if nothing answered."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=timeout):
                return
        except (OSError, ValueError, OverflowError) as error:
            if not isinstance(error, OSError) or time.monotonic() >= deadline:
                raise UserError(
                    f"cluster.coordinator-address {address}: no answer ({error}); is the first "
                    "process running, and reachable from here?"
                ) from error
        time.sleep(0.2)


class AnyProcess:
    """Whether any process has raised its flag; returns the same in all of them.

    The result is based on the flags of `LAG` calls ago, so that no step waits for it. With a single
    process, it is that process's current flag.
    """

    LAG = 2

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._any = jax.jit(lambda flags: flags.any())
        self._answers: collections.deque[jax.Array] = collections.deque()

    def __call__(self, flag: bool) -> bool:
        if jax.process_count() == 1:
            return flag
        flags = np.full(jax.local_device_count(), flag)
        self._answers.append(self._any(shard_batch(flags, self._mesh)))
        return len(self._answers) > self.LAG and bool(self._answers.popleft())

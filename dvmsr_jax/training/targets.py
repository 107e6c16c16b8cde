"""Targets: a teacher's outputs for the training sub-images, computed once and stored beside them.

Each teacher has a folder of targets: arrays, in files of `PER_SHARD` each, and INFO, with the
files' checksums and the teacher's path.
"""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grain
import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import UInt8
from tqdm import tqdm

from dvmsr_jax import cluster, parallel
from dvmsr_jax.data.records import DataError, Preparation, hr_side, open_records
from dvmsr_jax.files import appears, checksum, replacing, write_json
from dvmsr_jax.inference import upscale_pixels
from dvmsr_jax.model import Weights
from dvmsr_jax.pretrained import load_weights
from dvmsr_jax.program import keep_compiled_programs

# Targets per file, and thus the most work that an interruption can lose.
PER_SHARD = 256
INFO = "targets.json"
_ENSEMBLE = "-ensemble"
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@dataclass
class Info:
    """The content of INFO, which describes a folder of targets."""

    ckpt: str
    """The teacher's path."""
    sha256: dict[str, str]
    """Checksums by file name."""

    @classmethod
    def read(cls, path: Path) -> "Info":
        """Reads a folder's INFO, if it exists. Raises DataError if it is damaged."""
        try:
            match json.loads((path / INFO).read_text()):
                case {"ckpt": str(ckpt), "sha256": dict(sha256)} if all(
                    isinstance(digest, str) for digest in sha256.values()
                ):
                    return cls(ckpt, sha256)
            raise ValueError("it was not written by `distill`")
        except FileNotFoundError:
            return cls("TEACHER", {})
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path / INFO}: is damaged ({error}); remove it, and distil again to recreate it"
            ) from error

    def write(self, path: Path) -> None:
        """Writes what `read` returns."""
        sha256 = dict(sorted(self.sha256.items()))
        write_json(path / INFO, {"ckpt": self.ckpt, "sha256": sha256})


class Targets(Sequence[UInt8[np.ndarray, "H W 3"]]):
    """The targets in a folder, in the order of the records, read from disk on use."""

    def __init__(self, shapes: Mapping[Path, tuple[int, ...]]):
        self._shards = [open_shard(path, shape) for path, shape in shapes.items()]
        self._count = sum(len(shard) for shard in self._shards)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W 3"]:  # type: ignore[override]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._shards[index // PER_SHARD][index % PER_SHARD]


def load_targets(folder: Path, teacher: str, *, self_ensemble: bool, ckpt: Path) -> Targets:
    """Opens the targets that `distill` wrote for the teacher with this `Weights.identity`.

    Raises:
        DataError: some are missing; the message gives the command to compute them from `ckpt`.
    """
    path = folder / "targets" / _name(teacher, self_ensemble)
    missing = _missing(path, ckpt)
    if missing is not None:
        raise DataError(missing)
    return Targets(shard_shapes(path))


def target_folders(folder: Path) -> list[Path]:
    """The folders of targets in a folder of records, one per teacher."""
    return sorted(path for path in (folder / "targets").glob("*") if path.is_dir())


def shard_shapes(path: Path) -> dict[Path, tuple[int, ...]]:
    """The files of a complete folder of targets, and the shapes of their arrays."""
    preparation = Preparation.read(path.parents[1])
    count = sum(shard.records for shard in preparation.of_split("train").values())
    side = hr_side(preparation.scale)
    return {
        path / f"{start // PER_SHARD:05}.npy": (min(PER_SHARD, count - start), side, side, 3)
        for start in range(0, count, PER_SHARD)
    }


def open_shard(path: Path, shape: tuple[int, ...]) -> UInt8[np.ndarray, "n H W 3"]:
    """The targets in a file, read from disk on use. Raises DataError if the file is damaged."""
    try:
        shard = np.load(path, mmap_mode="r")
        if shard.shape != shape or shard.dtype != np.uint8:
            raise ValueError(f"it holds {shard.dtype} {shard.shape}, expected uint8 {shape}")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: is damaged ({error}); remove it and distil again") from error
    return shard


def find_unfinished(folder: Path) -> list[str]:
    """A line for each incomplete folder of targets in a folder of records, with the command."""
    missing = [_missing(path, Info.read(path).ckpt) for path in target_folders(folder)]
    return [line for line in missing if line is not None]


def find_problems(folder: Path) -> list[str]:
    """Finds the problems of all targets in a folder of records, one line each.

    Compares shapes and checksums of the existing files; `find_unfinished` lists missing ones.

    Raises:
        DataError: it is not a folder of prepared records.
    """
    Preparation.read(folder)
    shards = [
        (path, shape, checksums.get(path.name))
        for parent in target_folders(folder)
        for checksums in [Info.read(parent).sha256]
        for path, shape in shard_shapes(parent).items()
        if path.exists()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = pool.map(lambda shard: _check_shard(*shard), shards)
        bar = tqdm(checked, total=len(shards), desc="checking targets", unit="file")
        return [problem for problem in bar if problem is not None]


def _check_shard(path: Path, shape: tuple[int, ...], expected: str | None) -> str | None:
    try:
        open_shard(path, shape)
    except DataError as error:
        return str(error)
    if expected is None:
        return f"{path}: has no checksum; distil again to record it"
    if checksum(path) != expected:
        return f"{path}: is damaged, its checksum differs; remove it and distil again"
    return None


def _name(teacher: str, self_ensemble: bool) -> str:
    return f"{teacher}{_ENSEMBLE}" if self_ensemble else teacher


def _missing(path: Path, ckpt: Path | str) -> str | None:
    shards = shard_shapes(path)
    there = sum(shard.exists() for shard in shards)
    if there == len(shards):
        return None
    option = " --self-ensemble" if path.name.endswith(_ENSEMBLE) else ""
    return (
        f"{path}: {there} of the {len(shards)} files of the teacher's outputs exist; this command "
        "computes the others:\n"
        f"  dvmsr data distill --ckpt {ckpt} --data {path.parents[1]}{option}"
    )


def distill(
    ckpt: Path,
    folder: Path,
    *,
    self_ensemble: bool,
    batch_size: int,
    ray: cluster.Where | None = None,
) -> Path:
    """Computes a teacher's outputs, 8-bit, for the training sub-images in a folder of records.

    They are computed in batches of `batch_size`, rounded up so that they divide evenly among the
    devices; or by the workers of a cluster at `ray`, whose machines must see the same files, with a
    device for each. Files that an interrupted run has finished are kept.

    Raises:
        UserError: the teacher or the records cannot be used, or their scales differ.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}, expected at least 1")
    if ray is not None:
        jax.config.update("jax_platforms", "cpu")  # the workers have the GPUs
    weights = load_weights(ckpt)
    scale = Preparation.read(folder).scale
    if weights.config.scale != scale:
        raise DataError(
            f"{ckpt} is a teacher for x{weights.config.scale}, {folder} was prepared for x{scale}"
        )
    count = len(open_records(folder).train)
    path = folder / "targets" / _name(weights.identity(), self_ensemble)
    path.mkdir(parents=True, exist_ok=True)
    shards = {
        shard: range(i * PER_SHARD, min((i + 1) * PER_SHARD, count))
        for i, shard in enumerate(shard_shapes(path))
    }
    there = {shard.name: shard for shard in shards if shard.exists()}
    known = Info.read(path).sha256
    # A run may have stopped before it wrote the checksum.
    sha256 = {name: known.get(name) or checksum(shard) for name, shard in there.items()}
    info = Info(str(ckpt.absolute()), sha256)
    info.write(path)
    missing = [(shard, indices) for shard, indices in shards.items() if shard.name not in there]
    prepare = functools.partial(_Writer, weights, folder, self_ensemble, batch_size)
    done = count - sum(len(indices) for _, indices in missing)
    with tqdm(total=count, initial=done, desc="distilling", unit="sub-image") as bar:
        if ray is None:
            write = prepare(advance=bar.update)
            written = ((task, write(task)) for task in missing)
        else:
            written = _on_cluster(missing, prepare, path, bar, ray)
        with contextlib.closing(written):
            for (shard, _), digest in written:
                if not appears(shard):
                    raise DataError(f"{shard}: has disappeared; run the same command again")
                info.sha256[shard.name] = digest
                info.write(path)
    return path


_Task = tuple[Path, range]
"""A file of targets, and the indices of its records."""


def _on_cluster(
    tasks: Sequence[_Task],
    prepare: Callable[..., "_Writer"],
    folder: Path,
    bar: tqdm,
    ray: cluster.Where,
) -> Generator[tuple[_Task, str], None, None]:
    """Yields each task with the checksum of its file."""

    start = functools.partial(_start_worker, prepare)
    batches = [[task] for task in tasks]
    answers = cluster.spread(ray, start, batches, folder=folder)
    for task, digest in cluster.complete(answers, lambda task: task[0]):
        bar.update(len(task[1]))
        yield task, digest


def _start_worker(prepare: Callable[..., "_Writer"], stopped: cluster.Stopped) -> "_Writer":
    def advance(_: int) -> None:
        if stopped():
            raise KeyboardInterrupt

    keep_compiled_programs()
    return prepare(advance=advance)


class _Writer:
    """Writes files of targets."""

    def __init__(
        self,
        weights: Weights,
        folder: Path,
        self_ensemble: bool,
        batch_size: int,
        *,
        advance: Callable[[int], object],
    ):
        """`advance` is called with the number of targets that have been added."""
        devices = jax.device_count()
        self._batch_size = math.ceil(batch_size / devices) * devices
        self._teach = _make_teacher(weights, self_ensemble, self._batch_size)
        self._records = open_records(folder).train
        self._advance = advance

    def __call__(self, task: _Task, memory: float = math.inf) -> str:
        """Writes a file, and returns its checksum."""
        path, indices = task
        size = self._batch_size
        batches = [indices[j : j + size] for j in range(0, len(indices), size)]
        dataset = grain.MapDataset.source(batches).map(self._read).to_iter_dataset(_READ_AHEAD)
        outputs = []
        for output in self._teach(dataset):
            outputs.append(output)
            self._advance(len(output))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(outputs))
        return checksum(path)

    def _read(self, indices: range) -> np.ndarray:
        return np.stack([self._records[i]["lr"] for i in indices])


def _make_teacher(
    weights: Weights, self_ensemble: bool, batch_size: int
) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
    """Returns a function from batches of at most `batch_size` LR pictures to SR pictures, uint8."""
    mesh = parallel.make_mesh(batch_size)

    def forward(weights, lr):
        return upscale_pixels(weights.model(), lr, self_ensemble=self_ensemble)

    replicated, sharded = PartitionSpec(), PartitionSpec(parallel.AXIS)
    forward = jax.jit(
        jax.shard_map(
            forward,
            mesh=mesh,
            in_specs=(replicated, sharded),
            out_specs=sharded,
            check_vma=False,
        )
    )
    weights = parallel.replicate(weights, mesh)

    def start(lr):
        padded = np.pad(lr, ((0, batch_size - len(lr)), (0, 0), (0, 0), (0, 0)))
        return forward(weights, parallel.shard_batch(padded, mesh)), len(lr)

    def finish(output, count):
        return np.asarray(output)[:count]

    def teach(batches):
        under_way = None
        for lr in batches:
            following = start(lr)  # keeps the devices busy while the previous one is fetched
            if under_way is not None:
                yield finish(*under_way)
            under_way = following
        if under_way is not None:
            yield finish(*under_way)

    return teach

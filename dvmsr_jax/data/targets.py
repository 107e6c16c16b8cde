"""A teacher's outputs for the training sub-images, computed once and kept beside them."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, UInt8
from tqdm import tqdm

from dvmsr_jax import images, parallel
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.data.records import DataError, open_records, read_preparation
from dvmsr_jax.inference import average_over_symmetries
from dvmsr_jax.model import DVMSR, model_from_parameters, named_parameters
from dvmsr_jax.pretrained import load_model

# Targets in a file; how much work an interruption can lose.
PER_SHARD = 256
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class Targets(Sequence[UInt8[np.ndarray, "H W 3"]]):
    """The targets in a folder, in the order of the records, read from disk as they are used."""

    def __init__(self, folder: Path, count: int, side: int):
        self._count = count
        self._shards = []
        for i, path in enumerate(_shard_paths(folder, count)):
            expected = (min(PER_SHARD, count - i * PER_SHARD), side, side, 3)
            try:
                shard = np.load(path, mmap_mode="r")
            except (ValueError, OSError, EOFError) as error:
                raise DataError(
                    f"{path}: is damaged ({error}); remove it and distil again"
                ) from error
            if shard.shape != expected or shard.dtype != np.uint8:
                raise DataError(f"{path}: holds {shard.dtype} {shard.shape}, expected {expected}")
            self._shards.append(shard)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W 3"]:  # type: ignore[override]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._shards[index // PER_SHARD][index % PER_SHARD]


def teacher_id(config: ModelConfig, parameters: Mapping[str, Array | np.ndarray]) -> str:
    """A short name for a teacher, another one for other weights."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for name in sorted(parameters):
        digest.update(name.encode())
        digest.update(np.asarray(parameters[name], np.float32).tobytes())
    return digest.hexdigest()[:12]


def load_targets(folder: Path, teacher: str, *, self_ensemble: bool) -> Targets:
    """What `distill` left in a folder of records for the teacher of this `teacher_id`.

    Raises:
        DataError: not all of it is there; the message says how to make it.
    """
    records = open_records(folder).train
    path = targets_folder(folder, teacher, self_ensemble)
    shards = _shard_paths(path, len(records))
    there = sum(shard.exists() for shard in shards)
    if there < len(shards):
        option = " --self-ensemble" if self_ensemble else ""
        raise DataError(
            f"{path}: {there} of the {len(shards)} files of the teacher's outputs are there; make "
            f"them with\n  python -m dvmsr_jax.data distill --ckpt TEACHER --data {folder}{option}"
        )
    return Targets(path, len(records), len(records[0]["hr"]))


def targets_folder(folder: Path, teacher: str, self_ensemble: bool) -> Path:
    """Where a teacher's outputs lie."""
    return folder / "targets" / (f"{teacher}-ensemble" if self_ensemble else teacher)


def distill(ckpt: Path, folder: Path, *, self_ensemble: bool, batch_size: int) -> Path:
    """Computes a teacher's outputs, 8-bit, for the training sub-images in a folder of records.

    Sharded over all devices. What an interrupted run has finished is kept.

    Raises:
        UserError: teacher or records cannot be used, or do not fit each other.
    """
    model = load_model(ckpt)
    scale = read_preparation(folder)["scale"]
    if model.config.scale != scale:
        raise DataError(
            f"{ckpt} is a teacher for x{model.config.scale}, {folder} was prepared for x{scale}"
        )
    records = open_records(folder).train
    path = targets_folder(folder, teacher_id(model.config, named_parameters(model)), self_ensemble)
    path.mkdir(parents=True, exist_ok=True)
    upscale = _make_upscaler(model, self_ensemble, batch_size)

    def read(indices: range) -> np.ndarray:
        return np.stack([records[i]["lr"] for i in indices])

    with tqdm(total=len(records), desc="distilling", unit="sub-image") as bar:
        for i, shard in enumerate(_shard_paths(path, len(records))):
            indices = range(i * PER_SHARD, min((i + 1) * PER_SHARD, len(records)))
            if shard.exists():
                bar.update(len(indices))
                continue
            batches = [indices[j : j + batch_size] for j in range(0, len(indices), batch_size)]
            dataset = grain.MapDataset.source(batches).map(read).to_iter_dataset(_READ_AHEAD)
            outputs = []
            for output in upscale(dataset):
                outputs.append(output)
                bar.update(len(output))
            temporary = shard.with_name(f"{shard.name}.{os.getpid()}")
            try:
                with temporary.open("wb") as file:
                    np.save(file, np.concatenate(outputs))
                os.replace(temporary, shard)
            finally:
                temporary.unlink(missing_ok=True)
    return path


def _make_upscaler(
    model: DVMSR, self_ensemble: bool, batch_size: int
) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
    """A function from batches of at most `batch_size` LR pictures to their SR pictures, uint8."""
    mesh = parallel.make_mesh(batch_size)

    def forward(parameters, lr):
        teacher = model_from_parameters(model.config, parameters)
        lr = lr.astype(jnp.float32) / 255
        return average_over_symmetries(teacher, lr) if self_ensemble else teacher(lr)

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
    parameters = parallel.replicate(named_parameters(model), mesh)

    def start(lr):
        padded = np.pad(lr, ((0, batch_size - len(lr)), (0, 0), (0, 0), (0, 0)))
        return forward(parameters, parallel.shard_batch(padded, mesh)), len(lr)

    def finish(output, count):
        return images.to_uint8(np.asarray(output)[:count])

    def upscale(batches):
        under_way = None
        for lr in batches:
            following = start(lr)  # so that the devices have work while this one is fetched
            if under_way is not None:
                yield finish(*under_way)
            under_way = following
        if under_way is not None:
            yield finish(*under_way)

    return upscale


def _shard_paths(folder: Path, count: int) -> list[Path]:
    return [folder / f"{i:05}.npy" for i in range(-(-count // PER_SHARD))]

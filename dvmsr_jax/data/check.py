"""Checks of prepared records: intact files, and LR that matches its HR."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from dvmsr_jax import bicubic
from dvmsr_jax.data import records
from dvmsr_jax.files import checksum

# LR pixels at the border of a sub-image that depend on HR pixels outside of it.
_BORDER = 2
# Largest mean difference, in grey levels, between LR and downscaled HR. It is 0 for records as they
# were prepared; shifting a photograph by one LR pixel makes it several grey levels.
_MAX_DIFFERENCE = 0.25


def find_problems(folder: Path) -> list[str]:
    """Finds the problems of a folder of records, one line each.

    Compares files with their checksums, and records with the list of pictures: their number and
    order, and each LR with its HR downscaled by bicubic interpolation.

    Raises:
        DataError: it is not a folder of prepared records.
    """
    preparation = records.Preparation.read(folder)
    scale, shards = preparation.scale, preparation.shards
    problems = list(_check_counts(folder, preparation))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = pool.map(
            lambda name: list(_check_shard(folder / name, shards[name], scale)), shards
        )
        for found in tqdm(checked, total=len(shards), desc="checking", unit="file"):
            problems += found
    return problems


def _check_counts(folder: Path, preparation: records.Preparation) -> Iterator[str]:
    for split, count in records.read_counts(folder).items():
        listed = sum(shard.records for shard in preparation.of_split(split).values())
        if count != listed:
            yield f"{folder}: {count} {split} records in TFDS's metadata, {listed} were prepared"


def _check_shard(path: Path, shard: records.ShardInfo, scale: int) -> Iterator[str]:
    if not path.exists():
        yield f"{path}: is missing"
        return
    if checksum(path) != shard.sha256:
        yield f"{path}: is damaged, its checksum differs"
        return
    pictures = [p for p in shard.pictures for _ in range(p.records)]
    count = 0
    for count, record in enumerate(records.open_shard(path), start=1):
        if count > len(pictures):
            continue
        picture, name = pictures[count - 1], os.fsdecode(record["name"])
        if name != picture.name:
            yield f"{path}: record {count - 1} is of {name}, not of {picture.name}"
        seen = (picture.lr_height, picture.lr_width)
        difference = _difference(record["lr"], record["hr"], seen, scale)
        if difference > _MAX_DIFFERENCE:
            yield (
                f"{path}: record {count - 1}, of {name}: LR is not its downscaled HR, they "
                f"differ by {difference:.2f} grey levels on average"
            )
    if not count == len(pictures) == shard.records:
        yield f"{path}: holds {count} records, {shard.records} were written"


def _difference(
    lr: UInt8[np.ndarray, "h w 3"],
    hr: UInt8[np.ndarray, "H W 3"],
    picture_size: tuple[int, int],
    scale: int,
) -> float:
    """Mean difference between LR and downscaled HR in grey levels, away from borders."""
    inside = tuple(
        slice(_BORDER, min(size, whole) - _BORDER)
        for size, whole in zip(lr.shape, picture_size, strict=False)
    )
    made = bicubic.downscale(hr, scale)[inside].astype(np.int16)
    return float(np.abs(made - lr[inside]).mean()) if made.size else 0.0

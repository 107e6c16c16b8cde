"""Batches of aligned crops, cut by the host, or by the device from its copy of all records.

Either way, a batch follows a plan: for each crop, the record, the position, and one of the eight
combinations of flips and rotations.
"""

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8
from tqdm import tqdm

from dvmsr_jax.config import DataConfig

Plan = dict[str, Int32[np.ndarray, " b"]]
"""The crops of a batch: "index" of the record, "top" and "left" in LR pixels, and "symmetry" from 0
to 7: symmetry % 4 quarter turns, followed by a left-right flip if it is at least 4."""


def batches(
    records: Sequence[dict[str, Any]],
    config: DataConfig,
    *,
    scale: int,
    seed: int,
    start: int,
    stop: int,
    shard: tuple[int, int] = (0, 1),
    targets: Sequence[UInt8[np.ndarray, "H W 3"]] | None = None,
) -> Iterator[dict[str, UInt8[np.ndarray, "b _ _ 3"]]]:
    """Batches `start` to `stop - 1` of the endless shuffled sequence: {"lr", "hr"} crops.

    Every epoch visits each sub-image once, in a new order, and takes one random crop of it, flipped
    and rotated at random. With `targets`, pictures of HR's size, batches also contain their crops,
    as "target". `config.workers` threads read ahead.

    Process i of n passes `shard` = (i, n) and gets the i-th block of each batch's rows.
    """

    def load(plan: Plan) -> dict[str, np.ndarray]:
        names = ("lr", "hr") if targets is None else ("lr", "hr", "target")
        sides = {name: config.lr_crop * _factor(name, scale) for name in names}
        batch = {
            name: np.empty((len(plan["index"]), side, side, 3), np.uint8)
            for name, side in sides.items()
        }
        for row, (index, top, left, symmetry) in enumerate(
            zip(*(plan[name].tolist() for name in _FIELDS), strict=True)
        ):
            record = records[index]
            if targets is not None:
                record = record | {"target": targets[index]}
            for name, side in sides.items():
                y, x = (offset * _factor(name, scale) for offset in (top, left))
                square = np.rot90(record[name][y : y + side, x : x + side], symmetry % 4)
                square = square[:, ::-1] if symmetry >= 4 else square
                for colour in range(3):  # several times faster for rotated crops
                    batch[name][row, ..., colour] = square[..., colour]
        return batch

    dataset = _plans(records, config, seed, shard)[start:stop].map(load)
    options = grain.ReadOptions(num_threads=config.workers, prefetch_buffer_size=2 * config.workers)
    return iter(dataset.to_iter_dataset(options))


def plans(
    records: Sequence[dict[str, Any]],
    config: DataConfig,
    *,
    seed: int,
    start: int,
    stop: int,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Plan]:
    """The plans of the batches that `batches` yields for the same arguments, for `cut`."""
    dataset = _plans(records, config, seed, shard)[start:stop]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def load_cache(
    records: Sequence[dict[str, Any]],
    targets: Sequence[UInt8[np.ndarray, "H W 3"]] | None = None,
) -> dict[str, UInt8[np.ndarray, "n _ _ 3"]]:
    """All records as arrays: "lr", "hr" and, if there are targets, "target"."""

    def load(i: int) -> dict[str, np.ndarray]:
        record = {name: records[i][name] for name in ("lr", "hr")}
        return record if targets is None else record | {"target": targets[i]}

    n = len(records)
    cache = {name: np.empty((n, *x.shape), np.uint8) for name, x in load(0).items()}
    dataset = grain.MapDataset.range(n).map(load)
    for i, record in enumerate(tqdm(dataset.to_iter_dataset(), total=n, desc="loading records")):
        for name, x in record.items():
            cache[name][i] = x
    return cache


def cut(
    cache: Mapping[str, UInt8[Array, "n _ _ 3"]],
    plan: Mapping[str, Int32[Array, " b"]],
    lr_crop: int,
    scale: int,
) -> dict[str, UInt8[Array, "b _ _ 3"]]:
    """Cuts a plan's batch from the arrays of `load_cache`; traced as part of the step."""

    def crops(name: str, pictures: Array) -> Array:
        factor = _factor(name, scale)
        side = lr_crop * factor

        def crop(index, top, left):
            start = (index, top * factor, left * factor, 0)
            return jax.lax.dynamic_slice(pictures, start, (1, side, side, 3))[0]

        squares = jax.vmap(crop)(plan["index"], plan["top"], plan["left"])
        turns, flip = plan["symmetry"] % 4, plan["symmetry"] // 4

        def where(condition, changed, squares):
            return jnp.where(condition[:, None, None, None], changed, squares)

        squares = where(turns % 2 == 1, jnp.rot90(squares, axes=(1, 2)), squares)
        squares = where(turns >= 2, squares[:, ::-1, ::-1], squares)
        return where(flip == 1, squares[:, :, ::-1], squares)

    return {name: crops(name, pictures) for name, pictures in cache.items()}


_FIELDS = ("index", "top", "left", "symmetry")


def _plans(
    records: Sequence[dict[str, Any]], config: DataConfig, seed: int, shard: tuple[int, int]
) -> grain.MapDataset:
    n, b = len(records), config.batch_size
    height, width = records[0]["lr"].shape[:2]
    part, parts = shard
    rows = slice(b * part // parts, b * (part + 1) // parts)

    @functools.lru_cache(maxsize=4)  # threads may be in two epochs at once
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, _ORDER, epoch)).permutation(n)

    def plan(i: int) -> Plan:
        rng = np.random.default_rng((seed, _CROPS, i))
        position = range(i * b, (i + 1) * b)
        values = (
            np.array([order(p // n)[p % n] for p in position]),
            rng.integers(height - config.lr_crop + 1, size=b),
            rng.integers(width - config.lr_crop + 1, size=b),
            rng.integers(8, size=b),
        )
        # Each process draws the numbers of all rows, so that they do not depend on its shard.
        return {name: x[rows].astype(np.int32) for name, x in zip(_FIELDS, values, strict=True)}

    return grain.MapDataset.range(sys.maxsize).map(plan)


# Seeds of separate streams of random numbers, by purpose.
_ORDER, _CROPS = 0, 1


def _factor(name: str, scale: int) -> int:
    return 1 if name == "lr" else scale

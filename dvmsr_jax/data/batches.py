"""Batches of aligned crops, cut by the host, or by the device from its copy of all records.

Either way, a batch follows a plan: for each crop, the record, the position, and one of the eight
combinations of flips and rotations. Degraded and zoomed LR crops are always made by the host,
before flips and rotations.

Zooming, from DUKD (arXiv 2309.14162), makes further inputs for distillation, without an HR picture:
a part of HR taken as LR (zoomed in), or LR reduced once more (zoomed out).
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Int64, UInt8
from tqdm import tqdm

from dvmsr_jax import bicubic
from dvmsr_jax.config import DataConfig
from dvmsr_jax.data.degradations import degrade, degrade_crop

Plan = dict[str, Int32[np.ndarray, " b"] | Int64[np.ndarray, " b"]]
"""The crops of a batch: "index" of the record, "top" and "left" in LR pixels, and "symmetry" from 0
to 7: symmetry % 4 quarter turns, followed by a left-right flip if it is at least 4. With
degradation, also "key", the seed of each crop's. With zooming, also "zoom" (`_NONE`, `_IN` or
`_OUT`) and, in HR pixels, "zoom_top" and "zoom_left", the position of an LR crop zoomed in on."""

_NONE, _IN, _OUT = 0, 1, 2


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
) -> Iterator[dict[str, UInt8[np.ndarray, "b _ _ 3"] | Bool[np.ndarray, " b"]]]:
    """Batches `start` to `stop - 1` of the endless shuffled sequence: {"lr", "hr"} crops.

    Every epoch visits each sub-image once, in a new order, and takes one random crop of it, flipped
    and rotated at random. With `targets`, pictures of HR's size, batches also contain their crops,
    as "target". With zooming, "zoomed" marks the crops whose LR is not that of "hr".
    `config.workers` threads read and degrade ahead.

    Process i of n passes `shard` = (i, n) and gets the i-th block of each batch's rows.
    """

    names = ("lr", "hr") if targets is None else ("lr", "hr", "target")
    load = _loader(records, config, scale, names, targets)
    return _ahead(_plans(records, config, seed, shard)[start:stop].map(load), config)


def plans_with_lr(
    records: Sequence[dict[str, Any]],
    config: DataConfig,
    *,
    scale: int,
    seed: int,
    start: int,
    stop: int,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """The plans of the batches that `batches` yields, with "lr" and, with zooming, "zoomed"."""
    load = _loader(records, config, scale, ("lr",), None)

    def add_crops(plan: Plan) -> dict[str, np.ndarray]:
        return {name: plan[name] for name in _FIELDS} | load(plan)

    return _ahead(_plans(records, config, seed, shard)[start:stop].map(add_crops), config)


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


def validation_pictures(
    records: Sequence[dict[str, Any]], config: DataConfig, scale: int
) -> list[dict[str, Any]]:
    """The records, with LR degraded according to `config`, in the same way in every run."""
    found = [records[i] for i in range(len(records))]
    if config.degradation == "clean":
        return found
    return [
        record | {"lr": degrade(record["hr"], key, config.degradation, scale)}
        for key, record in enumerate(found)
    ]


def load_cache(
    records: Sequence[dict[str, Any]],
    config: DataConfig,
    targets: Sequence[UInt8[np.ndarray, "H W 3"]] | None = None,
) -> dict[str, UInt8[np.ndarray, "n _ _ 3"]]:
    """All records as arrays: "hr", "lr" if crops are cut from it, and the targets as "target"."""
    names = ("lr", "hr") if config.lr_is_stored else ("hr",)

    def load(i: int) -> dict[str, np.ndarray]:
        stored = records[i]
        record = {name: stored[name] for name in names}
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
) -> dict[str, UInt8[Array, "b _ _ 3"] | Bool[Array, " b"]]:
    """Cuts a plan's batch from the arrays of `load_cache`; traced as part of the step.

    "lr" and "zoomed" are kept if the plan already contains them.
    """

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

    made = {name: plan[name] for name in ("lr", "zoomed") if name in plan}
    return made | {name: crops(name, pictures) for name, pictures in cache.items()}


def _loader(
    records: Sequence[dict[str, Any]],
    config: DataConfig,
    scale: int,
    names: tuple[str, ...],
    targets: Sequence[UInt8[np.ndarray, "H W 3"]] | None,
) -> Callable[[Plan], dict[str, np.ndarray]]:
    """Returns a function that makes the crops `names` of a plan, and "zoomed"."""
    sides = {name: config.lr_crop * _factor(name, scale) for name in names}

    def square(name: str, record: dict[str, Any], crop: dict[str, int]) -> np.ndarray:
        side, factor = sides[name], _factor(name, scale)
        top, left = crop["top"], crop["left"]
        if name == "lr":
            if crop.get("zoom") == _IN:
                y, x = crop["zoom_top"], crop["zoom_left"]
                return record["hr"][y : y + side, x : x + side]
            if crop.get("zoom") == _OUT:
                return bicubic.resize(record["lr"], side, side)
            if config.degradation != "clean":
                key, preset = crop["key"], config.degradation
                return degrade_crop(record["hr"], top, left, side, key, preset, scale)
        y, x = top * factor, left * factor
        return record[name][y : y + side, x : x + side]

    def load(plan: Plan) -> dict[str, np.ndarray]:
        count = len(plan["index"])
        batch = {name: np.empty((count, s, s, 3), np.uint8) for name, s in sides.items()}
        for row in range(count):
            crop = {name: int(x[row]) for name, x in plan.items()}
            record = records[crop["index"]]
            if targets is not None:
                record = record | {"target": targets[crop["index"]]}
            for name, crops in batch.items():
                turned = np.rot90(square(name, record, crop), crop["symmetry"] % 4)
                turned = turned[:, ::-1] if crop["symmetry"] >= 4 else turned
                for colour in range(3):  # several times faster for rotated crops
                    crops[row, ..., colour] = turned[..., colour]
        return batch | ({"zoomed": plan["zoom"] != _NONE} if "zoom" in plan else {})

    return load


def _ahead(dataset: grain.MapDataset, config: DataConfig) -> Iterator[dict[str, np.ndarray]]:
    """The dataset's elements, loaded ahead by `config.workers` threads."""
    options = grain.ReadOptions(num_threads=config.workers, prefetch_buffer_size=2 * config.workers)
    return iter(dataset.to_iter_dataset(options))


_FIELDS = ("index", "top", "left", "symmetry")


def _plans(
    records: Sequence[dict[str, Any]], config: DataConfig, seed: int, shard: tuple[int, int]
) -> grain.MapDataset:
    n, b = len(records), config.batch_size
    first = records[0]  # all have its shape
    height, width = first["lr"].shape[:2]
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
        found: Plan = {
            name: x[rows].astype(np.int32) for name, x in zip(_FIELDS, values, strict=True)
        }
        if config.degradation != "clean":
            keys = np.random.default_rng((seed, _DEGRADATIONS, i)).integers(2**63, size=b)
            found["key"] = keys[rows]
        if config.zooms:
            rng = np.random.default_rng((seed, _ZOOMS, i))
            chance = rng.random(b)
            zoom = np.where(chance < config.zoom_in + config.zoom_out, _OUT, _NONE)
            zoom[chance < config.zoom_in] = _IN
            found["zoom"] = zoom[rows].astype(np.int32)
            for name, size in zip(("zoom_top", "zoom_left"), first["hr"].shape[:2], strict=True):
                offsets = rng.integers(size - config.lr_crop + 1, size=b)
                found[name] = offsets[rows].astype(np.int32)
        return found

    return grain.MapDataset.range(sys.maxsize).map(plan)


# Seeds of separate streams of random numbers, by purpose.
_ORDER, _CROPS, _DEGRADATIONS, _ZOOMS = 0, 1, 2, 3


def _factor(name: str, scale: int) -> int:
    return 1 if name == "lr" else scale

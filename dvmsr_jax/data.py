"""Training data: pictures -> records of aligned sub-images -> batches of aligned crops.

Pictures are decoded once, cut into equal sub-images with their LR by bicubic, and written as a
TFDS dataset of raw pixels in ArrayRecord files. Grain reads those at random: batch i is a function
of the seed and i alone, so a run that is continued sees what it would have seen.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from tqdm import tqdm

from dvmsr_jax import bicubic, images
from dvmsr_jax.config import DataConfig
from dvmsr_jax.errors import UserError

# Side of a stored HR sub-image, rounded down to a multiple of the scale. Large enough for the
# paper's 256x256 crops to move in, small enough to be read quickly for one crop.
SUB_IMAGE = 320
_NAME = "sr_sub_images"


class DataError(UserError):
    """There is nothing to train on; the message says what to pass."""


class Picture(NamedTuple):
    """A source picture: `load` gives (HR, LR or None)."""

    name: str
    load: Callable[[], tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "h w 3"] | None]]


class Records(NamedTuple):
    """Random-access sequences of {"hr", "lr", "name"}."""

    train: Sequence[dict[str, Any]]
    val: Sequence[dict[str, Any]]


def load_records(config: DataConfig, scale: int) -> Records:
    """The prepared sub-images, prepared now if they are not there yet.

    `config.val_images` pictures are kept apart, spread evenly over the sorted names (with DIV2K,
    taken from its validation split); of each the middle sub-image is a validation record.

    Raises:
        DataError: there are no pictures, or too few, or DIV2K cannot be had.
        images.ImageError: a picture cannot be read.
    """
    side = SUB_IMAGE // scale * scale
    if config.lr_crop * scale > side:
        raise DataError(
            f"data.lr_crop is {config.lr_crop}, at most {side // scale} fit the prepared sub-images"
        )
    if config.val_images < 1:
        raise DataError(f"data.val_images is {config.val_images}, expected at least 1")
    if config.hr_dirs:
        fingerprint, train, val = _from_folders(config)
    else:
        fingerprint, train, val = _from_div2k(config, scale)
    key = hashlib.sha256(f"{fingerprint} x{scale} {side} {config.val_images}".encode())
    folder = config.data_dir.expanduser() / _NAME / key.hexdigest()[:16]
    if not folder.exists():
        _prepare(folder, {"train": train, "val": val}, side, scale)
    builder = tfds.builder_from_directory(folder)
    return Records(builder.as_data_source("train"), builder.as_data_source("val"))


def batches(
    records: Sequence[dict[str, Any]],
    config: DataConfig,
    *,
    scale: int,
    seed: int,
    start: int,
    stop: int,
) -> Iterator[dict[str, UInt8[np.ndarray, "b _ _ 3"]]]:
    """Batches `start` to `stop - 1` of the endless shuffled sequence: {"lr", "hr"} crops.

    Every epoch visits each sub-image once, in a new order, and takes one random crop of it, flipped
    and turned at random. `config.workers` threads read ahead.
    """

    def crop(record, rng):
        return random_crop(record["lr"], record["hr"], config.lr_crop, scale, rng)

    dataset = grain.MapDataset.source(records).seed(seed).shuffle().repeat().random_map(crop)
    dataset = dataset.batch(config.batch_size)[start:stop]
    options = grain.ReadOptions(num_threads=config.workers, prefetch_buffer_size=2 * config.workers)
    return iter(dataset.to_iter_dataset(options))


def random_crop(
    lr: UInt8[np.ndarray, "h w 3"],
    hr: UInt8[np.ndarray, "H W 3"],
    lr_crop: int,
    scale: int,
    rng: np.random.Generator,
) -> dict[str, UInt8[np.ndarray, "_ _ 3"]]:
    """The same random square of both, under the same one of the eight flips and turns."""
    top, left = (int(rng.integers(size - lr_crop + 1)) for size in lr.shape[:2])
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))

    def cut(image, factor):
        y, x, side = top * factor, left * factor, lr_crop * factor
        image = np.rot90(image[y : y + side, x : x + side], turns)
        return np.ascontiguousarray(image[:, ::-1] if flip else image)

    return {"lr": cut(lr, 1), "hr": cut(hr, scale)}


def sub_images(
    lr: UInt8[np.ndarray, "h w 3"], hr: UInt8[np.ndarray, "H W 3"], side: int, scale: int
) -> Iterator[tuple[UInt8[np.ndarray, "_ _ 3"], UInt8[np.ndarray, "_ _ 3"]]]:
    """(LR, HR) squares of `side` HR pixels that cover the picture, overlapping as needed.

    A picture smaller than that is continued by its mirror image.
    """
    lr_side = side // scale
    pad = [(0, max(lr_side - size, 0)) for size in lr.shape[:2]]
    lr = np.pad(lr, (*pad, (0, 0)), "symmetric")
    hr = np.pad(hr, (*((0, after * scale) for _, after in pad), (0, 0)), "symmetric")

    def offsets(size):
        count = math.ceil(size / lr_side)
        return np.linspace(0, size - lr_side, count).round().astype(int)

    for y in offsets(lr.shape[0]):
        for x in offsets(lr.shape[1]):
            yield (
                lr[y : y + lr_side, x : x + lr_side],
                hr[y * scale : y * scale + side, x * scale : x * scale + side],
            )


def _from_folders(config: DataConfig) -> tuple[str, list[Picture], list[Picture]]:
    paths = [path for folder in config.hr_dirs for path in images.find_images(folder.expanduser())]
    if len(paths) <= config.val_images:
        raise DataError(
            f"data.hr_dirs hold {len(paths)} pictures, of which data.val_images = "
            f"{config.val_images} are kept apart; add pictures or lower data.val_images"
        )
    held_out = {paths[i] for i in np.linspace(0, len(paths) - 1, config.val_images).astype(int)}
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    def picture(path):
        return Picture(str(path), lambda: (images.read_rgb(path), None))

    train = [picture(path) for path in paths if path not in held_out]
    return repr(stats), train, [picture(path) for path in sorted(held_out)]


def _from_div2k(config: DataConfig, scale: int) -> tuple[str, list[Picture], list[Picture]]:
    try:
        builder = tfds.builder(
            f"div2k/bicubic_x{scale}",
            data_dir=config.data_dir.expanduser(),
            file_format="array_record",
        )
        builder.download_and_prepare()
    except Exception as error:  # a failed download can surface as almost anything
        raise DataError(
            f"DIV2K, the default training data, could not be prepared ({type(error).__name__}: "
            f"{error}); pass folders of high-resolution pictures with --data.hr-dirs DIR [DIR ...]"
        ) from error

    def pictures(split):
        source = builder.as_data_source(split)

        def picture(i):
            return Picture(f"{split}{i}", lambda: (source[i]["hr"], source[i]["lr"]))

        return [picture(i) for i in range(len(source))]

    val = pictures("validation")
    return f"div2k {builder.version}", pictures("train"), val[: config.val_images]


def _prepare(folder: Path, splits: dict[str, list[Picture]], side: int, scale: int) -> None:
    """Writes the sub-images as a TFDS dataset; the folder appears when it is complete.

    TFDS's `GeneratorBasedBuilder` would shuffle the records, for which it needs TensorFlow as soon
    as they exceed a gigabyte; Grain shuffles at reading, so they are written as they come.
    """

    def square(side):
        # Raw bytes: decoding a PNG would take several times longer than all the rest.
        return tfds.features.Tensor(
            shape=(side, side, 3), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )

    features = {"lr": square(side // scale), "hr": square(side), "name": tfds.features.Text()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".incomplete-") as unfinished:
        identity = tfds.core.DatasetIdentity(
            name=_NAME, version="1.0.0", data_dir=unfinished, module_name=__name__
        )
        writer = tfds.core.SequentialWriter(
            tfds.core.DatasetInfo(
                builder=identity,
                description="Aligned low- and high-resolution sub-images.",
                features=tfds.features.FeaturesDict(features),
            ),
            max_examples_per_shard=1000,
            file_format="array_record",
        )
        writer.initialize_splits(list(splits))
        pictures = [(split, picture) for split in splits for picture in splits[split]]
        for split, picture in tqdm(pictures, desc="preparing pictures", unit="picture"):
            hr, lr = picture.load()
            hr = bicubic.modcrop(hr, scale)
            if lr is None:
                lr = bicubic.downscale(hr, scale)
            squares = list(sub_images(lr, hr, side, scale))
            if split == "val":
                squares = [squares[len(squares) // 2]]
            records = [
                {"lr": lr_square, "hr": hr_square, "name": picture.name}
                for lr_square, hr_square in squares
            ]
            writer.add_examples({split: records})
        writer.close_all()
        os.rename(unfinished, folder)
        Path(unfinished).mkdir()  # for TemporaryDirectory to remove

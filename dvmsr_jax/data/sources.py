"""Where training pictures come from: folders, or DIV2K by TFDS."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from dvmsr_jax import images
from dvmsr_jax.config import DataConfig
from dvmsr_jax.data.records import DataError

# Bytes from the middle of a file that tell it from others of the same name and size.
_SAMPLE = 4096


class Source(NamedTuple):
    """A source picture: `load` gives (HR, LR or None)."""

    name: str
    fingerprint: str
    """Another one for another picture, the same wherever and whenever its file was copied."""
    load: Callable[[], tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "h w 3"] | None]]


def find_sources(config: DataConfig, scale: int) -> dict[str, list[Source]]:
    """The pictures to train on ("train") and those kept apart ("val").

    `config.val_images` pictures are kept apart, spread evenly over the sorted names (with DIV2K,
    taken from its validation split).

    Raises:
        DataError: there are too few pictures, or DIV2K cannot be had.
        images.ImageError: a folder is missing or holds no pictures.
    """
    if config.val_images < 1:
        raise DataError(f"data.val_images is {config.val_images}, expected at least 1")
    return _in_folders(config) if config.hr_dirs else _div2k(config, scale)


def _in_folders(config: DataConfig) -> dict[str, list[Source]]:
    pictures = []
    for folder in (folder.expanduser() for folder in config.hr_dirs):
        found = images.find_images(folder, on_error=lambda _, error: print(f"left out: {error}"))
        pictures += [_source(path, folder) for path in found]
    if len(pictures) <= config.val_images:
        raise DataError(
            f"data.hr_dirs hold {len(pictures)} pictures, of which data.val_images = "
            f"{config.val_images} are kept apart; add pictures or lower data.val_images"
        )
    held_out = set(np.linspace(0, len(pictures) - 1, config.val_images).astype(int))
    return {
        "train": [picture for i, picture in enumerate(pictures) if i not in held_out],
        "val": [pictures[i] for i in sorted(held_out)],
    }


def _source(path: Path, folder: Path) -> Source:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - _SAMPLE, 0) // 2)
        sample = hashlib.sha256(file.read(_SAMPLE)).hexdigest()[:16]
    fingerprint = f"{path.relative_to(folder)} {size} {sample}"
    return Source(str(path), fingerprint, lambda: (images.read_rgb(path), None))


def _div2k(config: DataConfig, scale: int) -> dict[str, list[Source]]:
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
            def load():
                record = source[i]
                return record["hr"], record["lr"]

            name = f"{split}{i}"
            return Source(name, f"div2k {builder.version} {name}", load)

        return [picture(i) for i in range(len(source))]

    return {"train": pictures("train"), "val": pictures("validation")[: config.val_images]}

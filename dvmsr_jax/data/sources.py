"""The sources of training pictures: folders, or datasets to download."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dvmsr_jax import images
from dvmsr_jax.config import DataConfig
from dvmsr_jax.data import download
from dvmsr_jax.data.records import DataError
from dvmsr_jax.files import checksum

PICTURES = "pictures"
"""Folder under `DataConfig.data_dir` that datasets are downloaded to."""

# Number of bytes in the middle of a file that tell it from others of the same name and size.
_SAMPLE = 4096


class Source(NamedTuple):
    """A high-resolution picture."""

    name: str
    fingerprint: str
    """Differs between pictures, but not between copies of a file with the same relative path."""
    load: Callable[[], UInt8[np.ndarray, "H W 3"]]
    """Reads it. Raises images.ImageError."""


def find_sources(config: DataConfig) -> dict[str, list[Source]]:
    """The pictures to train on ("train") and those held out ("val").

    In `config.hr_dirs`, duplicates are dropped, and `config.val_images` pictures are held out,
    spread evenly over the sorted names. Without `config.hr_dirs`, `config.dataset` is downloaded if
    necessary, and the first `config.val_images` pictures of DIV2K's validation set are held out.

    Raises:
        DataError: there are too few pictures, or the dataset cannot be downloaded.
        images.ImageError: a folder is missing or holds no pictures.
    """
    if config.hr_dirs and config.dataset != DataConfig.dataset:
        raise DataError("data.dataset and data.hr_dirs exclude each other; pass one of them")
    return _in_folders(config) if config.hr_dirs else _downloaded(config)


def _in_folders(config: DataConfig) -> dict[str, list[Source]]:
    pictures = [file.source() for file in _distinct(_list_files(config.hr_dirs))]
    if len(pictures) <= config.val_images:
        raise DataError(
            f"data.hr_dirs contain {len(pictures)} pictures, of which data.val_images = "
            f"{config.val_images} are held out; add pictures or lower data.val_images"
        )
    held_out = set(np.linspace(0, len(pictures) - 1, config.val_images).astype(int))
    return {
        "train": [picture for i, picture in enumerate(pictures) if i not in held_out],
        "val": [pictures[i] for i in sorted(held_out)],
    }


class _File(NamedTuple):
    """A picture, and the folder in which it was found."""

    path: Path
    folder: Path
    size: int
    sample: str

    def source(self) -> Source:
        """The source; its fingerprint does not depend on the location of the folder."""
        fingerprint = f"{self.path.relative_to(self.folder)} {self.size} {self.sample}"
        return Source(str(self.path), fingerprint, lambda: images.read_rgb(self.path))


def _list_files(folders: Iterable[Path]) -> list[_File]:
    files = []
    for folder in (folder.expanduser() for folder in folders):
        found = images.find_images(folder, on_error=lambda _, error: print(f"left out: {error}"))
        for path in found:
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(size - _SAMPLE, 0) // 2)
                sample = hashlib.sha256(file.read(_SAMPLE)).hexdigest()[:16]
            files.append(_File(path, folder, size, sample))
    return files


def _distinct(files: list[_File]) -> list[_File]:
    """Drops duplicates, by path and by content, except for the first of each."""
    by_path: dict[str, _File] = {}
    for file in files:
        by_path.setdefault(os.path.realpath(file.path), file)
    alike = Counter((file.size, file.sample) for file in by_path.values())
    by_content: dict[object, _File] = {}
    for file in by_path.values():
        key = (file.size, file.sample)
        # Whole files are read only if size and sample agree, which is rare except for copies.
        by_content.setdefault(key if alike[key] == 1 else checksum(file.path), file)
    if len(by_content) < len(files):
        dropped = len(files) - len(by_content)
        print(f"dropped {dropped} of {len(files)} pictures: listed twice, or copies of others")
    return list(by_content.values())


def _downloaded(config: DataConfig) -> dict[str, list[Source]]:
    parent = config.data_dir.expanduser() / PICTURES
    files = {
        split: _list_files(download.fetch(archive, parent) for archive in archives)
        for split, archives in download.DATASETS[config.dataset].items()
    }
    if len(files["val"]) < config.val_images:
        raise DataError(
            f"data.val_images is {config.val_images}, but {config.dataset} has only "
            f"{len(files['val'])} pictures for validation"
        )
    val = files["val"][: config.val_images]
    # Validation pictures come first, so that a copy is dropped from those to train on.
    train = [file for file in _distinct(val + files["train"]) if file not in val]
    return {"train": [file.source() for file in train], "val": [file.source() for file in val]}

"""DIV2K and Flickr2K: their high-resolution pictures, downloaded and unpacked once.

The low-resolution archives are not needed: `bicubic` computes the same pictures.
"""

import contextlib
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from dvmsr_jax.data.records import DataError
from dvmsr_jax.downloads import DamagedError, Remote, check_space, obtaining
from dvmsr_jax.files import replacing, turn


class Archive(NamedTuple):
    """An archive of pictures."""

    remote: Remote
    folder: str
    """Folder inside the archive that holds the pictures; nothing else is unpacked."""
    pictures: int
    """Number of PNG files in it."""


# Sizes and checksums are those that TFDS publishes for its `div2k`.
_DIV2K_TRAIN = Archive(
    Remote(
        "https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_train_HR.zip",
        3530603713,
        "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335",
    ),
    "DIV2K_train_HR",
    800,
)
_DIV2K_VALID = Archive(
    Remote(
        "https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip",
        448993893,
        "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc",
    ),
    "DIV2K_valid_HR",
    100,
)
# Neither a size nor a checksum is published.
_FLICKR2K = Archive(
    Remote("https://cv.snu.ac.kr/research/EDSR/Flickr2K.tar"), "Flickr2K/Flickr2K_HR", 2650
)

DATASETS: dict[str, dict[str, tuple[Archive, ...]]] = {
    "div2k": {"train": (_DIV2K_TRAIN,), "val": (_DIV2K_VALID,)},
    "df2k": {"train": (_DIV2K_TRAIN, _FLICKR2K), "val": (_DIV2K_VALID,)},
}
"""The archives of each split, by the names that `DataConfig.dataset` takes."""


def fetch(archive: Archive, folder: Path) -> Path:
    """Returns the folder of an archive's pictures; downloads and unpacks it unless it exists.

    The archive is downloaded to NAME.partial, and removed once it is unpacked. If `folder` contains
    NAME itself, that file is unpacked instead and kept. Interruptions lose neither downloaded nor
    unpacked data. While one process works in `folder`, the others wait.

    Raises:
        DataError: the folder of the pictures is incomplete, or cannot be written.
        DownloadError: the archive cannot be downloaded, is damaged or too large for the disk.
        StoppedError: Ctrl-C interrupted it.
    """
    name = archive.remote.name
    pictures = folder / PurePosixPath(archive.folder).name
    try:
        if not pictures.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with turn(folder / ".lock"):
                if not pictures.exists():  # it may have appeared during the wait
                    # PNG files are compressed, so unpacking takes as much space again.
                    with obtaining(archive.remote, folder, unpacked=1) as path:
                        _unpack(archive, path, pictures)
        found = sum(path.suffix.lower() == ".png" for path in pictures.iterdir())
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror or error}; once this is fixed, the same "
            f"command resumes the download of {name}"
        ) from error
    if found != archive.pictures:
        raise DataError(
            f"{pictures}: holds {found} pictures, expected {archive.pictures}; remove the folder "
            f"to have {name} downloaded and unpacked again"
        )
    return pictures


def _unpack(archive: Archive, path: Path, pictures: Path) -> None:
    """Creates the folder of pictures, which appears only when it is complete.

    Only the content and the last part of the name of an archive's members are used, and links are
    ignored, so that nothing can be written elsewhere. Raises DamagedError.
    """
    incomplete = pictures.with_name(f".incomplete-{pictures.name}")
    try:
        with _open(path, archive.remote.name) as members:
            found = {
                name.name: (size, read)
                for name, size, read in members
                if name.parent == PurePosixPath(archive.folder)
                and name.suffix.lower() == ".png"
                and not name.name.startswith(".")
            }
            if len(found) != archive.pictures:
                raise DamagedError(
                    f"holds {len(found)} pictures in {archive.folder}, expected {archive.pictures}"
                )
            missing = {
                name: content
                for name, content in found.items()
                if not (incomplete / name).exists()
                or (incomplete / name).stat().st_size != content[0]
            }
            needed = sum(size for size, _ in missing.values())
            check_space(archive.remote.name, pictures.parent, needed)
            done = len(found) - len(missing)
            with tqdm(total=len(found), initial=done, desc=pictures.name, unit="picture") as bar:
                for name, (_, read) in missing.items():
                    with (
                        replacing(incomplete / name) as temporary,
                        temporary.open("wb") as file,
                        read() as content,
                    ):
                        shutil.copyfileobj(content, file)
                    bar.update()
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise DamagedError(f"cannot be unpacked ({error})") from error
    os.rename(incomplete, pictures)


_Member = tuple[PurePosixPath, int, Callable[[], Any]]


@contextlib.contextmanager
def _open(path: Path, name: str) -> Iterator[list[_Member]]:
    """The regular files in an archive: path, bytes, and a function that opens it for reading."""
    if name.endswith(".zip"):
        with zipfile.ZipFile(path) as file:
            yield [
                (PurePosixPath(info.filename), info.file_size, partial(file.open, info))
                for info in file.infolist()
                if not info.is_dir()
            ]
    else:
        with tarfile.open(path, "r:") as tar:
            yield [
                (PurePosixPath(info.name), info.size, partial(tar.extractfile, info))
                for info in tar
                if info.isreg()
            ]

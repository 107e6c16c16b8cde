"""DIV2K and Flickr2K: their high-resolution pictures, downloaded and unpacked once.

The low-resolution archives are not needed: `bicubic` computes the same pictures.
"""

import contextlib
import os
import re
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import requests
from tqdm import tqdm

from dvmsr_jax.data.records import DataError
from dvmsr_jax.errors import StoppedError
from dvmsr_jax.files import checksum, lock, replacing

MIRROR = "DVMSR_MIRROR"
"""Environment variable: URL of a folder with copies of the archives, to download from instead."""
CHECKSUMS = "SHA256SUMS"
"""File for checksums of downloads without a published one, in the format of `sha256sum`."""

# Seconds before each new attempt; they start over whenever something was received.
_WAITS: tuple[float, ...] = (1, 3, 10)
# Seconds to wait for a connection, and for the next bytes.
_TIMEOUT = (10, 60)
# Bytes received at a time. If a connection breaks, less than this is lost.
_BLOCK = 2**16


class Archive(NamedTuple):
    """An archive on a server."""

    url: str
    folder: str
    """Folder inside the archive that holds the pictures; nothing else is unpacked."""
    pictures: int
    """Number of PNG files in it."""
    size: int | None = None
    """Bytes of the archive. None: not published."""
    sha256: str | None = None
    """In hex digits. None: not published."""

    @property
    def name(self) -> str:
        """File name of the archive."""
        return PurePosixPath(self.url).name


# Sizes and checksums are those that TFDS publishes for its `div2k`.
_DIV2K_TRAIN = Archive(
    "https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_train_HR.zip",
    "DIV2K_train_HR",
    800,
    3530603713,
    "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335",
)
_DIV2K_VALID = Archive(
    "https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip",
    "DIV2K_valid_HR",
    100,
    448993893,
    "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc",
)
# Neither a size nor a checksum is published.
_FLICKR2K = Archive("https://cv.snu.ac.kr/research/EDSR/Flickr2K.tar", "Flickr2K/Flickr2K_HR", 2650)

DATASETS: dict[str, dict[str, tuple[Archive, ...]]] = {
    "div2k": {"train": (_DIV2K_TRAIN,), "val": (_DIV2K_VALID,)},
    "df2k": {"train": (_DIV2K_TRAIN, _FLICKR2K), "val": (_DIV2K_VALID,)},
}
"""The archives of each split, by the names that `DataConfig.dataset` takes."""


class _DamagedError(Exception):
    """An archive is not the expected one. The message says why."""


def fetch(archive: Archive, folder: Path) -> Path:
    """Returns the folder of an archive's pictures; downloads and unpacks it unless it exists.

    The archive is downloaded to NAME.partial, and removed once it is unpacked. If `folder` contains
    NAME itself, that file is unpacked instead and kept. Interruptions lose neither downloaded nor
    unpacked data. While one process works in `folder`, the others wait.

    Raises:
        DataError: the archive cannot be downloaded, is damaged or too large for the disk, or the
            folder of its pictures is incomplete.
        StoppedError: Ctrl-C interrupted it.
    """
    pictures = folder / PurePosixPath(archive.folder).name
    try:
        if not pictures.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _turn(folder):
                if not pictures.exists():  # it may have appeared during the wait
                    _make(archive, folder, pictures)
        found = sum(path.suffix.lower() == ".png" for path in pictures.iterdir())
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror or error}; once this is fixed, the same "
            f"command resumes the download of {archive.name}"
        ) from error
    if found != archive.pictures:
        raise DataError(
            f"{pictures}: holds {found} pictures, expected {archive.pictures}; remove the folder "
            f"to have {archive.name} downloaded and unpacked again"
        )
    return pictures


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        if not lock(file, wait=False):
            print(f"waiting for the process that downloads to {folder}", flush=True)
            lock(file, wait=True)
        yield


def _make(archive: Archive, folder: Path, pictures: Path) -> None:
    own, download = folder / archive.name, folder / f"{archive.name}.partial"
    path = own if own.exists() else download
    try:
        if path == download:
            _download(archive, download)
        _verify(archive, path)
        _unpack(archive, path, pictures)
    except _DamagedError as error:
        remedy = "replace or remove the file"
        if path == download:
            download.unlink()
            remedy = f"the download was removed; {_by_hand(archive, folder)}"
        raise DataError(f"{path}: {error}; {remedy}") from error
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped; downloaded and unpacked files are kept; {_by_hand(archive, folder)}"
        ) from None
    if path == download:
        download.unlink()


def _by_hand(archive: Archive, folder: Path) -> str:
    return (
        f"run the same command again, download {_address(archive)} by hand to "
        f"{folder / archive.name}, or set {MIRROR} to the URL of a folder that has it"
    )


def _address(archive: Archive) -> str:
    mirror = os.environ.get(MIRROR)
    return f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url


def _download(archive: Archive, path: Path) -> None:
    """Downloads the missing part. Raises DataError if the server or connection keeps failing."""
    failures = 0
    with tqdm(desc=archive.name, unit="B", unit_scale=True) as bar:
        while True:
            before = _size(path)
            try:
                return _receive(archive, path, bar)
            except requests.RequestException as error:
                if _size(path) > before:
                    failures = 0
                if not _is_temporary(error) or failures == len(_WAITS):
                    kept = f"; {_size(path):,} bytes are kept in {path}" if _size(path) else ""
                    raise DataError(
                        f"{_address(archive)}: {_reason(error)}{kept}; "
                        f"{_by_hand(archive, path.parent)}"
                    ) from error
                bar.write(f"{archive.name}: {_reason(error)}; next attempt in {_WAITS[failures]} s")
            time.sleep(_WAITS[failures])
            failures += 1


def _receive(archive: Archive, path: Path, bar: tqdm) -> None:
    """Appends the missing part, in one request.

    If the server ignores the requested range and sends the whole file, the part that exists is
    skipped.

    Raises:
        requests.RequestException: the request failed, or the connection broke.
        _DamagedError: the server's file is another one.
        DataError: there is too little disk space.
    """
    have = _size(path)
    if archive.size is not None and have >= archive.size:
        return  # wrong size or content is detected later
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(
        _address(archive), headers=headers, stream=True, timeout=_TIMEOUT
    ) as response:
        ranges = re.match(
            r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)$", response.headers.get("Content-Range", "")
        )
        end = 0 if ranges is None or ranges[2] == "*" else int(ranges[2])
        if response.status_code == requests.codes.requested_range_not_satisfiable and end:
            if have > end:
                raise _DamagedError(f"has {have:,} bytes, the server's file only {end:,}")
            return  # the file was complete
        response.raise_for_status()
        if response.status_code == requests.codes.partial_content:
            if ranges is None or ranges[1] != str(have):
                raise requests.RequestException("sent other bytes than requested")
            start, total = have, end
        else:
            start, total = 0, int(response.headers.get("Content-Length", 0))
        if archive.size is not None and total not in (0, archive.size):
            raise requests.RequestException(f"has {total:,} bytes, expected {archive.size:,}")
        # PNG files are compressed, so unpacking takes about as much space again as the archive.
        _check_space(archive, path.parent, max(total - have, 0) + total)
        bar.total, bar.n = total or None, have
        bar.refresh()
        skip = have - start
        with path.open("ab") as file:
            for block in response.iter_content(_BLOCK):
                kept = block[skip:]
                skip -= len(block) - len(kept)
                file.write(kept)
                bar.update(len(kept))
    if archive.size is not None and _size(path) < archive.size:
        # Without Content-Length, a response that ends early looks complete.
        raise requests.exceptions.ChunkedEncodingError


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_temporary(error: requests.RequestException) -> bool:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        return status >= 500 or status == requests.codes.too_many_requests
    return isinstance(
        error,
        requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError,
    )


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP {error.response.status_code} ({error.response.reason})"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was lost"
    if type(error) is requests.ConnectionError:
        return "no connection"
    return str(error).partition("\n")[0]


def _check_space(archive: Archive, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: {archive.name} needs {needed / 1e9:.1f} GB here, {free / 1e9:.1f} GB are "
            "free; make room, or choose a folder on another disk as data.data_dir"
        )


def _verify(archive: Archive, path: Path) -> None:
    """Raises _DamagedError if the size or the checksum differs from the published one."""
    size = _size(path)
    if archive.size is not None and size != archive.size:
        raise _DamagedError(f"has {size:,} bytes, expected {archive.size:,}")
    print(f"computing the checksum of {path}", flush=True)
    found = checksum(path)
    if archive.sha256 is None:
        line = f"{found}  {archive.name}\n"
        print(
            f"{archive.name}: no checksum is published; its SHA-256 is {found}, "
            f"recorded in {path.parent / CHECKSUMS}"
        )
        with (path.parent / CHECKSUMS).open("a+") as file:
            file.seek(0)
            if line not in file.readlines():
                file.write(line)
    elif found != archive.sha256:
        raise _DamagedError(f"its SHA-256 is {found}, expected {archive.sha256}")


def _unpack(archive: Archive, path: Path, pictures: Path) -> None:
    """Creates the folder of pictures, which appears only when it is complete.

    Only the content and the last part of the name of an archive's members are used, and links are
    ignored, so that nothing can be written elsewhere. Raises _DamagedError.
    """
    incomplete = pictures.with_name(f".incomplete-{pictures.name}")
    try:
        with _open(path, archive.name) as members:
            found = {
                name.name: (size, read)
                for name, size, read in members
                if name.parent == PurePosixPath(archive.folder)
                and name.suffix.lower() == ".png"
                and not name.name.startswith(".")
            }
            if len(found) != archive.pictures:
                raise _DamagedError(
                    f"holds {len(found)} pictures in {archive.folder}, expected {archive.pictures}"
                )
            missing = {
                name: content
                for name, content in found.items()
                if _size(incomplete / name) != content[0]
            }
            _check_space(archive, pictures.parent, sum(size for size, _ in missing.values()))
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
        raise _DamagedError(f"cannot be unpacked ({error})") from error
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

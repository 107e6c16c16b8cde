"""Files from servers: downloads that resume, verified by size and checksum."""

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import requests
from tqdm import tqdm

from dvmsr_jax.errors import StoppedError, UserError
from dvmsr_jax.files import checksum

MIRROR = "DVMSR_MIRROR"
"""Environment variable: URL of a folder with copies of the files, to download from instead."""
CHECKSUMS = "SHA256SUMS"
"""File for checksums of downloads without a published one, in the format of `sha256sum`."""

# Seconds before each new attempt; they start over whenever something was received.
_WAITS: tuple[float, ...] = (1, 3, 10)
# Seconds to wait for a connection, and for the next bytes.
_TIMEOUT = (10, 60)
# Bytes received at a time. If a connection breaks, less than this is lost.
_BLOCK = 2**16


class DownloadError(UserError):
    """A file cannot be downloaded or is not the expected one; the message says what to do."""


class Remote(NamedTuple):
    """A file on a server."""

    url: str
    size: int | None = None
    """Bytes. None: not published."""
    sha256: str | None = None
    """In hex digits. None: not published."""

    @property
    def name(self) -> str:
        """The name of the file."""
        return PurePosixPath(self.url).name

    @property
    def address(self) -> str:
        """The URL to download from: on the mirror, if there is one."""
        mirror = os.environ.get(MIRROR)
        return f"{mirror.rstrip('/')}/{self.name}" if mirror else self.url


class DamagedError(Exception):
    """A file is not the expected one. The message says why."""


@contextlib.contextmanager
def obtaining(remote: Remote, folder: Path, *, unpacked: int = 0) -> Iterator[Path]:
    """Yields a complete and verified file: FOLDER/NAME if it exists, otherwise a download to
    FOLDER/NAME.partial.

    The download is removed after the body, unless the body has moved it, and also if it is damaged
    according to its checksum or to a DamagedError in the body. Interruptions do not lose downloaded
    data. Processes must take turns.

    Args:
        remote: the file.
        folder: where to look for the file and to download it.
        unpacked: disk space for the unpacked file, as a multiple of the file's size.

    Raises:
        DownloadError: the file cannot be downloaded, is damaged, or too large for the disk.
        StoppedError: Ctrl-C interrupted it.
    """
    own, partial = folder / remote.name, folder / f"{remote.name}.partial"
    path = own if own.exists() else partial
    try:
        if path == partial:
            _download(remote, partial, unpacked)
        _verify(remote, path)
        yield path
    except DamagedError as error:
        remedy = "replace or remove the file"
        if path == partial:
            partial.unlink()
            remedy = f"the download was removed; {_by_hand(remote, folder)}"
        raise DownloadError(f"{path}: {error}; {remedy}") from error
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped; downloaded and unpacked files are kept; {_by_hand(remote, folder)}"
        ) from None
    partial.unlink(missing_ok=True)


def check_space(name: str, folder: Path, needed: int) -> None:
    """Raises DownloadError if fewer than `needed` bytes are free in the folder."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{folder}: {name} needs {needed / 1e9:.1f} GB here, {free / 1e9:.1f} GB are free; "
            "make room, or choose a folder on another disk"
        )


def _by_hand(remote: Remote, folder: Path) -> str:
    return (
        f"run the same command again, download {remote.address} by hand to "
        f"{folder / remote.name}, or set {MIRROR} to the URL of a folder that has it"
    )


def _download(remote: Remote, path: Path, unpacked: int) -> None:
    """Downloads the missing part. Raises DownloadError if server or connection keep failing."""
    failures = 0
    with tqdm(desc=remote.name, unit="B", unit_scale=True) as bar:
        while True:
            before = _size(path)
            try:
                return _receive(remote, path, unpacked, bar)
            except requests.RequestException as error:
                if _size(path) > before:
                    failures = 0
                if not _is_temporary(error) or failures == len(_WAITS):
                    kept = f"; {_size(path):,} bytes are kept in {path}" if _size(path) else ""
                    raise DownloadError(
                        f"{remote.address}: {_reason(error)}{kept}; {_by_hand(remote, path.parent)}"
                    ) from error
                bar.write(f"{remote.name}: {_reason(error)}; next attempt in {_WAITS[failures]} s")
            time.sleep(_WAITS[failures])
            failures += 1


def _receive(remote: Remote, path: Path, unpacked: int, bar: tqdm) -> None:
    """Appends the missing part, in one request.

    If the server ignores the requested range and sends the whole file, the part that exists is
    skipped.

    Raises:
        requests.RequestException: the request failed, or the connection broke.
        DamagedError: the server's file is another one.
        DownloadError: there is too little disk space.
    """
    have = _size(path)
    if remote.size is not None and have >= remote.size:
        return  # wrong size or content is detected later
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(remote.address, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        ranges = re.match(
            r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)$", response.headers.get("Content-Range", "")
        )
        end = 0 if ranges is None or ranges[2] == "*" else int(ranges[2])
        if response.status_code == requests.codes.requested_range_not_satisfiable and end:
            if have > end:
                raise DamagedError(f"has {have:,} bytes, the server's file only {end:,}")
            return  # the file was complete
        response.raise_for_status()
        if response.status_code == requests.codes.partial_content:
            if ranges is None or ranges[1] != str(have):
                raise requests.RequestException("sent other bytes than requested")
            start, total = have, end
        else:
            start, total = 0, int(response.headers.get("Content-Length", 0))
        if remote.size is not None and total not in (0, remote.size):
            raise requests.RequestException(f"has {total:,} bytes, expected {remote.size:,}")
        check_space(remote.name, path.parent, max(total - have, 0) + unpacked * total)
        bar.total, bar.n = total or None, have
        bar.refresh()
        skip = have - start
        with path.open("ab") as file:
            for block in response.iter_content(_BLOCK):
                kept = block[skip:]
                skip -= len(block) - len(kept)
                file.write(kept)
                bar.update(len(kept))
    if remote.size is not None and _size(path) < remote.size:
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


def _verify(remote: Remote, path: Path) -> None:
    """Raises DamagedError if the size or the checksum differs from the published one."""
    size = _size(path)
    if remote.size is not None and size != remote.size:
        raise DamagedError(f"has {size:,} bytes, expected {remote.size:,}")
    print(f"computing the checksum of {path}", file=sys.stderr)
    found = checksum(path)
    if remote.sha256 is None:
        line = f"{found}  {remote.name}\n"
        print(
            f"{remote.name}: no checksum is published; its SHA-256 is {found}, "
            f"noted in {path.parent / CHECKSUMS}",
            file=sys.stderr,
        )
        with (path.parent / CHECKSUMS).open("a+") as file:
            file.seek(0)
            if line not in file.readlines():
                file.write(line)
    elif found != remote.sha256:
        raise DamagedError(f"its SHA-256 is {found}, expected {remote.sha256}")

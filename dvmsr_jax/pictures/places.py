"""Files and folders at local paths, or at URLs that fsspec knows: s3://, gs://, https:// and more.

Remote files are copied to a temporary file before they are read. Results are written to one before
they are sent, and appear under their name only when all of it has arrived.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dvmsr_jax import files
from dvmsr_jax.errors import DiskFullError, UserError, is_disk_full

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_LOCAL = ("file", "local")
_READ_ONLY = ("http", "https")
# Here, folders are only parts of names, and creating one could create a bucket.
_WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")


class Remote(PurePosixPath):
    """A URL, with pathlib's properties of names."""

    size: int | None = None
    """Bytes, if it is known from a listing of the folder."""
    query = ""
    """What follows the name in a URL of the web, such as a signature: with its question mark. It is
    neither part of names nor printed."""

    @property
    def url(self) -> str:
        return str(self) + self.query

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.query == getattr(other, "query", "")

    __hash__ = PurePosixPath.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return place, (self.url,)

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    @property
    def scheme(self) -> str:
        return self.parts[0].removesuffix(":").lower()


Place = Path | Remote


def place(name: str) -> Place:
    """The place with this path or URL."""
    scheme = _SCHEME.match(name)
    if scheme is None:
        return Path(name)
    if scheme[1].lower() in _LOCAL:
        return Path(name[scheme.end() :])
    if scheme[1].lower() not in _READ_ONLY:
        return Remote(name)
    path, mark, query = name.partition("?")
    there = Remote(path)
    there.query = mark + query
    return there


def is_read_only(place: Place) -> bool:
    """Whether nothing can be written there."""
    return isinstance(place, Remote) and place.scheme in _READ_ONLY


def is_folder(name: str) -> bool:
    """Whether there is a folder with this path or URL. URLs of web folders end in a slash.

    Raises UserError if a remote place does not answer, as do all functions here.
    """
    there = place(name)
    if isinstance(there, Path):
        return os.path.isdir(there)  # Path.is_dir raises for overlong names
    if is_read_only(there):
        return name.endswith("/") and not there.query
    with _asking(there) as (system, path):
        return system.isdir(path)


def exists(place: Place) -> bool:
    """Whether there is a file or folder."""
    if isinstance(place, Path):
        return os.path.exists(place)
    with _asking(place) as (system, path):
        return system.exists(path)


def identity(place: Place) -> object:
    """What all names of a local file share; None if there is none. Of a remote one, its name."""
    if isinstance(place, Remote):
        return place.url
    try:
        status = place.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def real(place: Place) -> str:
    """The path without symbolic links, or the URL."""
    return os.path.realpath(place) if isinstance(place, Path) else place.url


def is_link(place: Place) -> bool:
    """Whether a local path contains symbolic links."""
    return isinstance(place, Path) and real(place) != os.path.abspath(place)


def size(place: Place) -> int:
    """Bytes in a file; 0 if that cannot be found out, which is reported when it is read."""
    try:
        if isinstance(place, Path):
            return place.stat().st_size
        if place.size is None:
            with _asking(place) as (system, path):
                return system.size(path) or 0
        return place.size
    except (OSError, UserError):
        return 0


def names_in(folder: Place) -> list[str]:
    """The names of what is in a folder; none if it cannot be listed."""
    with contextlib.suppress(OSError, UserError):
        if isinstance(folder, Path):
            return os.listdir(folder)
        with _asking(folder) as (system, path):
            return [PurePosixPath(name).name for name in system.ls(path, detail=False)]
    return []


def files_in(folder: Remote) -> list[Remote]:
    """All files in a folder and its subfolders, sorted, except hidden ones."""
    with _asking(folder) as (system, path):
        return sorted(_listed(folder, path, system.find(path, detail=True)))


def matching(pattern: Remote, root: Remote) -> list[Remote]:
    """The files that match a pattern, sorted; `root` is the part of it without wildcards."""
    with _asking(pattern) as (system, path):
        found = system.glob(path, detail=True)
        return sorted(_listed(root, system._strip_protocol(str(root)), found))


def _listed(root: Remote, path: str, found: dict[str, dict[str, Any]]) -> Iterator[Remote]:
    for name, about in found.items():
        # The names may lack what is in the URL, such as the host.
        inner = PurePosixPath(name).relative_to(path)
        if about["type"] != "directory" and not any(part.startswith(".") for part in inner.parts):
            file = root / inner
            file.size = about["size"]
            yield file


@contextlib.contextmanager
def local(place: Place) -> Iterator[Path]:
    """Yields the path of a local file, or of a copy of a remote one. UserErrors about the copy name
    the place."""
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="dvmsr-") as folder:
        copy = Path(folder, "picture").with_suffix(place.suffix)
        with _asking(place) as (system, path):
            try:
                system.get_file(path, os.fspath(copy))
            except OSError as error:
                if not is_disk_full(error):
                    raise
                raise DiskFullError(
                    f"{folder}: {error.strerror}. Remote pictures are first copied there: free some"
                    " space, or set TMPDIR to another folder"
                ) from error
        try:
            yield copy
        except UserError as error:
            error.args = (str(error.args[0]).replace(str(copy), str(place)),)
            raise


def write_json(target: Place, content: Any) -> None:
    """Writes JSON, completely or not at all. Local failures raise OSError."""
    if isinstance(target, Path):
        files.write_json(target, content)
        return
    with tempfile.TemporaryDirectory(prefix="dvmsr-") as folder:
        path = Path(folder, "content.json")
        files.write_json(path, content)
        send(path, target)


def send(path: Path, target: Remote) -> None:
    """Copies a local file to a remote place, where it appears completely or not at all."""
    with _asking(target) as (system, name):
        if target.scheme not in _WITHOUT_FOLDERS:
            system.makedirs(system._parent(name), exist_ok=True)
        # At the end of a transaction, fsspec completes the upload, or gives the file its name.
        with system.transaction, system.open(name, "wb") as file, path.open("rb") as source:
            shutil.copyfileobj(source, file)


@contextlib.contextmanager
def _asking(place: Remote) -> Iterator[tuple[Any, str]]:
    """Yields fsspec's file system and the place's name there. Any exception becomes a UserError."""
    try:
        import fsspec

        yield fsspec.url_to_fs(place.url)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{place}: no such file") from error
    except Exception as error:  # each file system has its own, as for missing credentials
        reason = " ".join(str(error).split()) or type(error).__name__
        if place.query:  # it may be a signature
            reason = reason.replace(place.query, "")
        raise UserError(f"{place}: {reason}") from error

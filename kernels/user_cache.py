"""Folders for compiled programs, kept between runs."""

import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """Creates and returns this project's folder in the user's cache.

    Raises OSError if there is no home directory, if the folder cannot be written to, or if other
    users can write to it: its contents are executed.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise OSError(f"no cache folder: {error}") from error
    return _private(cache / "dvmsr_jax")


def binaries_folder() -> Path:
    """Like `folder`, for shared libraries, which cannot be loaded from a `noexec` file system.

    Uses the first of the user's cache, the runtime directory and the temporary directory that is
    not on such a file system.
    """
    first = folder()
    if not _is_noexec(first):
        return first
    name = f"dvmsr_jax-{os.geteuid()}"
    parents = os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()
    for parent in parents:
        if parent and os.path.isdir(parent) and not _is_noexec(Path(parent)):
            elsewhere = Path(parent, name)
            if elsewhere.is_symlink():  # other users may have created it
                raise PermissionError(f"{elsewhere} is a symbolic link")
            return _private(elsewhere)
    raise PermissionError(f"{first} and the temporary directory are mounted noexec; set TMPDIR")


def check_is_private(path: Path) -> None:
    """Raises PermissionError unless the user owns the file and nobody else may write to it."""
    if os.name != "posix":
        return
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{path} belongs to another user or can be written by others")


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_is_private(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to")
    return folder


def _is_noexec(folder: Path) -> bool:
    noexec = getattr(os, "ST_NOEXEC", 0)  # Linux
    return bool(noexec and os.statvfs(folder).f_flag & noexec)

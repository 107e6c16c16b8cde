"""Files that are written completely or not at all, JSON, locks and checksums."""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Creates an empty hidden file beside PATH to write to, and PATH's folder if needed. At the
    end, the file replaces PATH; after an exception, it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, because PATH's name may be as long as names can be. Random instead of by process
    # number, because containers that share a folder may have equal numbers.
    temporary = path.with_name(f".dvmsr-{secrets.token_hex(8)}")
    try:
        temporary.touch()  # fails before any work if the folder cannot be written to
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # before the file appears under its name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def lock(file: IO[Any], *, wait: bool) -> bool:
    """Locks the open file until it is closed. If another process holds the lock, waits if `wait` is
    True, and otherwise returns False. On file systems without locks, always succeeds."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def has_locks(file: IO[Any]) -> bool:
    """Whether the open file lies on a file system with locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def regular_size(path: Path, *, at_most: int) -> int:
    """Bytes in a file, or in the one that it links to.

    Raises:
        OSError: it cannot be found, is not a regular file (a device or pipe might never end), or is
            larger than `at_most`.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path}: not a regular file")
    if status.st_size > at_most:
        raise OSError(f"{path}: has {status.st_size:,} bytes, more than the {at_most:,} expected")
    return status.st_size


def checksum(path: Path) -> str:
    """SHA-256, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

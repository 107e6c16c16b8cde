"""Files that are written completely or not at all, JSON, locks and checksums."""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dvmsr_jax.errors import UserError, printable


def hidden(folder: Path) -> Path:
    """A hidden name in a folder that nothing else has.

    It is short, because it may take the place of a name as long as names can be. It is random
    instead of made of the process number, because containers that share a folder may have equal
    numbers.
    """
    return folder / f".dvmsr-{secrets.token_hex(8)}"


def appears(path: Path) -> bool:
    """Whether there is a file. If not, looks again for some seconds, as network file systems may
    show the files of other machines late."""
    for seconds in (0, 1, 2, 3):
        time.sleep(seconds)
        if path.exists():
            return True
    return False


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Creates an empty hidden file beside PATH to write to, and PATH's folder if needed. At the
    end, the file replaces PATH; after an exception, it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden(path.parent)
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


def lock(file: IO[Any], *, wait: bool) -> bool | None:
    """Locks the open file until it is closed.

    If another process holds the lock, waits if `wait`, and otherwise returns False. Returns None
    on file systems without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """Runs the body in one process at a time; the others with the same PATH wait for their turn.

    PATH is a file that exists during the body. It is also locked, so that nobody waits for a killed
    process, which leaves it behind. On file systems without locks, a process owns the file that it
    created, and touches it regularly.

    Raises:
        UserError: on a file system without locks, the owner no longer touches the file.
        OSError: the file cannot be created.
    """
    waiting = False
    while True:
        try:
            file, created = path.open("x"), True
        except FileExistsError:
            try:
                file, created = path.open("r+"), False
            except FileNotFoundError:  # removed in between
                continue
        with file:
            locked = lock(file, wait=False)
            if locked is False or (locked is None and not created):
                if not waiting:
                    print(printable(f"waiting for the process that holds {path}"), file=sys.stderr)
                waiting = True
                if locked is None:
                    _wait_for_removal(path)
                    continue
                lock(file, wait=True)
            if not _is_at(file, path):  # its owner has finished and removed it
                continue
            try:
                with _touching(file) if locked is None else contextlib.nullcontext():
                    yield
            finally:
                if _is_at(file, path):
                    path.unlink()
            return


# Seconds between looks at another process's file, between touches of one's own, and without a touch
# until giving up. NFS may show other machines' changes a minute late.
_POLL, _TOUCH, _PATIENCE = 1.0, 30.0, 600.0


def _wait_for_removal(path: Path) -> None:
    touched, since = -1, 0.0
    while True:
        try:
            now = path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if now != touched:
            touched, since = now, time.monotonic()
        elif time.monotonic() - since > _PATIENCE:
            raise UserError(
                f"{path}: the process that created this file has not touched it for "
                f"{_PATIENCE:.0f} s. If it has ended, remove the file, and the same command "
                "continues its work"
            )
        time.sleep(_POLL)


@contextlib.contextmanager
def _touching(file: IO[Any]) -> Iterator[None]:
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(_TOUCH):
            with contextlib.suppress(OSError):  # it was removed
                os.utime(file.fileno())

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _is_at(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


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

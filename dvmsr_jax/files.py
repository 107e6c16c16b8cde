"""Files that are whole and on disk, or not there."""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside PATH, whose folder is made, to write to. What was written there takes
    the place of PATH, or is removed if there was an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, because PATH's name may be as long as they can be.
    temporary = path.with_name(f".dvmsr-{os.getpid()}-{zlib.crc32(os.fsencode(path.name)):08x}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # before its name says that it is whole
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes what `json.loads` gives back."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def checksum(path: Path) -> str:
    """SHA-256, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Where compiled programs are kept for the next time."""

import os
from pathlib import Path


def folder() -> Path:
    """This project's folder in the user's cache, which is made.

    Raises OSError if there is no home, it cannot be written to, or others can write to it: what is
    kept there is executed.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise OSError(f"no cache folder: {error}") from error
    folder = cache / "dvmsr_jax"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_is_private(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to")
    return folder


def check_is_private(path: Path) -> None:
    """Raises PermissionError unless the user owns the file and nobody else may write to it."""
    if os.name != "posix":
        return
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{path} belongs to another user or can be written by others")

"""Where compiled programs are kept for the next time."""

import os
from pathlib import Path


def folder() -> Path:
    """This project's folder in the user's cache; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dvmsr_jax"

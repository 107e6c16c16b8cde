"""Exceptions that are the user's to mend, and how command lines tell of them."""

import contextlib
import sys
from collections.abc import Iterator

# Exit status of a program that SIGINT ended, as shells give it.
INTERRUPTED = 130


class UserError(ValueError):
    """Something passed in cannot be used. The message names it and says what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that the host's or a device's memory does not suffice."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def told_in_a_line(
    *, out_of_memory: str = "close other programs", interrupted: str = "interrupted"
) -> Iterator[None]:
    """For main functions: within it, what is not a defect ends the process with a message.

    UserError, OSError and JAX's not finding the wished devices with their own, lack of memory with
    `out_of_memory` (what to try), Ctrl-C with `interrupted`. Any other exception is a defect and
    keeps its traceback.
    """
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        if reason.startswith("Unable to initialize backend"):
            sys.exit(f"error: {reason}")
        if not is_out_of_memory(error):
            raise
        sys.exit(f"error: out of memory ({reason or 'in main memory'}); {out_of_memory}")

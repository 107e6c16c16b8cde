"""Exceptions that users can act on, and text that is safe to print."""

import errno
import unicodedata


class UserError(ValueError):
    """Some input cannot be used. The message names it and says what to do.

    Since the message may contain file names, `str` makes each of its lines `printable`.
    """

    def __str__(self) -> str:
        return "\n".join(map(printable, super().__str__().split("\n")))


class DiskFullError(UserError):
    """There is no space for a file, and thus none for the following ones."""


class StoppedError(Exception):
    """A signal stopped the work before it was done. The message says how to resume."""


def printable(text: object) -> str:
    """Makes text that may contain file names safe to print, on one line.

    Control characters, line breaks and characters that cannot be encoded become escapes such as
    \\x1b.
    """
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1]
        for c in str(text)
    )


def is_disk_full(error: OSError) -> bool:
    """Whether a disk or the user's share of it is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device ran out of memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)

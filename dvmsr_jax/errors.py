"""Exceptions that are for the user to act on."""

import unicodedata


class UserError(ValueError):
    """Something passed in cannot be used. The message names it and says what to do.

    Since file names in it may contain control characters, `str` makes each line `printable`.
    """

    def __str__(self) -> str:
        return "\n".join(map(printable, super().__str__().split("\n")))


class StoppedError(Exception):
    """A signal ended the work before it was done. The message says how to resume it."""


def printable(text: object) -> str:
    """Makes text that may contain file names safe to print, on one line.

    Control characters, line breaks and characters that cannot be encoded become escapes such as
    \\x1b.
    """
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1]
        for c in str(text)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the host or of a device was too small."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)

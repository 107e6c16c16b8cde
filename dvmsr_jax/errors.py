"""Exceptions that are for the user to act on."""


class UserError(ValueError):
    """Something passed in cannot be used. The message names it and says what to do."""


class StoppedError(Exception):
    """A signal ended the work before it was done. The message says how to resume it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the host or of a device was too small."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)

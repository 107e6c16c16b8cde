"""Shared by all commands: their names, one-line error messages, Ctrl-C, the cache of compiled
programs."""

import contextlib
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax

from dvmsr_jax import parallel
from dvmsr_jax.config import Compute
from dvmsr_jax.errors import StoppedError, UserError, is_out_of_memory
from dvmsr_jax.kernels import user_cache, vimm

_interrupted_by = signal.SIGINT


def name() -> str:
    """The running program as users type it."""
    running = Path(sys.argv[0]).name
    return f"python {running}" if running.endswith(".py") else running


def described(text: str | None) -> str:
    """The help text of a command, whose examples begin with `dvmsr COMMAND`, for this program."""
    assert text is not None
    return re.sub(r"dvmsr [a-z]+(?= )", name(), text) if name().startswith("python") else text


def interrupted_status() -> int:
    """Exit status of an interrupted program, as shells report it: 128 and the signal's number."""
    return 128 + _interrupted_by


def interrupt_on_termination() -> None:
    """Makes SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does.

    A signal that is ignored, as by nohup, stays so.
    """
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _: object) -> None:
    global _interrupted_by
    _interrupted_by = signal.Signals(number)
    raise KeyboardInterrupt


@contextlib.contextmanager
def one_line_errors(
    *, out_of_memory: str = "close other programs", interrupted: str = "interrupted"
) -> Iterator[None]:
    """For main functions: an exception that is not a defect ends the process with one line.

    The line is the message of a UserError, an OSError or JAX's error that a device is missing;
    `out_of_memory`, which says what to try; or, after Ctrl-C, `interrupted`. A StoppedError's
    message goes to standard output. Any other exception is a defect and keeps its traceback.

    If there are several processes, all of them end with the same line.

    A program may leave SIGINT at its default during imports, so that Ctrl-C ends it without a
    traceback; from here on, SIGINT raises KeyboardInterrupt again.
    """
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    except StoppedError as stopped:
        parallel.say(str(stopped))
        sys.exit(interrupted_status())  # 0 would mean that the work is done
    except KeyboardInterrupt:
        parallel.end_all(interrupted)
        print(interrupted, file=sys.stderr)
        sys.exit(interrupted_status())
    except Exception as error:
        line = _line(error, out_of_memory)
        if line is not None:
            parallel.end_all(f"error: {line}")
            sys.exit(f"error: {line}")
        if parallel.joined():  # otherwise JAX, on exit, would wait for the other processes
            traceback.print_exc()
            parallel.end_all("error: a process of the run has failed unexpectedly")
        raise


def _line(error: Exception, out_of_memory: str) -> str | None:
    """The line that reports an error; None for a defect."""
    reason = str(error).partition("\n")[0]
    if parallel.is_disconnection(error):  # even if it comes as a UserError
        return (
            f"another process of the run has ended or does not answer ({reason}); start all of "
            "them again to resume"
        )
    if isinstance(error, UserError | OSError):
        return str(error)
    if reason.startswith("Unable to initialize backend"):
        return reason
    if is_out_of_memory(error):
        return f"out of memory ({reason or 'in main memory'}); {out_of_memory}"
    return None


def keep_compiled_programs() -> None:
    """Keeps what JAX compiles in the user's cache, so that the next process starts faster.

    This changes JAX's settings, so libraries should not call it. A folder set by the user
    (JAX_COMPILATION_CACHE_DIR) takes precedence; if none can be written to, nothing is kept.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        with contextlib.suppress(OSError):
            jax.config.update("jax_compilation_cache_dir", str(user_cache.folder() / "programs"))


def warn_of_bfloat16(compute: Compute, *, training: bool = False) -> None:
    """Says in one line on stderr that bfloat16 saves no time here, where that is so."""
    if compute.precision != "bfloat16" or jax.default_backend() != "cpu":
        return
    reason = vimm.missing("bfloat16")
    if training:
        reason = "on CPUs, it is for inference only"
    elif not compute.may_be_native:
        reason = f"with --scan {compute.scan}, JAX computes in float32 and rounds"
    if reason is not None:
        parallel.say(f"--precision bfloat16 saves no time: {reason}", sys.stderr)

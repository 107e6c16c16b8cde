"""The command `dvmsr`, also `python -m dvmsr_jax`.

    dvmsr upscale     enlarge pictures
    dvmsr evaluate    score weights on benchmarks
    dvmsr train       train a teacher, or distil it into a student
    dvmsr data        prepare training data, compute a teacher's outputs for it, check both
    dvmsr weights     list the weights that have a name
    dvmsr convert     write weights as .safetensors
    dvmsr export      write weights for other programs, as ONNX or StableHLO
    dvmsr web         open the page that upscales in the browser

`dvmsr COMMAND --help` describes a command's arguments.
"""

import importlib
import signal
import sys
from typing import Annotated, Literal

import tyro

import dvmsr_jax

Command = Literal["upscale", "evaluate", "train", "data", "weights", "convert", "export", "web"]

# The groups of packages that commands need besides those that upscaling needs.
EXTRAS: dict[Command, str] = {"evaluate": "train", "train": "train", "data": "train"}


def run(command: Command) -> None:
    """Runs a command with the arguments in sys.argv."""
    # Ctrl-C during imports ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Only this one, because each needs packages that the others may do without.
    try:
        module = importlib.import_module(f"dvmsr_jax.commands.{command}")
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(command)
        if extra is None or str(error.name).startswith("dvmsr_jax"):
            raise
        sys.exit(
            f"error: dvmsr {command} needs the package {error.name}: "
            f'pip install "dvmsr-jax[{extra}]"'
        )
    module.main()


def main() -> None:
    """Runs the command that the first argument names."""
    if sys.argv[1:2] == ["--version"]:
        print(dvmsr_jax.__version__)
        return
    command = tyro.cli(
        Annotated[Command, tyro.conf.Positional, tyro.conf.arg(name="command", metavar="COMMAND")],
        args=sys.argv[1:2] or ["--help"],
        prog="dvmsr",
        description=__doc__,
    )
    sys.argv[:2] = [f"dvmsr {command}"]
    run(command)


if __name__ == "__main__":
    main()

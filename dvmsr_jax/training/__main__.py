"""Computes a teacher's outputs for prepared training data, and checks them.

    python -m dvmsr_jax.training distill --ckpt TEACHER --data DIR
    python -m dvmsr_jax.training check DIR

`distill` can be stopped at any time; the same command resumes it. `train.py` trains.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from dvmsr_jax.program import one_line_errors
from dvmsr_jax.training import targets


def distill(ckpt: Path, data: Path, self_ensemble: bool = False, batch_size: int = 16) -> None:
    """Computes a teacher's outputs for prepared sub-images, for --distill.targets=precomputed.

    Args:
        ckpt: the teacher: a checkpoint directory, a .safetensors file or a published .pth file.
        data: a folder made by `python -m dvmsr_jax.data prepare`; the outputs go into its
            subfolder `targets`.
        self_ensemble: average over the eight flips and rotations: better, but eight times slower.
        batch_size: sub-images at a time, rounded up so that they divide evenly among the devices.
    """
    folder = targets.distill(
        ckpt, data.expanduser(), self_ensemble=self_ensemble, batch_size=batch_size
    )
    print(f"the teacher's outputs are in {folder}")


def check(folder: tyro.conf.Positional[Path]) -> None:
    """Checks the teachers' outputs in a prepared folder: shapes and checksums.

    Args:
        folder: the prepared folder, as given to `distill --data`.
    """
    folder = folder.expanduser()
    problems = targets.find_problems(folder)
    for path in targets.target_folders(folder):
        print(path)
    for line in targets.find_unfinished(folder):
        print(line)
    if problems:
        print("\n".join(problems))
        sys.exit(f"error: {len(problems)} problems")
    print("no problems")


COMMANDS: dict[str, Callable[..., Any]] = {"distill": distill, "check": check}


def main() -> None:
    """Runs the command line."""
    with one_line_errors(
        out_of_memory="try a smaller --batch-size",
        interrupted="stopped; the same command resumes",
    ):
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="python -m dvmsr_jax.training", description=__doc__
        )


if __name__ == "__main__":
    main()

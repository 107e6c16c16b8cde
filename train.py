"""Trains a teacher, or distils it into a student.

python train.py --phase=teacher --data.hr-dirs DIR [DIR ...]
python train.py --phase=student --data.hr-dirs DIR [DIR ...]

--preset=demo takes a small model and a short run instead of the paper's. A run that was stopped
goes on where it stopped when the same command is given again.
"""

import argparse
import sys
from collections.abc import Sequence

import tyro

from configs import PRESETS
from dvmsr_jax.config import TrainConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.training import train


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The preset that --phase and --preset name, with every other argument overriding a field."""
    choose = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choose.add_argument("--phase", choices=["teacher", "student"], default="student")
    choose.add_argument("--preset", choices=sorted(PRESETS), default="paper")
    chosen, rest = choose.parse_known_args(arguments)
    return tyro.cli(
        TrainConfig,
        default=PRESETS[chosen.preset][chosen.phase],
        args=rest,
        prog="train.py",
        description=__doc__,
    )


def main() -> None:
    """Parses the command line and trains."""
    config = parse(sys.argv[1:])
    try:
        train(config)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

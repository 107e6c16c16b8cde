"""Trains a teacher, or distils it into a student.

python train.py --phase=teacher --data.hr-dirs DIR [DIR ...]
python train.py --phase=student --data.hr-dirs DIR [DIR ...]

--preset=demo takes a small model and a short run instead of the paper's. A run that was stopped
goes on where it stopped when the same command is given again.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from configs import PRESETS
from dvmsr_jax import parallel
from dvmsr_jax.config import Cluster, TrainConfig
from dvmsr_jax.errors import INTERRUPTED, told_in_a_line
from dvmsr_jax.training.phases import StoppedError, dry_run, train


@dataclass(frozen=True)
class Arguments:
    """A run, and how it is launched this time."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    cluster: Cluster = field(default_factory=Cluster)
    dry_run: bool = False
    """Build everything, take two steps, print memory, speed and expected duration, and exit."""
    allow_changes: bool = False
    """Go on from a checkpoint although configuration, data or teacher were others; the shapes of
    the weights cannot change."""
    profile: int = 0
    """Record a trace of so many steps, for TensorBoard or Perfetto, in WORKDIR/PHASE/profile."""


def parse(arguments: Sequence[str]) -> Arguments:
    """The preset that --phase and --preset name, with every other argument overriding a field."""
    choose = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choose.add_argument("--phase", choices=["teacher", "student"], default="student")
    choose.add_argument("--preset", choices=sorted(PRESETS), default="paper")
    chosen, rest = choose.parse_known_args(arguments)
    return tyro.cli(
        Arguments,
        default=Arguments(PRESETS[chosen.preset][chosen.phase]),
        args=rest,
        prog="train.py",
        description=__doc__,
    )


def main() -> None:
    """Parses the command line and trains."""
    arguments = parse(sys.argv[1:])
    with told_in_a_line(
        out_of_memory="try --remat, a larger --optim.accumulate, --precision bfloat16 or "
        "--data.cache none"
    ):
        parallel.start(arguments.cluster)
        if arguments.dry_run:
            dry_run(arguments.config)
            return
        try:
            train(
                arguments.config,
                profile=arguments.profile,
                allow_changes=arguments.allow_changes,
            )
        except StoppedError as stopped:
            if parallel.is_first():
                print(stopped)
            sys.exit(INTERRUPTED)  # so that nothing takes the phase for done


if __name__ == "__main__":
    main()

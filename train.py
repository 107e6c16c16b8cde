"""Trains a teacher, or distils it into a student.

python train.py --phase=teacher --data.hr-dirs DIR [DIR ...]
python train.py --phase=student --data.hr-dirs DIR [DIR ...]

--preset=demo takes a small model and a short run instead of the paper's. A run that was stopped
goes on where it stopped when the same command is given again.
"""

import signal

if __name__ == "__main__":  # while the rest is imported, Ctrl-C just ends the process
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from configs import PRESETS
from dvmsr_jax import parallel
from dvmsr_jax.config import Cluster, TrainConfig, Within, check_fields
from dvmsr_jax.program import told_in_a_line
from dvmsr_jax.training.phases import dry_run, train


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
    profile: Annotated[int, Within(0)] = 0
    """Record a trace of so many steps, for TensorBoard or Perfetto, in WORKDIR/PHASE/profile."""

    def __post_init__(self) -> None:
        check_fields(self, "--")


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
    with told_in_a_line(
        out_of_memory="try --remat, a larger --optim.accumulate, --precision bfloat16 or "
        "--data.cache none"
    ):
        arguments = parse(sys.argv[1:])
        parallel.start(arguments.cluster)
        if arguments.dry_run:
            dry_run(arguments.config)
        else:
            train(
                arguments.config,
                profile=arguments.profile,
                allow_changes=arguments.allow_changes,
            )


if __name__ == "__main__":
    main()

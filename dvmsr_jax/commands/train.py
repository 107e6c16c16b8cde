"""Trains a teacher, or distils it into a student.

    dvmsr train --phase=teacher --data.hr-dirs DIR [DIR ...]
    dvmsr train --phase=student --data.hr-dirs DIR [DIR ...]

    dvmsr train --phase=teacher --preset=finetune --init PATH --data.hr-dirs DIR [DIR ...]

--preset=demo trains a small model briefly instead of the paper's; --preset=finetune continues from
given weights. To resume a run that was stopped, give the same command again.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dvmsr_jax import parallel, program
from dvmsr_jax.config import Cluster, ModelConfig, TrainConfig, Within, check_fields
from dvmsr_jax.configs import PRESETS
from dvmsr_jax.pretrained import load_config
from dvmsr_jax.program import one_line_errors
from dvmsr_jax.training.loop import dry_run, train


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    cluster: Cluster = field(default_factory=Cluster)
    dry_run: bool = False
    """Take two steps, print memory, speed and the run's expected duration, and exit."""
    allow_changes: bool = False
    """Resume even if configuration, data or teacher differ from the checkpoint's; the shapes of the
    weights cannot change."""
    profile: Annotated[int, Within(0)] = 0
    """Trace this many steps, for TensorBoard or Perfetto, into WORKDIR/PHASE/profile."""

    def __post_init__(self) -> None:
        check_fields(self, "--")


def parse(arguments: Sequence[str]) -> Arguments:
    """Parses the command line: --phase and --preset choose the defaults of all other options.

    With --init, the options of the network default to those of the weights.

    Raises:
        UserError: an argument is out of range, or the weights cannot be read.
    """
    choose = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choose.add_argument("--phase", choices=["teacher", "student"], default="student")
    choose.add_argument("--preset", choices=sorted(PRESETS), default="paper")
    choose.add_argument("--init", type=Path)
    chosen, rest = choose.parse_known_args(arguments)
    config = PRESETS[chosen.preset][chosen.phase]
    if chosen.init is not None:
        assert isinstance(config.model, ModelConfig)  # like every preset's
        model = dataclasses.replace(load_config(chosen.init), drop_path=config.model.drop_path)
        config = dataclasses.replace(config, init=chosen.init, model=model)
    return tyro.cli(
        Arguments,
        default=Arguments(config),
        args=rest,
        prog=program.name(),
        description=program.described(__doc__),
    )


def main() -> None:
    """Parses the command line and trains."""
    with one_line_errors(
        out_of_memory="try --remat, a larger --optim.accumulate, --precision bfloat16 or "
        "--data.cache none"
    ):
        arguments = parse(sys.argv[1:])
        parallel.start(arguments.cluster)
        program.warn_of_bfloat16(arguments.config.compute, training=True)
        if arguments.dry_run:
            dry_run(arguments.config)
        else:
            train(
                arguments.config,
                profile=arguments.profile,
                allow_changes=arguments.allow_changes,
            )

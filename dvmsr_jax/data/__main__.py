"""Prepares training data, checks it, and computes a teacher's outputs for it.

    python -m dvmsr_jax.data prepare --hr-dirs DIR [DIR ...] --out DIR
    python -m dvmsr_jax.data check DIR
    python -m dvmsr_jax.data distill --ckpt TEACHER --data DIR

The first and the last can be stopped at any time; the same command goes on where it was.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from dvmsr_jax.config import DataConfig
from dvmsr_jax.data import targets
from dvmsr_jax.data.check import check as find_problems
from dvmsr_jax.data.check import check_targets
from dvmsr_jax.data.prepare import prepare as prepare_pictures
from dvmsr_jax.data.records import read_counts, read_preparation
from dvmsr_jax.data.sources import find_sources
from dvmsr_jax.program import told_in_a_line

# Problems that `check` prints at most; there can be one for each record.
_SHOWN = 20


def prepare(
    out: Path,
    hr_dirs: tuple[Path, ...] = (),
    scale: Literal[2, 3, 4] = 4,
    val_images: int = DataConfig.val_images,
    data_dir: Path = DataConfig.data_dir,
) -> None:
    """Cuts pictures into aligned LR and HR sub-images, for train.py --data.prepared OUT.

    Args:
        out: the folder to make.
        hr_dirs: folders of high-resolution pictures, searched recursively. None: TFDS's DIV2K.
        scale: upscaling factor.
        val_images: pictures kept apart from training for validation.
        data_dir: where TFDS keeps its downloads.
    """
    config = DataConfig(hr_dirs=hr_dirs, val_images=val_images, data_dir=data_dir)
    prepare_pictures(find_sources(config, scale), scale, out.expanduser())
    print(_summary(out.expanduser()))


def check(folder: tyro.conf.Positional[Path]) -> None:
    """Checks a prepared folder: counts, sizes, checksums, and that each LR belongs to its HR.

    And the teachers' outputs in it, as far as they were computed.

    Args:
        folder: what `prepare` made.
    """
    folder = folder.expanduser()
    in_records, in_targets = find_problems(folder), check_targets(folder)
    print(_summary(folder))
    for line in targets.find_unfinished(folder):
        print(line)
    problems = in_records + in_targets
    if problems:
        print("\n".join(problems[:_SHOWN]))
        more = f", the first {_SHOWN} above" if len(problems) > _SHOWN else ""
        remedy = "; remove the folder and prepare it anew" if in_records else ""
        sys.exit(f"error: {len(problems)} problems{more}{remedy}")
    print("no problems")


def distill(ckpt: Path, data: Path, self_ensemble: bool = False, batch_size: int = 16) -> None:
    """Computes a teacher's outputs for prepared sub-images, for --distill.targets=precomputed.

    Args:
        ckpt: the teacher: a checkpoint directory, a .safetensors file or a published .pth file.
        data: what `prepare` made; the outputs go into its folder `targets`.
        self_ensemble: average over the eight flips and turns; a better teacher, eight times slower.
        batch_size: sub-images at a time, or more for all devices to share them evenly.
    """
    folder = targets.distill(
        ckpt, data.expanduser(), self_ensemble=self_ensemble, batch_size=batch_size
    )
    print(f"the teacher's outputs are in {folder}")


COMMANDS: dict[str, Callable[..., Any]] = {"prepare": prepare, "check": check, "distill": distill}


def _summary(folder: Path) -> str:
    shards = read_preparation(folder)["shards"].values()
    pictures = sum(len(shard["pictures"]) for shard in shards)
    left_out = sum(len(shard["left_out"]) for shard in shards)
    counts = ", ".join(f"{n:,} for {split}" for split, n in read_counts(folder).items())
    size = sum(shard["bytes"] for shard in shards) / 1e9
    pictures_used = f"{pictures:,} pictures ({left_out} left out)"
    return f"{folder}: {counts} sub-images of {pictures_used}, {size:.1f} GB"


def main() -> None:
    """Does what the command line says."""
    with told_in_a_line(
        out_of_memory="try a smaller --batch-size",
        interrupted="stopped; the same command goes on from there",
    ):
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="python -m dvmsr_jax.data", description=__doc__
        )


if __name__ == "__main__":
    main()

"""Prepares training data and checks it.

    python -m dvmsr_jax.data prepare --hr-dirs DIR [DIR ...] --out DIR
    python -m dvmsr_jax.data prepare --dataset df2k --out DIR
    python -m dvmsr_jax.data check DIR

`prepare` can be stopped at any time; the same command resumes it.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from dvmsr_jax.config import DataConfig
from dvmsr_jax.data.check import find_problems
from dvmsr_jax.data.prepare import prepare as prepare_pictures
from dvmsr_jax.data.records import Preparation, read_counts
from dvmsr_jax.data.sources import find_sources
from dvmsr_jax.program import one_line_errors

# Largest number of problems that `check` prints; each record can have one.
_SHOWN = 20


def prepare(
    out: Path,
    hr_dirs: tuple[Path, ...] = (),
    dataset: Literal["div2k", "df2k"] = DataConfig.dataset,
    scale: Literal[2, 3, 4] = 4,
    val_images: int = DataConfig.val_images,
    max_unreadable: float = DataConfig.max_unreadable,
    data_dir: Path = DataConfig.data_dir,
) -> None:
    """Cuts pictures into aligned LR and HR sub-images, for train.py --data.prepared OUT.

    Args:
        out: the folder to create.
        hr_dirs: folders of high-resolution pictures, searched recursively. None: `dataset`.
        dataset: pictures to download, without hr_dirs. div2k: DIV2K. df2k: DIV2K and Flickr2K.
        scale: upscaling factor.
        val_images: number of pictures held out for validation.
        max_unreadable: largest fraction of the pictures that may be left out because they cannot be
            read.
        data_dir: folder that pictures are downloaded to.
    """
    config = DataConfig(
        hr_dirs=hr_dirs,
        dataset=dataset,
        val_images=val_images,
        max_unreadable=max_unreadable,
        data_dir=data_dir,
    )
    pictures = find_sources(config)
    prepare_pictures(pictures, scale, out.expanduser(), max_unreadable=config.max_unreadable)
    print(_summary(out.expanduser()))


def check(folder: tyro.conf.Positional[Path]) -> None:
    """Checks a prepared folder: counts, sizes, checksums, and that each LR matches its HR.

    `python -m dvmsr_jax.training check` checks teachers' outputs, which may be in the same folder.

    Args:
        folder: a folder made by `prepare`.
    """
    folder = folder.expanduser()
    problems = find_problems(folder)
    print(_summary(folder))
    if problems:
        print("\n".join(problems[:_SHOWN]))
        more = f", the first {_SHOWN} above" if len(problems) > _SHOWN else ""
        remedy = "remove the folder and prepare it again"
        sys.exit(f"error: {len(problems)} problems{more}; {remedy}")
    print("no problems")


COMMANDS: dict[str, Callable[..., Any]] = {"prepare": prepare, "check": check}


def _summary(folder: Path) -> str:
    shards = Preparation.read(folder).shards.values()
    pictures = sum(len(shard.pictures) for shard in shards)
    left_out = sum(len(shard.left_out) for shard in shards)
    counts = ", ".join(f"{n:,} for {split}" for split, n in read_counts(folder).items())
    size = sum(shard.bytes for shard in shards) / 1e9
    pictures_used = f"{pictures:,} pictures ({left_out} left out)"
    return f"{folder}: {counts} sub-images of {pictures_used}, {size:.1f} GB"


def main() -> None:
    """Runs the command line."""
    with one_line_errors(interrupted="stopped; the same command resumes"):
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="python -m dvmsr_jax.data", description=__doc__
        )


if __name__ == "__main__":
    main()

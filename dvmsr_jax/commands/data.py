"""Prepares training data, computes a teacher's outputs for it, and checks both.

    dvmsr data prepare --hr-dirs DIR [DIR ...] --out DIR
    dvmsr data prepare --dataset df2k --out DIR
    dvmsr data distill --ckpt TEACHER --data DIR
    dvmsr data check DIR

`prepare` and `distill` can be stopped at any time; the same command resumes them.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from dvmsr_jax import program
from dvmsr_jax.cluster import RayOption
from dvmsr_jax.config import DataConfig
from dvmsr_jax.data.check import find_problems
from dvmsr_jax.data.prepare import prepare as prepare_pictures
from dvmsr_jax.data.records import Preparation, read_counts
from dvmsr_jax.data.sources import find_sources
from dvmsr_jax.program import one_line_errors
from dvmsr_jax.training import targets

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
    ray: RayOption = None,
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
        ray: use the cores of this machine through Ray or, given an address (auto, HOST:PORT), those
            of a running cluster whose machines see the same files.
    """
    config = DataConfig(
        hr_dirs=hr_dirs,
        dataset=dataset,
        val_images=val_images,
        max_unreadable=max_unreadable,
        data_dir=data_dir,
    )
    pictures = find_sources(config)
    prepare_pictures(
        pictures, scale, out.expanduser(), max_unreadable=config.max_unreadable, ray=ray
    )
    print(_summary(out.expanduser()))


def distill(
    ckpt: Path,
    data: Path,
    self_ensemble: bool = False,
    batch_size: int = 16,
    ray: RayOption = None,
) -> None:
    """Computes a teacher's outputs for prepared sub-images, for --distill.targets=precomputed.

    Args:
        ckpt: the teacher: a checkpoint directory, a .safetensors file or a published .pth file.
        data: a folder made by `dvmsr data prepare`; the outputs go into its
            subfolder `targets`.
        self_ensemble: average over the eight flips and rotations: better, but eight times slower.
        batch_size: sub-images at a time, rounded up so that they divide evenly among the devices.
        ray: use all GPUs or cores of this machine through Ray or, given an address (auto,
            HOST:PORT), those of a running cluster whose machines see the same files.
    """
    folder = targets.distill(
        ckpt, data.expanduser(), self_ensemble=self_ensemble, batch_size=batch_size, ray=ray
    )
    print(f"the teacher's outputs are in {folder}")


def check(folder: tyro.conf.Positional[Path]) -> None:
    """Checks a prepared folder: counts, sizes, checksums, and that each LR matches its HR.

    Teachers' outputs in the folder are checked for their shapes and checksums.

    Args:
        folder: a folder made by `prepare`.
    """
    folder = folder.expanduser()
    damaged = find_problems(folder)
    print(_summary(folder))
    for line in (*targets.target_folders(folder), *targets.find_unfinished(folder)):
        print(line)
    problems = [*damaged, *targets.find_problems(folder)]
    if problems:
        print("\n".join(problems[:_SHOWN]))
        more = f", the first {_SHOWN} above" if len(problems) > _SHOWN else ""
        remedy = "; remove the folder and prepare it again" if damaged else ""
        sys.exit(f"error: {len(problems)} problems{more}{remedy}")
    print("no problems")


COMMANDS: dict[str, Callable[..., Any]] = {
    "prepare": prepare,
    "distill": distill,
    "check": check,
}


def _summary(folder: Path) -> str:
    shards = Preparation.read(folder).shards.values()
    pictures = sum(len(shard.pictures) for shard in shards)
    left_out = sum(len(shard.left_out) for shard in shards)
    counts = ", ".join(f"{n:,} for {split}" for split, n in read_counts(folder).items())
    size = tqdm.format_sizeof(sum(shard.bytes for shard in shards), "B")
    pictures_used = f"{pictures:,} pictures ({left_out} left out)"
    return f"{folder}: {counts} sub-images of {pictures_used}, {size}"


def main() -> None:
    """Runs the command line."""
    program.interrupt_on_termination()
    with one_line_errors(
        out_of_memory="try a smaller --batch-size",
        interrupted="stopped; the same command resumes",
    ):
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog=program.name(), description=program.described(__doc__)
        )

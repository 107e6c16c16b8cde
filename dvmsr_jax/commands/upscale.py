"""Enlarges pictures fourfold, or by another factor.

    dvmsr upscale photo.jpg                        -> photo_x4.png beside it
    dvmsr upscale photos/ -o large/ --format webp  -> large/..., subfolders included
    dvmsr upscale - < photo.jpg > photo_x4.png

Existing results are skipped, so an interrupted command can be run again. If a folder holds both
photo.jpg and photo.png, their results are named photo_jpg_x4.png and photo_png_x4.png.
"""

import contextlib
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from tqdm import tqdm

from dvmsr_jax import program
from dvmsr_jax.cluster import RayOption
from dvmsr_jax.config import Compute
from dvmsr_jax.errors import UserError, printable
from dvmsr_jax.onnx import OnnxUpscaler
from dvmsr_jax.onnx.protocol import SUFFIX
from dvmsr_jax.pictures import formats, jobs, places, spread
from dvmsr_jax.pictures.places import place
from dvmsr_jax.pictures.upscaler import PictureUpscaler, Upscaler
from dvmsr_jax.program import keep_compiled_programs, one_line_errors


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Pictures (PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF; HEIC with pillow-heif), folders of them,
    patterns such as "*.jpg", or - for standard input."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """A file, a folder (end its name in /), or - for standard output. None: beside each input."""
    format: Literal["same", "png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp", "gif"] | None = None
    """Format of the results. same: each input's own, or PNG for AVIF and HEIC. None: that of the
    output's name, otherwise PNG, except that animations and multi-page files keep their format."""
    scale: float | None = None
    """Enlargement factor, up to 16. If it is not the model's, the model's output is resized. None:
    the model's."""
    overwrite: bool = False
    """Replace existing results. Inputs are never replaced."""
    quality: int | Literal["lossless"] | None = None
    """Quality of JPEG and WebP, from 1 to 100, or lossless for WebP. None: 95, except that a
    lossless WebP stays lossless."""
    self_ensemble: bool = False
    """Average over the eight flips and rotations of each picture: slightly better, eight times
    slower."""
    ckpt: Annotated[Path | None, tyro.conf.arg(aliases=["--model"])] = None
    """A name of weights (see checkpoints/README.md), a checkpoint directory (WORKDIR/PHASE), a
    .safetensors file, a published .pth file, or an .onnx file made by dvmsr export.
    None: the project's weights for the scale."""
    backend: Literal["jax", "onnx"] | None = None
    """The library that computes. onnx: ONNX Runtime, on the CPU. None: onnx for an .onnx file,
    otherwise jax."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster on GPUs, on TPUs and on CPUs with AVX512-BF16; results differ by
    rounding."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """None: the fastest one available."""
    tile: int | None = None
    """Upscale in square tiles of this side, in pixels. None: in bands of rows, which needs as
    little memory without approximating; only bidirectional models need tiles."""
    overlap: int | None = None
    """Overlap of the tiles in pixels. None: 16."""
    max_megapixels: float = 500.0
    """Refuse pictures that decode to more bytes than this many megapixels of 8-bit RGB: a small
    file can claim to hold an enormous picture. 16-bit samples count twice, alpha counts a third
    more, and the frames of an animation count together."""
    ray: RayOption = None
    """Spread the pictures, with Ray, over all GPUs or cores of this machine or, given an address
    (auto, HOST:PORT), of a running cluster. Without one, another option or nothing must follow."""
    json: str | None = None
    """Also write the summary to this file, with all pictures. It may be a URL, as may pictures and
    the output."""


def parse(arguments: Sequence[str]) -> Arguments:
    """Parses the command line."""
    return tyro.cli(
        Arguments, args=arguments, prog=program.name(), description=program.described(__doc__)
    )


def run(arguments: Arguments) -> int:
    """Upscales, reports each picture on stderr, and returns the exit status."""
    if not arguments.inputs:
        raise UserError("name at least one picture or folder")
    if arguments.quality is not None:
        if isinstance(arguments.quality, int) and not 1 <= arguments.quality <= 100:
            raise UserError(f"--quality is {arguments.quality}, not within 1 .. 100")
        asked = f".{arguments.format}" if arguments.format else Path(arguments.output or "").suffix
        lossy = formats.BY_SUFFIX.get(asked.lower()) in (formats.JPEG, formats.WEBP)
        if not lossy and asked != formats.SAME:
            raise UserError("--quality is for JPEG and WebP only: add --format jpg, webp or same")
    report = None if arguments.json is None else place(arguments.json)
    if report is not None and report.suffix.lower() in formats.BY_SUFFIX:
        raise UserError(f"--json {arguments.json}: is the name of a picture; choose another")
    if not 0 < arguments.max_megapixels < math.inf:
        raise UserError(f"--max-megapixels is {arguments.max_megapixels:g}, not a positive number")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # the summary reports the same
    here = arguments
    if arguments.ray is not None:  # the workers have the GPUs
        use_device("cpu")
        here = replace(arguments, device=arguments.device and "cpu")
    upscaler = make_upscaler(here)
    if arguments.ray is None:
        program.warn_of_bfloat16(Compute(precision=arguments.precision))
    planned = jobs.plan(
        arguments.inputs,
        arguments.output,
        scale=upscaler.scale,
        suffix=arguments.format and f".{arguments.format}",
    )
    waiting = [job for job in planned if isinstance(job, jobs.Job)]
    if any(job.source == jobs.STANDARD for job in waiting) and sys.stdin is None:
        raise UserError("standard input is closed")
    if any(job.target == jobs.STANDARD for job in waiting):
        if sys.stdout is None:
            raise UserError("standard output is closed")
        if sys.stdout.isatty():
            raise UserError(
                "standard output is a terminal: redirect it, or choose another --output"
            )
    start: Callable[..., Generator[jobs.Outcome, None, None]]
    if arguments.ray is None:
        start = functools.partial(jobs.run, planned, upscaler)
    else:
        make = functools.partial(_in_worker, replace(arguments, device=None))
        device = "cpu" if isinstance(upscaler, OnnxUpscaler) else arguments.device
        start = functools.partial(spread.run, planned, make, ray=arguments.ray, device=device)
    results = start(
        keep=arguments.inputs,
        overwrite=arguments.overwrite,
        quality=arguments.quality,
        max_pixels=int(arguments.max_megapixels * 1e6),
    )
    outcomes: list[jobs.Outcome] = []

    def write_report() -> None:
        if report is not None:
            finished = len(outcomes) == len(planned)
            places.write_json(report, jobs.report(outcomes, finished=finished))

    write_report()  # fails before any work if it cannot be written
    with contextlib.ExitStack() as at_end:
        at_end.callback(write_report)
        try:
            with contextlib.closing(results):
                for outcome in jobs.shown(results, len(planned), silent=len(planned) == 1):
                    outcomes.append(outcome)
                    if outcome.status == "done":
                        tqdm.write(printable(f"{outcome.source} -> {outcome.what}"), sys.stderr)
        except KeyboardInterrupt:
            status = program.interrupted_status()
            print("interrupted; run the same command again to resume", file=sys.stderr)
        except UserError as error:
            if not outcomes:
                raise
            status = 1
            print(f"stopped: {error}", file=sys.stderr)
        else:
            status = int(any(outcome.status == "failed" for outcome in outcomes))
        print(jobs.summary(outcomes), file=sys.stderr)
    return status


def make_upscaler(arguments: Arguments) -> PictureUpscaler:
    """Loads the model. Raises UserError if it cannot be used, or for an option without effect."""
    is_file = arguments.ckpt is not None and arguments.ckpt.suffix == SUFFIX
    backend = arguments.backend or ("onnx" if is_file else "jax")
    if backend == "onnx":
        for option in ("precision", "device", "tile", "overlap"):
            if getattr(arguments, option) != getattr(Arguments, option):
                raise UserError(f"--{option} has no effect on ONNX Runtime: leave it out")
        return OnnxUpscaler(
            arguments.ckpt, scale=arguments.scale, self_ensemble=arguments.self_ensemble
        )
    if is_file:
        raise UserError(f"{arguments.ckpt}: needs --backend onnx")
    if arguments.device is not None:
        use_device(arguments.device)
    return Upscaler(
        arguments.ckpt,
        scale=arguments.scale,
        self_ensemble=arguments.self_ensemble,
        tile=arguments.tile,
        overlap=arguments.overlap,
        precision=arguments.precision,
    )


def _in_worker(arguments: Arguments) -> PictureUpscaler:
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    keep_compiled_programs()
    return make_upscaler(arguments)


def use_device(name: str) -> None:
    """Makes JAX compute on this kind of device. Raises UserError if there is none."""
    # Without a platform JAX takes the best. "gpu" would try AMD's and Intel's besides NVIDIA's.
    jax.config.update("jax_platforms", "cpu" if name == "cpu" else None)
    if (there := jax.default_backend()) != name:
        raise UserError(f"--device {name}: JAX finds none, only {there} (see README, Install)")


def main() -> None:
    """Runs the program."""
    program.interrupt_on_termination()
    if sys.stderr is None:  # closed: print() would use standard output instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with one_line_errors():
        arguments = parse(sys.argv[1:])
        keep_compiled_programs()
        sys.exit(run(arguments))

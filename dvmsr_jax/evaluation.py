"""Benchmarks (folders of test pictures), and a model's scores on them."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from dvmsr_jax import bicubic
from dvmsr_jax.data import degradations
from dvmsr_jax.errors import UserError, printable
from dvmsr_jax.images import (
    ImageError,
    find_images,
    read_rgb,
    side_by_side,
    write_png,
)
from dvmsr_jax.metrics import psnr_rgb, psnr_y, ssim_y
from dvmsr_jax.samples import SAMPLES

_METRICS = {"psnr_y": psnr_y, "ssim_y": ssim_y, "psnr_rgb": psnr_rgb}
# Default strengths for `--degrade grid`.
_GRID = {"blur": 2.0, "noise": 20.0, "jpeg": 50}


class Example(NamedTuple):
    """A picture to upscale and the expected result."""

    name: str
    lr: np.ndarray  # (h, w, 3) uint8
    hr: np.ndarray  # (h * scale, w * scale, 3) uint8


@dataclass(frozen=True)
class Pair:
    """The files that an example is read from."""

    name: str
    hr: Path
    lr: Path | None
    """None: the LR picture is made from the HR one."""


@dataclass(frozen=True)
class Benchmark:
    """Examples, each read from its files during iteration."""

    pairs: tuple[Pair, ...]
    scale: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Example]:
        return (load_pair(pair, self.scale) for pair in self.pairs)


@dataclass(frozen=True)
class Degraded:
    """A benchmark whose LR pictures are degraded, in the same way every time."""

    benchmark: Benchmark
    strengths: Mapping[str, Any]
    """Arguments of `degradations.apply`."""

    def __len__(self) -> int:
        return len(self.benchmark)

    def __iter__(self) -> Iterator[Example]:
        for seed, example in enumerate(self.benchmark):
            yield example._replace(lr=degradations.apply(example.lr, seed=seed, **self.strengths))


def parse_degradations(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parses the arguments of `evaluate.py --degrade`; returns strengths by name of degradation.

    Args:
        arguments: "blur=SIGMA", "noise=SIGMA" and "jpeg=QUALITY", as in `degradations.apply`, each
            at most once. "grid": all combinations of the three, where strengths have defaults.

    Raises:
        UserError: an argument is none of these, or out of range.
    """
    given: dict[str, Any] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if argument == "grid":
            continue
        if name not in _GRID or name in given:
            raise UserError(
                f"--degrade {argument}: expected blur=SIGMA, noise=SIGMA and jpeg=QUALITY, each at "
                "most once, or grid"
            )
        try:
            given[name] = type(_GRID[name])(value)
        except ValueError as error:
            raise UserError(f"--degrade {argument}: {value!r} is not a number") from error
    degradations.check(**given)
    if "grid" in arguments:
        choices = sorted(itertools.product((False, True), repeat=len(_GRID)), key=sum)
        cells = [dict(itertools.compress((_GRID | given).items(), choice)) for choice in choices]
    else:
        cells = [{name: given[name] for name in _GRID if name in given}]
    return {" ".join(f"{n}={x:g}" for n, x in cell.items()) or "clean": cell for cell in cells}


def find_benchmarks(dirs: Sequence[Path], scale: int) -> dict[str, Benchmark]:
    """Finds benchmarks in these folders, and returns them by the name of their folder.

    Each folder is a benchmark or contains benchmarks. A benchmark has pictures in HR/ and,
    optionally, their low-resolution versions in LR/ (STEM.png or, as in DIV2K, STEMx{scale}.png for
    HR/STEM.png). Raises ImageError, naming the file or folder, for a folder that is neither, for
    two benchmarks or two pictures with the same name, and for HR and LR files that do not pair up.
    """
    folders: dict[str, Path] = {}
    for folder in (benchmark for parent in dirs for benchmark in _benchmark_folders(parent)):
        name = folder.resolve().name
        if name in folders:
            raise ImageError(f"{folder}: the name {name} is taken by {folders[name]}; rename one")
        folders[name] = folder
    return {name: Benchmark(_pair_up(folder, scale), scale) for name, folder in folders.items()}


def sample_benchmark(scale: int) -> Benchmark:
    """The photographs that come with scikit-image, `samples.SAMPLES`."""
    return Benchmark(tuple(Pair(path.stem, path, None) for path in SAMPLES), scale)


def load_pair(pair: Pair, scale: int) -> Example:
    """Reads a pair, crops HR to a multiple of the scale, and makes LR if it has no file.

    Raises ImageError, naming the file, if one cannot be read or their sizes do not fit.
    """
    hr = read_rgb(pair.hr)
    try:
        hr = bicubic.modcrop(hr, scale)
    except ValueError as error:
        raise ImageError(f"{pair.hr}: {error}") from error
    if pair.lr is None:
        return Example(pair.name, bicubic.downscale(hr, scale), hr)
    lr = read_rgb(pair.lr)
    width, height = hr.shape[1] // scale, hr.shape[0] // scale
    if lr.shape[:2] != (height, width):
        raise ImageError(
            f"{pair.lr}: has {lr.shape[1]}x{lr.shape[0]} pixels, but 1/{scale} of {pair.hr} is"
            f" {width}x{height}"
        )
    return Example(pair.name, lr, hr)


def evaluate(
    upscale: Callable[[np.ndarray], np.ndarray],
    examples: Iterable[Example],
    scale: int,
    *,
    name: str,
    save_dir: Path | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Scores `upscale`, a function from LR to SR pictures, both uint8, and bicubic upscaling.

    Returns the scores, {METRICS, "bicubic": {METRICS}, "images": {NAME: {METRICS}}}, and the
    seconds taken for each picture, excluding compilation. METRICS are "psnr_y", "ssim_y" and
    "psnr_rgb", and means over the examples except in "images".

    Progress goes to stderr if that is a terminal, under the benchmark's `name`. With `save_dir`,
    SR pictures are written to SAVE_DIR/NAME/PICTURE.png. Raises UserError if there are no
    examples or, naming the picture, if one cannot be scored (see `metrics`).
    """
    images: dict[str, dict[str, float]] = {}
    baseline: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    with ThreadPoolExecutor(1) as beside:
        for picture, lr, hr in tqdm(examples, desc=printable(name), unit="picture", disable=None):
            sr, seconds[picture] = _timed(upscale, lr)
            reference = beside.submit(_score_bicubic, lr, hr, scale)
            if save_dir is not None:
                write_png(save_dir / name / f"{picture}.png", sr)
            try:
                images[picture] = _score(sr, hr, scale)
                baseline[picture] = reference.result()
            except ValueError as error:
                raise UserError(f"{name}/{picture}: {error}") from error
    if not images:
        raise UserError(f"{name}: no pictures to score")
    return {**_mean(images), "bicubic": _mean(baseline), "images": images}, seconds


def comparison(
    example: Example, upscaled: Mapping[str, UInt8[np.ndarray, "h w 3"]], part: tuple[slice, slice]
) -> UInt8[np.ndarray, "H W 3"]:
    """Shows a part (rows, columns) of the picture by bicubic, by each model and in HR, in a row."""
    scale = len(example.hr) // len(example.lr)
    whole = {"bicubic": bicubic.upscale(example.lr, scale), **upscaled, "HR": example.hr}
    return side_by_side({label: picture[part] for label, picture in whole.items()})


def _timed(upscale: Callable[[np.ndarray], np.ndarray], lr: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the upscaled picture and the seconds taken. Repeats the call if JAX compiled."""
    compilations: list[str] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event.startswith("/jax/core/compile"):
            compilations.append(event)

    def once() -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        return upscale(lr), time.perf_counter() - start

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        result = once()
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return once() if compilations else result


def _score(sr: np.ndarray, hr: np.ndarray, border: int) -> dict[str, float]:
    return {name: metric(sr, hr, border) for name, metric in _METRICS.items()}


def _score_bicubic(lr: np.ndarray, hr: np.ndarray, scale: int) -> dict[str, float]:
    return _score(bicubic.upscale(lr, scale), hr, scale)


def _mean(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    return {
        metric: float(np.mean([score[metric] for score in scores.values()])) for metric in _METRICS
    }


def _benchmark_folders(folder: Path) -> list[Path]:
    if (folder / "HR").is_dir():
        return [folder]
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder")
    found = sorted(sub for sub in folder.iterdir() if (sub / "HR").is_dir())
    if not found:
        raise ImageError(f"{folder}: no HR/ folder of pictures in it or in its subfolders")
    return found


def _pair_up(folder: Path, scale: int) -> tuple[Pair, ...]:
    hrs = _by_stem(folder / "HR")
    if not (folder / "LR").is_dir():
        return tuple(Pair(stem, hr, None) for stem, hr in hrs.items())
    lrs = _by_stem(folder / "LR")
    pairs = []
    for stem, hr in hrs.items():
        lr = lrs.pop(stem, None) or lrs.pop(f"{stem}x{scale}", None)
        if lr is None:
            raise ImageError(f"{hr}: no {stem} or {stem}x{scale} in {folder / 'LR'}")
        pairs.append(Pair(stem, hr, lr))
    for lr in lrs.values():
        raise ImageError(f"{lr}: no picture in {folder / 'HR'} matches it")
    return tuple(pairs)


def _by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in find_images(folder):
        if path.stem in files:
            raise ImageError(f"{path}: the name {path.stem} is taken by {files[path.stem]}")
        files[path.stem] = path
    return files

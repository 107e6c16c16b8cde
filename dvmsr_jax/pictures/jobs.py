"""Upscales many pictures: finds the inputs, names the results, and reports on each."""

import contextlib
import functools
import glob
import itertools
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from dvmsr_jax import files, images
from dvmsr_jax.cluster import Stopped, TooLargeError
from dvmsr_jax.errors import (
    DiskFullError,
    UserError,
    is_disk_full,
    is_out_of_memory,
    printable,
)
from dvmsr_jax.pictures import formats, places, reading
from dvmsr_jax.pictures.places import Place, Remote, place
from dvmsr_jax.pictures.reading import BandedFrame, Picture
from dvmsr_jax.pictures.upscaler import PictureUpscaler

log = logging.getLogger(__name__)

STANDARD = Path("-")
"""Standard input as a source, standard output as a target."""

_LINE_EVERY = 60.0
"""Seconds between lines of progress."""

SKIPPED_SHOWN = 3
"""Largest number of skipped pictures that a summary names."""

# Stem of an upscaled picture; its first group is the stem of the original.
_RESULT = re.compile(r"(.+)_x\d+(\.\d+)?", re.DOTALL)


class Outcome(NamedTuple):
    """The outcome for one picture."""

    source: Place
    status: Literal["done", "skipped", "failed"]
    what: str
    """The result's path if it is done, otherwise the reason."""
    megapixels: float = 0.0
    """Pixels of the source that were upscaled, in millions."""


@dataclass(frozen=True)
class Job:
    """A picture to upscale."""

    source: Place
    target: Place
    suffix: str | None
    """Suffix to add to the target; None or formats.SAME: see `formats.choose_suffix`."""


def plan(
    inputs: Sequence[str], output: str | None, *, scale: float, suffix: str | None
) -> list[Job | Outcome]:
    """Finds the pictures that the inputs refer to, and decides where each result goes.

    Args:
        inputs: files; folders of pictures; patterns; "-" for standard input. The first three may be
            URLs (see `places`), as may the output.
        output: a file; a folder, which gets the same subfolders as the inputs; "-" for standard
            output. None: the folder of each input, and "-" for "-".
        scale: enlargement factor, which is part of the results' names.
        suffix: suffix of the results. None: that of the output or, if it has none, the default for
            the picture. formats.SAME: that of the picture (see `formats.choose_suffix`).

    A result is named STEM_xSCALE, or STEM_SUFFIX_xSCALE if another picture in the same folder, or
    another input for the same output folder, has the same stem. The name therefore does not depend
    on which of them are among the inputs. If two results would still have the same name, the second
    input fails.

    Pictures found in a folder or by a pattern are skipped if, by name, they are results of other
    inputs. Pictures named explicitly are skipped if another input's result would have that name,
    because the shell may have expanded a pattern.

    Returns:
        A job for each picture to upscale, and an outcome for each that is skipped or has failed.

    Raises:
        UserError: the output is a file and there is more than one input, or its suffix is unknown
            or contradicts `suffix`.
    """
    file, folder = _read_output(output, suffix)
    jobs: list[Job | Outcome] = []
    found: dict[str, tuple[Place, PurePath]] = {}

    def fail(path: Place, error: UserError) -> None:
        jobs.append(Outcome(path, "failed", printable(error).removeprefix(f"{printable(path)}: ")))

    unusable = 0
    named_files: list[tuple[Place, PurePath]] = []
    for name in inputs:
        try:
            named_files.extend(_find(name, leave_out=folder, fail=fail))
        except UserError as error:
            fail(place(name), error)
            unusable += 1
    # Files before links, so that results are named after files, not after links to them.
    named_files.sort(
        key=lambda file: (
            isinstance(file[0], Path) and places.real(file[0]) != os.path.abspath(file[0])
        )
    )
    for path, inner in named_files:
        first, _ = found.setdefault(places.real(path), (path, inner))
        if first != path:
            jobs.append(Outcome(path, "skipped", f"is {first}"))
    if file is not None and len(found) + unusable > 1:
        remedy = "name a folder" if file == STANDARD else f"end a folder's name in {os.sep}"
        raise UserError(f"{file} is one file for several results; {remedy}")

    folders = {
        path: path.parent if folder is None else folder / inner for path, inner in found.values()
    }
    # Some file systems do not distinguish upper and lower case.
    namesakes = Counter(str(parent / path.stem).casefold() for path, parent in folders.items())
    beside = functools.cache(_names_by_stem)

    def has_namesake(path: Place) -> bool:
        return any(
            name.casefold() != path.name.casefold()
            for name in beside(path.parent)[path.stem.casefold()]
        )

    targets: dict[Place, Place] = {}
    for path, parent in folders.items():
        alone = namesakes[str(parent / path.stem).casefold()] == 1 and not has_namesake(path)
        stem = path.stem if alone else _long_stem(path)
        targets[path] = parent / f"{stem}_x{scale:g}"
    originals = {path.with_name(stem) for path in folders for stem in (path.stem, _long_stem(path))}
    named = {places.real(place(name)) for name in inputs}
    results = {places.real(target) for target in targets.values()}

    def is_result(path: Place) -> bool:
        name = _RESULT.fullmatch(path.stem)
        if name is None or path.with_name(name[1]) not in originals:
            return False
        real = places.real(path)
        return real not in named or os.path.splitext(real)[0] in results

    taken: dict[Place, Place] = {}
    for path, target in targets.items():
        if file is not None:
            jobs.append(Job(path, file, suffix if file == STANDARD else ""))
        elif path == STANDARD and folder is None:
            jobs.append(Job(path, STANDARD, suffix))
        elif is_result(path):
            jobs.append(Outcome(path, "skipped", "by name the result of another input"))
        elif (other := taken.setdefault(target, path)) != path:
            why = f"its result would have the name of {other}'s: choose another --output for it"
            jobs.append(Outcome(path, "failed", why))
        elif places.is_read_only(target):
            why = f"{target} cannot be written: choose another --output"
            jobs.append(Outcome(path, "failed", why))
        else:
            jobs.append(Job(path, target, suffix))
    return jobs


def run(
    jobs: Sequence[Job | Outcome],
    upscaler: PictureUpscaler,
    *,
    keep: Sequence[str] = (),
    overwrite: bool = False,
    quality: formats.Quality = None,
    max_pixels: int = reading.MAX_PIXELS,
) -> Generator[Outcome, None, None]:
    """Runs the jobs one after the other, and yields their outcomes.

    Args:
        jobs: from `plan`.
        upscaler: see `Runner`, as for the other arguments.
    """
    runner = Runner(
        upscaler,
        sources=[job.source for job in jobs if isinstance(job, Job)],
        keep=keep,
        overwrite=overwrite,
        quality=quality,
        max_pixels=max_pixels,
    )
    for job in jobs:
        yield job if isinstance(job, Outcome) else runner(job)


class Runner:
    """Runs jobs.

    A result appears under its name only when it is complete. Sources, results of earlier jobs and
    files in `keep` are never overwritten, and other existing files only with `overwrite`. The
    progress of large pictures is shown on stderr if that is a terminal.
    """

    def __init__(
        self,
        upscaler: PictureUpscaler,
        *,
        sources: Iterable[Place],
        keep: Iterable[str] = (),
        overwrite: bool = False,
        quality: formats.Quality = None,
        max_pixels: int = reading.MAX_PIXELS,
        stopped: Stopped = lambda: False,
    ):
        """
        Args:
            upscaler: enlarges the pictures.
            sources: the sources of all jobs.
            keep: further files that must not be overwritten, such as all inputs of the command.
                Without `overwrite`, one of them that has the name of a result is assumed to be an
                earlier result that a shell's pattern matched.
            overwrite: replace existing results instead of skipping them.
            quality: of JPEG and WebP (see `formats.write`).
            max_pixels: limit on a picture's size, against decompression bombs (see `Picture`).
            stopped: asked before each band.
        """
        self._upscaler, self._overwrite = upscaler, overwrite
        self._quality, self._max_pixels, self._stopped = quality, max_pixels, stopped
        self._kept = {places.identity(source): "an input" for source in sources}
        self._named = {places.identity(place(name)) for name in keep}

    def __call__(self, job: Job, memory: float = math.inf) -> Outcome:
        """Runs a job.

        Raises:
            DiskFullError: there is no room for the picture or its result.
            TooLargeError: the picture needs more than `memory` bytes, besides the upscaler's own.
            KeyboardInterrupt: the work is to be abandoned.
        """
        try:
            outcome = self._do(job, memory)
        except (DiskFullError, TooLargeError):
            raise
        except UserError as error:
            name = "standard input" if job.source == STANDARD else job.source
            why = printable(error).removeprefix(f"{printable(name)}: ")
            return Outcome(job.source, "failed", why)
        except Exception as error:
            why = _OUT_OF_MEMORY if is_out_of_memory(error) else _unexpected(error)
            return Outcome(job.source, "failed", why)
        if outcome.status == "done":
            self._kept[places.identity(place(outcome.what))] = f"the result of {job.source}"
        return outcome

    def _do(self, job: Job, memory: float) -> Outcome:
        if job.source == STANDARD:
            return self._upscale(job, sys.stdin.buffer.read(), memory)
        known = job.suffix != formats.SAME and not self._overwrite
        if isinstance(job.source, Remote) and known:
            # Before the download. Other suffixes than these depend on the picture.
            likely = job.target.name + (".png" if job.suffix is None else job.suffix)
            if places.exists(there := job.target.with_name(likely)):
                return Outcome(job.source, "skipped", f"{there} exists (see --overwrite)")
        with places.local(job.source) as path:
            return self._upscale(job, path, memory)

    def _upscale(self, job: Job, source: Path | bytes, memory: float) -> Outcome:
        picture = Picture(source, max_pixels=self._max_pixels)
        suffix = formats.choose_suffix(picture, job.suffix)
        form = formats.BY_SUFFIX[(suffix or job.target.suffix).lower()]
        target = job.target
        if target != STANDARD:
            target = target.with_name(target.name + suffix)
            if isinstance(target, Path) and os.path.isdir(target):
                raise UserError(f"the result {target} would replace a folder")
            if places.exists(target):
                there = places.identity(target)
                if there in self._kept:
                    raise UserError(f"would overwrite {target}, {self._kept[there]}")
                if not self._overwrite:
                    return Outcome(job.source, "skipped", f"{target} exists (see --overwrite)")
                if there in self._named:
                    raise UserError(f"would overwrite {target}, which is named as an input too")
        formats.check_holds(form, picture, self._quality)
        if (needed := _memory(picture, form, self._upscaler)) > memory:
            raise TooLargeError(needed)
        label = printable(job.source)[-40:]
        frames = (
            _computed(self._upscaler.enlarge(frame), label, self._stopped)
            for frame in picture.frames()
        )
        name = "standard output" if target == STANDARD else target
        scale, quality = self._upscaler.scale, self._quality
        try:
            with _destination(target) as path:
                formats.write(path, form, frames, picture, scale=scale, quality=quality)
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError(
                    f"{name}: {error.strerror}. Free some space, or choose another --output; then"
                    " run the same command again to resume"
                ) from error
            raise UserError(f"{name} cannot be written ({error.strerror or error})") from error
        return Outcome(job.source, "done", str(target), picture.pixels / 1e6)


# Upper limits of bytes, measured with noise of all kinds: of a small picture; of a pixel of the
# result, for formats in which it is held whole; and of one that is averaged over the symmetries.
_SMALL = 64 * 2**20
_HELD, _HELD_IN = 8, {formats.WEBP: 40, formats.GIF: 20}
_AVERAGED = 136


def _memory(picture: Picture, form: formats.Format, upscaler: PictureUpscaler) -> int:
    """Bytes that upscaling the picture needs at most, approximately, besides the upscaler's own."""
    result = math.ceil(picture.pixels * upscaler.scale**2)
    needed = _SMALL + 4 * picture.most_bytes
    if form not in (formats.PNG, formats.TIFF):  # which are written band by band
        needed += result * _HELD_IN.get(form, _HELD)
    return needed + result * _AVERAGED * upscaler.holds_result


def _unexpected(error: Exception) -> str:
    log.debug("unexpected", exc_info=error)
    return f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Counts the pictures that are done, skipped and failed, and gives the reasons."""
    lines: dict[str, list[str]] = {"done": [], "skipped": [], "failed": []}
    for one in outcomes:
        lines[one.status].append(printable(f"  {one.status}: {one.source}: {one.what}"))
    shown = lines["failed"] + lines["skipped"][:SKIPPED_SHOWN]
    if (more := len(lines["skipped"]) - SKIPPED_SHOWN) > 0:
        shown.append(f"  skipped: {more} more")
    return "\n".join(
        [", ".join(f"{len(those)} {status}" for status, those in lines.items()), *shown]
    )


def report(outcomes: Sequence[Outcome], *, finished: bool) -> dict[str, Any]:
    """What `summary` says, for JSON, with all pictures.

    `finished` tells whether the run came to its end.
    """
    count = Counter(outcome.status for outcome in outcomes)
    return {
        "finished": finished,
        **{status: count[status] for status in ("done", "skipped", "failed")},
        "megapixels": sum(outcome.megapixels for outcome in outcomes),
        "pictures": [
            {"source": str(one.source), "status": one.status, "what": one.what} for one in outcomes
        ],
    }


def shown(results: Iterable[Outcome], total: int, *, silent: bool = False) -> Iterator[Outcome]:
    """Yields the outcomes, with a progress bar on stderr: pictures, megapixels and failures.

    If stderr is no terminal, a line in its place appears every minute.
    """
    megapixels, failed = 0.0, 0
    began = told = time.monotonic()
    terminal = sys.stderr.isatty()
    with tqdm(total=total, unit="picture", disable=silent or not terminal) as bar:
        for count, outcome in enumerate(results, 1):
            megapixels += outcome.megapixels
            failed += outcome.status == "failed"
            now = time.monotonic()
            rate = megapixels / max(now - began, 1e-9)
            counts = f"{megapixels:.1f} MP, {rate:.2f} MP/s, {failed} failed"
            bar.set_postfix_str(counts, False)
            bar.update()
            yield outcome
            if not (silent or terminal) and now - told >= _LINE_EVERY:
                told = now
                line = tqdm.format_meter(
                    count, total, now - began, ncols=0, unit="picture", postfix=counts
                )
                print(line.strip(), file=sys.stderr)


_OUT_OF_MEMORY = (
    "out of memory. Try --format png or tiff, which are written band by band; leave out"
    " --self-ensemble; or try --tile 128"
)


def _read_output(output: str | None, suffix: str | None) -> tuple[Place | None, Place | None]:
    """Returns (file, folder), of which at most one is not None."""
    if output is None:
        return None, None
    path = place(output)
    if path == STANDARD:
        return path, None
    if places.is_read_only(path):
        raise UserError(f"{output}: {path.parts[0]} can only be read")
    # The first also finds out whether a remote place answers.
    if places.is_folder(output) or output.endswith(("/", os.sep)) or not path.suffix:
        return None, path
    form = formats.BY_SUFFIX.get(path.suffix.lower())
    if form is None:
        raise UserError(
            f"{output}: pictures are written as {' '.join(formats.BY_SUFFIX)}; end a folder's name"
            f" in {os.sep}"
        )
    if suffix == formats.SAME:
        raise UserError(f"{output}: --format same requires a folder as --output")
    if suffix is not None and form is not formats.BY_SUFFIX[suffix]:
        raise UserError(f"{output}: --format asks for {suffix}")
    return path, None


def _find(
    name: str, leave_out: Place | None, fail: Callable[[Place, UserError], None]
) -> Iterator[tuple[Place, PurePath]]:
    """Yields the files that a name refers to, each with its folder relative to that name.

    Calls `fail` for subfolders that cannot be read.
    """
    path = place(name)
    found: list[Place]
    if not name:
        raise UserError("an empty name")
    if places.is_folder(name):
        root = path
        if isinstance(path, Path):
            found = [*images.find_images(path, reading.SUFFIXES, on_error=fail)]
        else:
            found = _readable(places.files_in(path), fail)
        if not found:
            raise UserError(f"{name}: no pictures")
    elif _PATTERN.search(str(path)) and not places.exists(path):
        fixed = itertools.takewhile(lambda part: not _PATTERN.search(part), path.parts)
        if isinstance(path, Path):
            root = Path(*fixed)
            matches = map(Path, glob.glob(name, recursive=True))
            found = _readable(sorted(file for file in matches if not os.path.isdir(file)), fail)
        else:
            root = Remote(*fixed)
            found = _readable(places.matching(path, root), fail)
        if not found:
            raise UserError(f"{name}: matches no picture")
    else:
        yield path, PurePath()
        return
    # The output folder holds earlier results, unless it is an input itself.
    out = leave_out and place(places.real(leave_out))
    real_root = place(places.real(root))
    inside = out is not None and out not in (real_root, *real_root.parents)
    for file in found:
        folder = place(places.real(file.parent))
        if not (inside and out in (folder, *folder.parents)):
            yield file, file.parent.relative_to(root)


_PATTERN = re.compile(r"[*?[]")


def _readable(found: Iterable[Place], fail: Callable[[Place, UserError], None]) -> list[Place]:
    """The files that are pictures by their suffix. Calls `fail` for those of a kind not read."""
    readable = []
    for file in found:
        try:
            reading.check_is_read(file)
        except UserError as error:
            fail(file, error)
        if file.suffix.lower() in reading.SUFFIXES:
            readable.append(file)
    return readable


def _names_by_stem(folder: Place) -> Mapping[str, list[str]]:
    """The names of the pictures in a folder, by case-folded stem.

    Results of other pictures are left out. Otherwise, a second run of a command could choose other
    names because of the first run's results.
    """
    names = [
        path
        for path in map(PurePath, places.names_in(folder))
        if path.suffix.lower() in reading.SUFFIXES and not path.name.startswith(".")
    ]
    stems = {stem for path in names for stem in (path.stem, _long_stem(path))}
    found: dict[str, list[str]] = defaultdict(list)
    for path in names:
        result = _RESULT.fullmatch(path.stem)
        if result is None or result[1] not in stems:
            found[path.stem.casefold()].append(path.name)
    return found


def _long_stem(path: PurePath) -> str:
    """photo_jpg for photo.jpg."""
    return path.stem + path.suffix.replace(".", "_")


@contextlib.contextmanager
def _destination(target: Place) -> Iterator[Path]:
    """Yields a path to write to; the file becomes the target only when it is complete."""
    if isinstance(target, Path) and target != STANDARD:
        with files.replacing(target) as path:
            yield path
        return
    with tempfile.TemporaryDirectory(prefix="dvmsr-") as folder:
        path = Path(folder) / "picture"
        try:
            yield path
        except OSError as error:
            if not is_disk_full(error):
                raise
            name = "standard output" if target == STANDARD else target
            raise DiskFullError(
                f"{folder}: {error.strerror}. Pictures for {name} are first written there: free"
                " some space, or set TMPDIR to another folder"
            ) from error
        if isinstance(target, Remote):
            places.send(path, target)
            return
        with open(path, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _computed(frame: BandedFrame, label: str, stopped: Stopped) -> BandedFrame:
    """Shows the progress, and tells errors in computing from errors in writing.

    Raises KeyboardInterrupt if `stopped`.
    """

    def bands() -> Iterator[reading.Pixels]:
        rows = frame.shape[0]
        with tqdm(total=rows, desc=label, unit="row", leave=False, delay=2, disable=None) as bar:
            try:
                for band in frame.bands:
                    if stopped():
                        raise KeyboardInterrupt
                    yield band
                    bar.update(len(band))
            except OSError as error:
                raise UserError(_unexpected(error)) from error

    return replace(frame, bands=bands())

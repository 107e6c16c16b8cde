"""Self-describing checkpoints: Orbax directories that contain their configuration.

A run's checkpoints are in WORKDIR/PHASE/checkpoints/STEP, each with the items

    config  the TrainConfig, as JSON, "sources" (identifiers of the data, the teacher and the
            initial weights), and "lineage" (how the initial weights were made)
    best    the best validation so far, as JSON
    ema     the averaged weights, by name, for evaluation, export and distillation
    state   the weights being trained and the optimizer's state, for resuming

and CHECKSUMS of their files, which are verified before anything is read. Checkpoints of older
versions have no checksums.

Several processes save and restore together, in a folder that all of them can access.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from dvmsr_jax import files, parallel
from dvmsr_jax.config import Effect, NetworkConfig, TrainConfig, effects
from dvmsr_jax.errors import UserError, is_out_of_memory
from dvmsr_jax.model import Weights, check_finite, read_config

_EFFECTS = effects(TrainConfig())
# Besides the weights and the scale, validation scores depend on these: scores from before and after
# a change of one cannot be compared.
_VALIDATED_ON = ("sources.data", "data.degradation", "compute.precision")
_ITEMS = ("config", "best", "ema", "state")
# File in a checkpoint's folder: the SHA-256 of each of its items' files, by path, as JSON.
CHECKSUMS = "checksums.json"
# Limit on a file in a checkpoint; Orbax writes files of 2 GiB at most.
_MAX_FILE_BYTES = 2**32


class CheckpointError(UserError):
    """A checkpoint cannot be found, read, written or resumed from; the message names it."""


class UnreadableError(CheckpointError):
    """A checkpoint is damaged."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: cannot be read ({reason})")
        self.path = path


class Best(NamedTuple):
    """The best validation; step 0 stands for none yet."""

    step: int = 0
    psnr_y: float = -1.0

    @classmethod
    def from_json(cls, stored: Any) -> "Best":
        """The inverse of `_asdict`. Raises ValueError if `stored` is something else."""
        match stored:
            case {"step": int(step), "psnr_y": int(psnr_y) | float(psnr_y), **rest}:
                if not rest and step >= 0 and not math.isnan(psnr_y):
                    return cls(step, float(psnr_y))
        raise ValueError(f"not a validation: {stored}")


class Restored(NamedTuple):
    """The contents of a checkpoint that a run resumes from."""

    step: int
    best: Best
    ema: Any
    state: Any


class Checkpoints:
    """The checkpoints of one phase of a run: the newest ones and the best by validation."""

    def __init__(
        self,
        config: TrainConfig,
        sources: Mapping[str, str | None] | None = None,
        *,
        lineage: Sequence[Mapping[str, Any]] = (),
        allow_changes: bool = False,
        describe_data: Callable[[str], str] = lambda identity: "",
    ):
        """A run resumes only with the configuration and the `sources` in its checkpoint.

        `sources` identifies the data, the teacher and the initial weights. `lineage` describes the
        initial weights and their predecessors, oldest first; it is recorded but not compared.
        `allow_changes` lets configuration and sources differ, except for fields that determine the
        shapes of the weights. `describe_data` returns how the data differ from those of another
        "data" source, for the messages.
        """
        self.config = config
        self._description = to_json(config) | {"sources": dict(sources or {})}
        self._lineage = {"lineage": list(lineage)} if lineage else {}
        self._allow_changes = allow_changes
        self._describe_data = describe_data
        self.directory = phase_directory(config) / "checkpoints"
        self._keep_best = _KeepBest()
        self._saving: int | None = None
        policies = [ocp.checkpoint_managers.LatestN(config.keep_checkpoints), self._keep_best]
        self._manager = ocp.CheckpointManager(
            self.directory.absolute(),
            item_names=_ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,  # left by a run that was killed while writing
                lightweight_initialize=True,  # reads no files, which may be damaged
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._write_checksums
                ),
            ),
        )

    def save(self, step: int, best: Best, ema: dict[str, jax.Array], state: Any) -> None:
        """Writes a checkpoint in the background; an incomplete one is never left behind.

        Raises:
            CheckpointError: this checkpoint or the previous one cannot be written.
        """
        self._keep_best.step = best.step
        with self._writing():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    config=ocp.args.JsonSave(self._description | self._lineage),
                    best=ocp.args.JsonSave(best._asdict()),
                    ema=ocp.args.StandardSave(ema),
                    state=ocp.args.StandardSave(state),
                ),
            )

    def restore(self, ema: dict[str, jax.Array], state: Any) -> Restored | None:
        """The newest checkpoint, with the structure and devices of the arguments.

        Returns None if there are no checkpoints. A damaged one is renamed to STEP.damaged, with a
        warning, and the one before it is used.

        Raises:
            CheckpointError: its configuration differs from this run's, in which case the message
                lists the differences; or none of the checkpoints can be read.
        """
        failures: list[UnreadableError] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self.directory / str(step)
            failure: UnreadableError | None = None
            try:
                with _reading(path, _ITEMS):
                    config = _read_json(path, "config")
                    best = Best.from_json(_read_json(path, "best"))
                changed = self._check_same(config, path)
                with _reading(path):
                    ema, state = _restore(path / "ema", ema), _restore(path / "state", state)
                    check_finite(ema)
                    check_finite(state)
            except UnreadableError as error:
                failure = error
            if not parallel.everywhere(failure is None):
                failures.append(failure or UnreadableError(path, "by another process"))
                continue
            for failure in failures:
                self._put_aside(failure, path)
            self._manager.reload()
            if best.step and not changed.isdisjoint(_VALIDATED_ON):
                parallel.say(
                    f"the best validation so far, {best.psnr_y:.2f} dB at step {best.step}, no "
                    "longer counts: its data, degradation or precision were different",
                    file=sys.stderr,
                )
                best = Best()
            return Restored(step, best, ema, state)
        if failures:
            raise failures[0]
        return None

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        with contextlib.suppress(Exception):  # an earlier one is still there
            self._manager.wait_until_finished()
        self._manager.reload()
        step = self._manager.latest_step()
        return None if step is None else self.directory / str(step)

    def close(self) -> None:
        """Waits until the last checkpoint is written and releases the directory."""
        with self._writing():
            self._manager.wait_until_finished()
        self._manager.close()

    def _write_checksums(self) -> None:
        """Called in the first process's writing thread, before the checkpoint gets its name."""
        (folder,) = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        checksums = {
            path.relative_to(folder).as_posix(): files.checksum(path)
            for path in _files(folder, _ITEMS)
        }
        files.write_json(folder / CHECKSUMS, checksums)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind, from the writing thread
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.directory} ({reason}); the last good one "
                f"is {self.newest() or 'not written yet'}. Once this is fixed, the same command "
                "resumes from there."
            ) from error

    def _check_same(self, stored: dict[str, Any], path: Path) -> set[str]:
        """The fields that differ. Raises CheckpointError if they must not."""
        current = flat(self._description)
        # A field that an older version did not have behaved as its default does now.
        defaults = to_json(TrainConfig(model=type(self.config.model)())) | {
            "sources": self._description["sources"] | {"init": None}
        }
        stored = flat(defaults) | flat(stored)
        stored.pop("lineage", None)
        differing = [
            name
            for name in sorted(stored.keys() | current.keys())
            if stored.get(name) != current.get(name)
        ]
        if not differing:
            return set()
        lines = "\n".join(f"  {n}: {stored.get(n)} there, {current.get(n)} now" for n in differing)
        if "sources.data" in differing and stored.get("sources.data") is not None:
            lines += f"\n  ({self._describe_data(stored['sources.data'])})"
        fields = effects(self.config)
        shaping = {name for name, effect in fields.items() if effect is Effect.SHAPES}
        if self.config.distill.level == "mid":
            shaping.add("sources.teacher")
        fixed = not shaping.isdisjoint(differing)
        if fixed or not self._allow_changes:
            remedy = "" if fixed else ", or resume regardless with --allow-changes"
            raise CheckpointError(
                f"{path} was made with another configuration:\n{lines}\n"
                f"Use the same configuration, or another --workdir{remedy}."
            )
        parallel.say(f"resuming from {path} with another configuration:\n{lines}", sys.stderr)
        return set(differing)

    def _put_aside(self, failure: "UnreadableError", instead: Path) -> None:
        parallel.wait_for_all(f"put aside {failure.path}")
        if parallel.is_first():
            suffixes = itertools.chain([".damaged"], map(".damaged-{}".format, itertools.count(2)))
            names = (failure.path.with_name(failure.path.name + suffix) for suffix in suffixes)
            aside = next(path for path in names if not path.exists())
            failure.path.rename(aside)
            print(
                f"warning: {failure}; it is now {aside}; resuming from {instead}", file=sys.stderr
            )
        parallel.wait_for_all(f"put {failure.path} aside")


class _KeepBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint with the best validation."""

    step = 0

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def phase_directory(config: TrainConfig) -> Path:
    """The directory for everything that a phase writes."""
    return config.workdir.expanduser() / config.phase


def load_weights(path: Path) -> Weights:
    """The averaged weights in a run's newest checkpoint, or in a given one.

    Args:
        path: WORKDIR/PHASE, its `checkpoints`, or one STEP in there.

    Raises:
        CheckpointError: there is no readable checkpoint at `path`, or its weights are not finite.
    """
    step = find_step(path)
    with _reading(step, ("config", "ema")):
        config = read_config(_read_json(step, "config")["model"])
        parameters = read_arrays(step / "ema")
    try:
        return Weights.from_file(config, parameters)
    except ValueError as error:
        raise CheckpointError(f"{step}: {error}") from error


def load_config(path: Path) -> NetworkConfig:
    """The configuration of the weights that `load_weights` returns. It does not start JAX.

    Raises:
        CheckpointError: there is no readable checkpoint at `path`.
    """
    step = find_step(path)
    with _reading(step, ("config",)):
        return read_config(_read_json(step, "config")["model"])


def load_facts(path: Path) -> dict[str, Any]:
    """How the weights that `load_weights` returns were trained.

    Returns:
        The configuration, in JSON's types, and "step", the number of steps taken.

    Raises:
        CheckpointError: there is no readable checkpoint at `path`.
    """
    step = find_step(path)
    with _reading(step, ("config", "state")):
        # Not from the folder's name: a copy may have another.
        taken = int(read_arrays(step / "state", only=("step",))["step"])
        return {"step": taken, **_read_json(step, "config")}


def read_arrays(item: Path, only: Collection[str] = ()) -> Any:
    """An item of a checkpoint as NumPy arrays, regardless of the devices that it was saved from.

    With `only`, just the entries with these names are read.
    """
    item = item.absolute()
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(item).tree
        wanted = {name: tree[name] for name in only or tree}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        return reader.restore(
            item,
            args=ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True),
        )


def _read_json(step: Path, item: str) -> dict[str, Any]:
    with contextlib.closing(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(step.absolute() / item)


def _restore(item: Path, like: Any) -> Any:
    """An item of a checkpoint with the structure and devices of `like`."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(item.absolute(), args=ocp.args.StandardRestore(like))


def _files(step: Path, items: Sequence[str]) -> Iterator[Path]:
    """The files of these items. Raises OSError for devices, pipes and links to folders."""
    for item in items:
        for folder, folders, names in os.walk(step / item):
            for name in folders:
                if (Path(folder) / name).is_symlink():
                    raise OSError(f"{Path(folder) / name}: is a link to a folder")
            for name in names:
                path = Path(folder) / name
                files.regular_size(path, at_most=_MAX_FILE_BYTES)
                yield path


def _verify(step: Path, items: Sequence[str]) -> None:
    """Raises ValueError or OSError if the items' files are not those that were written."""
    found = {path.relative_to(step).as_posix(): path for path in _files(step, items)}
    if not (step / CHECKSUMS).exists():
        return
    files.regular_size(step / CHECKSUMS, at_most=_MAX_FILE_BYTES)
    expected = json.loads((step / CHECKSUMS).read_text())
    for name in sorted(found.keys() | expected.keys()):
        if name.split("/")[0] in items:
            if name not in expected:
                raise ValueError(f"{name} is not part of it")
            if name not in found:
                raise ValueError(f"{name} is missing")
            if files.checksum(found[name]) != expected[name]:
                raise ValueError(f"{name} is damaged: its checksum does not match")


@functools.cache
def _ignore_late_reads() -> None:
    """Silences TensorStore's reads that fail, or end, after another one has failed.

    Orbax has closed their event loop by then, and nobody waits for their results. They may end at
    any later time, in other threads.
    """
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            others(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(
        lambda record: "tensorstore_spec" not in record.getMessage()
    )


@contextlib.contextmanager
def _reading(step: Path, items: Sequence[str] = ()) -> Iterator[None]:
    """Verifies these items; an exception in the body becomes an UnreadableError."""
    _ignore_late_reads()
    try:
        _verify(step, items)
        yield
    except Exception as error:  # a damaged checkpoint can fail in any way
        if is_out_of_memory(error):
            raise
        # Without the kilobytes of options that TensorStore adds.
        reason = re.sub(
            r" \[(tensorstore_spec|source locations).*", "", " ".join(str(error).split())
        )
        raise UnreadableError(step, f"{type(error).__name__}: {reason}") from error


def find_step(path: Path) -> Path:
    """The checkpoint that `path` refers to, as for `load_weights`. Raises CheckpointError."""
    for folder in (path / "checkpoints", path):
        if folder.is_dir():
            if (folder / "ema").is_dir():
                return folder
            steps = [step for step in folder.iterdir() if step.name.isdigit()]
            if steps:
                return max(steps, key=lambda step: int(step.name))
    phases = sorted(child for child in path.glob("*") if (child / "checkpoints").is_dir())
    if phases:
        choices = " or ".join(map(str, phases))
        raise CheckpointError(f"{path}: holds the checkpoints of phases; pass {choices}")
    raise CheckpointError(f"{path}: holds no checkpoint")


def flat(description: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a description that affect the result, by names like "optim.schedule"."""
    fields: dict[str, Any] = {}
    for key, value in description.items():
        if isinstance(value, dict):
            fields |= flat(value, f"{prefix}{key}.")
        elif _EFFECTS.get(prefix + key) is not Effect.NOTHING:
            fields[prefix + key] = value
    return fields


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))

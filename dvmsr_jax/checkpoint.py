"""Self-describing checkpoints: Orbax directories that carry the configuration they were made with.

A run's checkpoints lie under WORKDIR/PHASE/checkpoints/STEP, each with the items

    config  the TrainConfig, as JSON, and "sources": what data and which teacher it was made from
    best    the best validation so far, as JSON
    ema     the averaged weights, by name: what evaluation, export and distillation read
    state   the weights being trained and the optimizer's state: what resuming reads besides

Several processes save and restore together, into a folder that all of them see.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from dvmsr_jax import parallel
from dvmsr_jax.config import Effect, ModelConfig, TrainConfig, effects
from dvmsr_jax.errors import UserError, is_out_of_memory

_EFFECTS = effects(TrainConfig)
# What the score of given weights depends on, besides the scale: validations before and after one of
# these changed cannot be compared.
_VALIDATED_ON = ("sources.data", "compute.precision")


class CheckpointError(UserError):
    """A checkpoint that cannot be found, read, written or continued; the message names it."""


class UnreadableError(CheckpointError):
    """A checkpoint that is damaged."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: cannot be read ({reason})")
        self.path = path


class Best(NamedTuple):
    """A validation: none yet at step 0."""

    step: int = 0
    psnr_y: float = -1.0

    @classmethod
    def from_json(cls, stored: Any) -> "Best":
        """What `_asdict` gave. Raises ValueError if this is something else."""
        match stored:
            case {"step": int(step), "psnr_y": int(psnr_y) | float(psnr_y), **rest}:
                if not rest and step >= 0 and not math.isnan(psnr_y):
                    return cls(step, float(psnr_y))
        raise ValueError(f"not a validation: {stored}")


class Restored(NamedTuple):
    """What a run goes on from."""

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
        allow_changes: bool = False,
    ):
        """`sources` names what the run is made from; a run made from others is not gone on with.

        With `allow_changes` it is all the same, and with another configuration, where possible.
        """
        self.config = config
        self._description = to_json(config) | {"sources": dict(sources or {})}
        self._allow_changes = allow_changes
        self.directory = phase_directory(config) / "checkpoints"
        self._keep_best = _KeepBest()
        policies = [ocp.checkpoint_managers.LatestN(config.keep_checkpoints), self._keep_best]
        self._manager = ocp.CheckpointManager(
            self.directory.absolute(),
            item_names=("config", "best", "ema", "state"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,  # of a run that was killed while it wrote one
                lightweight_initialize=True,  # reads no file that may be damaged
            ),
        )

    def save(self, step: int, best: Best, ema: dict[str, jax.Array], state: Any) -> None:
        """Writes in the background; a checkpoint is there whole or not at all.

        Raises:
            CheckpointError: this one or the one before cannot be written.
        """
        self._keep_best.step = best.step
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    config=ocp.args.JsonSave(self._description),
                    best=ocp.args.JsonSave(best._asdict()),
                    ema=ocp.args.StandardSave(ema),
                    state=ocp.args.StandardSave(state),
                ),
            )

    def restore(self, ema: dict[str, jax.Array], state: Any) -> Restored | None:
        """The newest checkpoint in the form of the arguments, and on their devices; None if none.

        One that cannot be read is passed over for the one before, with a warning, and put aside
        under the name STEP.damaged.

        Raises:
            CheckpointError: it was made with another configuration, and the message shows both;
                or none of them can be read.
        """
        failures: list[UnreadableError] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self.directory / str(step)
            failure: UnreadableError | None = None
            try:
                with _reading(path):
                    args = ocp.args.Composite(
                        config=ocp.args.JsonRestore(), best=ocp.args.JsonRestore()
                    )
                    stored = self._manager.restore(step, args=args)
                    best = Best.from_json(stored["best"])
                changed = self._check_same(stored["config"], path)
                with _reading(path):
                    args = ocp.args.Composite(
                        ema=ocp.args.StandardRestore(ema), state=ocp.args.StandardRestore(state)
                    )
                    arrays = self._manager.restore(step, args=args)
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
                    "longer counts: it was on other data or in another precision",
                    file=sys.stderr,
                )
                best = Best()
            return Restored(step, best, arrays["ema"], arrays["state"])
        if failures:
            raise failures[0]
        return None

    def newest(self) -> Path | None:
        """The newest checkpoint that is completely written."""
        with contextlib.suppress(Exception):  # an earlier one is still there
            self._manager.wait_until_finished()
        self._manager.reload()
        step = self._manager.latest_step()
        return None if step is None else self.directory / str(step)

    def close(self) -> None:
        """Waits for the last one and releases the directory."""
        with self._writing():
            self._manager.wait_until_finished()
        self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # from the writing thread, as whatever it tripped over
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.directory} ({reason}); the last good one "
                f"is {self.newest() or 'not there yet'}. When that is mended, the same command "
                "goes on from there."
            ) from error

    def _check_same(self, stored: dict[str, Any], path: Path) -> set[str]:
        """The fields that differ. Raises CheckpointError if they must not."""
        current = flat(self._description)
        # A field that an older version did not have is as it was then: at its default.
        defaults = to_json(TrainConfig()) | {"sources": self._description["sources"]}
        stored = flat(defaults) | flat(stored)
        differing = [
            name
            for name in sorted(stored.keys() | current.keys())
            if stored.get(name) != current.get(name)
        ]
        if not differing:
            return set()
        lines = "\n".join(f"  {n}: {stored.get(n)} there, {current.get(n)} now" for n in differing)
        shaping = {name for name, effect in _EFFECTS.items() if effect is Effect.SHAPES}
        if self.config.distill.level == "mid":
            shaping.add("sources.teacher")
        fixed = not shaping.isdisjoint(differing)
        if fixed or not self._allow_changes:
            remedy = "" if fixed else ", or go on all the same with --allow-changes"
            raise CheckpointError(
                f"{path} was made with another configuration:\n{lines}\n"
                f"Use the same, or another --workdir{remedy}."
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
                f"warning: {failure}; it is now {aside}, going on from {instead}", file=sys.stderr
            )
        parallel.wait_for_all(f"put {failure.path} aside")


class _KeepBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of the best validation."""

    step = 0

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def phase_directory(config: TrainConfig) -> Path:
    """Where a phase keeps all it writes."""
    return config.workdir.expanduser() / config.phase


def load_weights(path: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Configuration and averaged weights of a run's newest checkpoint, or of a given one.

    Args:
        path: WORKDIR/PHASE, its `checkpoints`, or one STEP in there.

    Raises:
        CheckpointError: there is no readable checkpoint at `path`.
    """
    step = find_step(path).absolute()
    with _reading(step):
        config = ModelConfig(**ocp.JsonCheckpointHandler().restore(step / "config")["model"])
        return config, read_arrays(step / "ema")


def load_facts(path: Path) -> dict[str, Any]:
    """How the weights that `load_weights` gives were trained.

    Returns:
        "step", at which they were taken, and beside it the configuration, in JSON's types.

    Raises:
        CheckpointError: there is no readable checkpoint at `path`.
    """
    step = find_step(path).absolute()
    with _reading(step):
        return {"step": int(step.name), **ocp.JsonCheckpointHandler().restore(step / "config")}


def read_arrays(item: Path) -> Any:
    """An item of a checkpoint as NumPy arrays: the devices that they were on need not be here."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(item).tree
        )
        return reader.restore(item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


@contextlib.contextmanager
def _reading(step: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged checkpoint can fail in any way
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise UnreadableError(step, f"{type(error).__name__}: {reason}") from error


def find_step(path: Path) -> Path:
    """The checkpoint that `path` means, as for `load_weights`. Raises CheckpointError."""
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
    """The fields of a described run that its result depends on, by names like "optim.schedule"."""
    fields: dict[str, Any] = {}
    for key, value in description.items():
        if isinstance(value, dict):
            fields |= flat(value, f"{prefix}{key}.")
        elif _EFFECTS.get(prefix + key) is not Effect.NOTHING:
            fields[prefix + key] = value
    return fields


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration in JSON's types."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))

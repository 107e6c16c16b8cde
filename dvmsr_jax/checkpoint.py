"""Self-describing checkpoints: Orbax directories that carry the configuration they were made with.

A run's checkpoints lie under WORKDIR/PHASE/checkpoints/STEP, each with the items

    config  the TrainConfig, as JSON
    ema     the averaged weights, by name: what evaluation, export and distillation read
    state   the weights being trained and the optimizer's state: what resuming reads besides
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dvmsr_jax.config import ModelConfig, TrainConfig
from dvmsr_jax.errors import UserError

# Fields that may change between a run and its continuation, because they change no result.
FREE_FIELDS = frozenset(
    [
        "workdir",
        "compute.scan",
        "log_every",
        "val_every",
        "checkpoint_every",
        "keep_checkpoints",
        "data.data_dir",
        "data.workers",
        "distill.teacher",
    ]
)


class CheckpointError(UserError):
    """A checkpoint that cannot be found, read or continued; the message names it."""


class Checkpoints:
    """The checkpoints of one phase of a run."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.directory = phase_directory(config) / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory.absolute(),
            item_names=("config", "ema", "state"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_checkpoints, create=True, step_prefix=None
            ),
        )

    def save(self, step: int, ema: dict[str, jax.Array], state: Any) -> None:
        """Writes in the background; a checkpoint is there whole or not at all."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                config=ocp.args.JsonSave(to_json(self.config)),
                ema=ocp.args.StandardSave(ema),
                state=ocp.args.StandardSave(state),
            ),
        )

    def restore(self, ema: dict[str, jax.Array], state: Any) -> tuple[int, Any, Any] | None:
        """(step, ema, state) of the newest checkpoint in the form of the arguments; None if none.

        Raises:
            CheckpointError: it was made with another configuration, and the message shows both;
                or it is damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        path = self.directory / str(step)
        with _reading(path):
            args = ocp.args.Composite(config=ocp.args.JsonRestore())
            stored = self._manager.restore(step, args=args)["config"]
        _check_same(stored, to_json(self.config), path)
        with _reading(path):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    ema=ocp.args.StandardRestore(ema), state=ocp.args.StandardRestore(state)
                ),
            )
            return step, restored["ema"], restored["state"]

    def newest(self) -> Path | None:
        """The newest checkpoint that is completely written."""
        self._manager.wait_until_finished()
        step = self._manager.latest_step()
        return None if step is None else self.directory / str(step)

    def close(self) -> None:
        """Waits and releases the directory."""
        self._manager.close()


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
    step = _find_step(path).absolute()
    reader = ocp.PyTreeCheckpointHandler()
    with _reading(step), contextlib.closing(reader):
        config = ModelConfig(**ocp.JsonCheckpointHandler().restore(step / "config")["model"])
        # As NumPy arrays, because the devices that the weights were on need not be here.
        names = reader.metadata(step / "ema").tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        return config, reader.restore(step / "ema", args=args)


@contextlib.contextmanager
def _reading(step: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged checkpoint can fail in any way
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{step}: cannot be read ({type(error).__name__}: {reason})"
        ) from error


def _find_step(path: Path) -> Path:
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


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration in JSON's types."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _check_same(stored: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            elif prefix + key not in FREE_FIELDS:
                yield prefix + key, value

    stored, current = dict(flat(stored)), dict(flat(current))
    differing = [
        f"  {name}: {stored.get(name)} there, {current.get(name)} now"
        for name in sorted(stored.keys() | current.keys())
        if stored.get(name) != current.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{path} was made with another configuration:\n"
            + "\n".join(differing)
            + "\nUse the same, or another --workdir."
        )

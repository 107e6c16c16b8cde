"""The parts of a run: devices, data, teacher, initial state, training step and batches."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from dvmsr_jax import data, parallel
from dvmsr_jax.checkpoint import load_facts
from dvmsr_jax.config import TrainConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import Weights
from dvmsr_jax.pretrained import load_weights
from dvmsr_jax.training.initial import load_initial
from dvmsr_jax.training.step import TrainState, TrainStep, init_state
from dvmsr_jax.training.targets import Targets, load_targets
from dvmsr_jax.vimm import check_scan


class Run:
    """The parts of a phase. Those that take much time or memory are made only when needed."""

    def __init__(self, config: TrainConfig):
        """Raises UserError if the devices, data, teacher or initial weights cannot be used."""
        check_scan(config.compute)
        self.config = config
        self.mesh = parallel.make_mesh(config.data.batch_size, config.optim.accumulate)
        self.teacher = load_teacher(config)
        self.initial = load_initial(config)
        self.records = data.load_records(config.data, config.model.scale)

    def initial_state(self) -> TrainState:
        """The state before the first step, on the devices."""
        taken = {} if self.initial is None else self.initial.taken
        return parallel.replicate(init_state(self.config, self.teacher, taken), self.mesh)

    def make_step(self) -> TrainStep:
        """The training step. Raises UserError if precomputed targets are needed but missing."""
        return TrainStep(
            self.config, self.mesh, self.teacher, self._feed, random_start=self.start is None
        )

    def batches(self, start: int) -> Iterator[Any]:
        """The batches from step `start` to the end, on the devices. Raises as `make_step`."""
        inputs = self._feed.inputs(
            seed=self.config.seed,
            start=start,
            stop=self.config.steps,
            shard=(jax.process_index(), jax.process_count()),
        )
        return parallel.prefetch(inputs, self.mesh)

    @property
    def start(self) -> Weights | None:
        """The weights before the first step, if none of them are random."""
        if self.initial is None or self.initial.new:
            return None
        return Weights(self.config.model, dict(self.initial.taken))

    @property
    def devices(self) -> str:
        """Number and kind of the devices."""
        return f"{self.mesh.size} x {self.mesh.devices[0].device_kind}"

    @functools.cached_property
    def teacher_id(self) -> str | None:
        """See `Weights.identity`."""
        return None if self.teacher is None else self.teacher.identity()

    @functools.cached_property
    def _feed(self) -> data.Feed:
        return data.make_feed(
            self.records.train,
            self.config.data,
            scale=self.config.model.scale,
            targets=self._load_targets(),
        )

    def _load_targets(self) -> Targets | None:
        if self.teacher_id is None or self.config.distill.targets == "online":
            return None
        return load_targets(
            self.records.folder,
            self.teacher_id,
            self_ensemble=self.config.distill.self_ensemble,
            ckpt=teacher_path(self.config),
        )


def teacher_path(config: TrainConfig) -> Path:
    """The path of the teacher's weights for the student phase."""
    if config.distill.teacher is not None:
        return config.distill.teacher.expanduser()
    return config.workdir.expanduser() / "teacher"


def load_teacher(config: TrainConfig) -> Weights | None:
    """The frozen teacher of the student phase; None in the teacher phase.

    Raises:
        UserError: there is none, it is unfinished, or its scale is not the student's.
    """
    if config.phase == "teacher":
        return None
    path = teacher_path(config)
    if config.distill.teacher is None:
        if not (path / "checkpoints").is_dir():
            raise UserError(
                f"there is no teacher in {path}; run the teacher phase under the same --workdir, "
                "or pass a checkpoint with --distill.teacher PATH"
            )
        facts = load_facts(path)
        if (left := facts["steps"] - facts["step"]) > 0:
            raise UserError(
                f"the teacher in {path} has {left} steps left; finish it, or use it as it is "
                f"with --distill.teacher {path}"
            )
    teacher = load_weights(path)
    if teacher.config.scale != config.model.scale:
        raise UserError(
            f"{path} is a teacher for x{teacher.config.scale}, but the student is for "
            f"x{config.model.scale}"
        )
    return teacher

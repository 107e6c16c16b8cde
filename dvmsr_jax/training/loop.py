"""The training loop of both phases: steps, logs, validations, checkpoints, stop and resume."""

import contextlib
import functools
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from dvmsr_jax import data, files, parallel
from dvmsr_jax.checkpoint import Best, Checkpoints, phase_directory
from dvmsr_jax.config import TrainConfig
from dvmsr_jax.cost import cost
from dvmsr_jax.errors import StoppedError, UserError
from dvmsr_jax.model import Weights
from dvmsr_jax.training import report
from dvmsr_jax.training.run import Run
from dvmsr_jax.training.step import TrainState, memory_of
from dvmsr_jax.training.validation import Validator

# Steps before a profile starts, to compile the program and fill the queues.
BEFORE_PROFILE = 5


class TrainingError(UserError):
    """The run cannot continue; the message says why, and where to resume it from."""


def train(config: TrainConfig, *, profile: int = 0, allow_changes: bool = False) -> Path:
    """Runs a phase from its newest checkpoint, or from the start, to `config.steps`.

    SIGINT and SIGTERM, in any of the processes, end it after the current step, with a checkpoint. A
    trace of `profile` steps is written to the phase's directory. With `allow_changes`, the
    configuration, data, teacher and initial weights may differ from the checkpoint's, except for
    the shapes of the weights.

    Returns:
        The phase's directory, for `load_model`.

    Raises:
        StoppedError: a signal ended it.
        UserError: the configuration, the data or the teacher cannot be used, the loss is not
            finite, a checkpoint cannot be read or written, or another run writes to the directory.
    """
    run = Run(config)
    directory = phase_directory(config)
    sources = {
        "data": data.identity(run.records.folder),
        "teacher": run.teacher_id,
        "init": None if run.initial is None else run.initial.identity,
    }
    with (
        _sole_use(directory),
        _StopSignals() as stop,
        contextlib.closing(
            Checkpoints(
                config,
                sources,
                lineage=() if run.initial is None else run.initial.lineage,
                allow_changes=allow_changes,
                describe_data=functools.partial(data.describe_change, run.records.folder),
            )
        ) as checkpoints,
    ):
        state, best = run.initial_state(), Best()
        if (restored := checkpoints.restore(state.ema, state._replace(ema={}))) is not None:
            best, state = restored.best, restored.state._replace(ema=restored.ema)
        start = int(state.step)
        if start == 0 and run.initial is not None:
            parallel.say(f"starting from {run.initial}")
        parallel.say(
            f"{config.phase}: steps {start} to {config.steps}, on {run.devices}, in {directory}"
        )
        if start >= config.steps:
            return directory
        with contextlib.closing(_Trace(directory / "profile", start, profile)) as trace:
            step, best = _take_steps(run, state, best, checkpoints, stop, trace)
    if step < config.steps:
        raise StoppedError(f"stopped after step {step}; the same command resumes from there")
    if best.step < step:
        where = checkpoints.directory / str(best.step)
        parallel.say(f"the best validation was {best.psnr_y:.2f} dB at step {best.step}: {where}")
    return directory


def _take_steps(
    run: Run,
    state: TrainState,
    best: Best,
    checkpoints: Checkpoints,
    stop: "_StopSignals",
    trace: "_Trace",
) -> tuple[int, Best]:
    """Runs the loop; returns (the last step taken, the best validation)."""
    config, start = run.config, int(state.step)
    train_step = run.make_step()
    validate = Validator(config, run.records, run.teacher, run.start)
    log = report.Log(phase_directory(config), start) if parallel.is_first() else None
    batches = run.batches(start)
    recent = _Recent(start)
    stop_anywhere = parallel.AnyProcess(run.mesh)
    with (
        contextlib.closing(log) if log else contextlib.nullcontext(),
        tqdm(
            total=config.steps,
            initial=start,
            unit="step",
            desc=config.phase,
            disable=not parallel.is_first(),
        ) as bar,
    ):
        for step in range(start + 1, config.steps + 1):
            with recent.waiting():
                batch = next(batches)
            state, parts = train_step(state, batch)
            recent.add(parts)
            trace.step_done(step, state)
            bar.update()
            last = stop_anywhere(stop.requested) or step == config.steps
            validate_now = step == config.steps or step % config.val_every == 0
            save_now = last or validate_now or step % config.checkpoint_every == 0

            if save_now or step % config.log_every == 0:
                values = recent.means(checkpoints)
                bar.set_postfix(loss=f"{values['loss']:.4f}")
                if log:
                    log.scalars(step, values)
                recent.restart()
            if validate_now:
                psnr_y, sample = validate(Weights(config.model, state.ema))
                psnr_y = parallel.from_first(psnr_y)
                best = max(best, Best(step, psnr_y), key=lambda best: best.psnr_y)
                if log:
                    scores = {f"val_{n}_psnr_y": x for n, x in validate.fixed_scores.items()}
                    log.scalars(step, {"val_psnr_y": psnr_y, **scores})
                    log.sample(step, sample)
                    bar.write(validate.describe(step, psnr_y))
                recent.restart()
            if save_now:
                checkpoints.save(step, best, state.ema, state._replace(ema={}))
            if last:
                break
    return step, best


def dry_run(config: TrainConfig) -> None:
    """Builds everything, takes two steps, and prints the cost of the run. Writes nothing except
    the prepared data.

    Raises:
        UserError: as `train`.
    """
    run = Run(config)
    state, train_step, batch = run.initial_state(), run.make_step(), next(run.batches(0))
    memory = memory_of(train_step.compile(state, batch))
    seconds = []
    for _ in range(2):  # the first one warms up
        begin = time.perf_counter()
        state, parts = jax.block_until_ready(train_step(state, batch))
        seconds.append(time.perf_counter() - begin)
    crop, batch_size = config.data.lr_crop, config.data.batch_size
    macs = cost(config.model, crop, crop).macs
    days, hours = divmod(config.steps * seconds[1] / 3600, 24)
    parameters = sum(x.size for x in state.ema.values())
    parallel.say(
        f"{config.phase}: {parameters:,} parameters, {config.steps:,} steps of {batch_size} crops"
    )
    parallel.say(f"one crop's forward pass: {macs / 1e9:.3g} GMACs in convolutions and projections")
    parallel.say(f"memory per device: {memory / 2**20:,.1f} MiB, on {run.devices}")
    parallel.say(f"loss {float(parts['loss']):.4f}")
    parallel.say(
        f"{1 / seconds[1]:.3g} steps/s: {days:.0f} days and {hours:.1f} hours, without validation"
    )


class _Recent:
    """The metrics of the steps since the last line of the log, and their time."""

    def __init__(self, step: int):
        self._step = step
        self.restart()

    def restart(self) -> None:
        """Clears the metrics and restarts the clock."""
        self._pending: list[dict[str, Array]] = []  # not yet fetched from the device
        self._waited, self._begin = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def add(self, parts: dict[str, Array]) -> None:
        """Adds the metrics of a step."""
        self._pending.append(parts)
        self._step += 1

    def means(self, checkpoints: Checkpoints) -> dict[str, float]:
        """The means of the metrics, the steps per second, and the share of time spent waiting.

        Raises:
            TrainingError: a loss is not finite.
        """
        fetched = jax.device_get(self._pending)
        for i, parts in enumerate(fetched):
            for name, what in (("loss", "loss"), ("weight_norm", "norm of the weights")):
                if not np.isfinite(parts[name]):
                    step = self._step - len(fetched) + 1 + i
                    raise TrainingError(
                        f"the {what} is {parts[name]} at step {step}; "
                        f"the last good checkpoint is {checkpoints.newest() or 'not written yet'}. "
                        "A lower --optim.learning-rate or --optim.clip may help, together with "
                        "--allow-changes to resume from there."
                    )
        seconds = time.perf_counter() - self._begin
        means = {name: float(np.mean([parts[name] for parts in fetched])) for name in fetched[0]}
        means |= {"steps_per_second": len(fetched) / seconds, "data_wait": self._waited / seconds}
        return means


class _Trace:
    """Records some steps for TensorBoard and Perfetto."""

    def __init__(self, folder: Path, start: int, steps: int):
        self._folder, self._begin = folder, start + BEFORE_PROFILE
        self._end = self._begin + steps
        self._on, self._wanted = False, steps > 0

    def step_done(self, step: int, state: Any) -> None:
        """Call this after each step."""
        if step == self._begin < self._end and parallel.is_first():
            jax.block_until_ready(state)  # excludes earlier steps
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._on, self._wanted = True, False
        if step == self._end:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being recorded."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
            parallel.say(f"the profile is in {self._folder}")
        if self._wanted:
            parallel.say(f"no profile: the run ended before step {self._begin + 1}")
            self._wanted = False


@contextlib.contextmanager
def _sole_use(directory: Path) -> Iterator[None]:
    """Locks the directory, so that no other run writes to it."""
    if not parallel.is_first():
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        if files.lock(file, wait=False) is False:
            raise UserError(
                f"another run is writing to {directory}; stop it, or use another --workdir"
            )
        yield


class _StopSignals:
    """In its context, SIGINT and SIGTERM only set `requested`; a second signal ends the process."""

    def __enter__(self):
        self.requested = False
        self._previous = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _request(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("stopping after the current step; interrupt again to stop at once", file=sys.stderr)

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

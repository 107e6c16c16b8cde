"""The two training phases: state, loss, step, loop.

teacher: L1 to the HR pictures. student: that plus lambda times L1 to a frozen teacher, at the
output or at chosen RSSBs (arXiv 2405.03008, section 3.3). Both minimise with Adam under the paper's
schedule and average the weights; validation, export and distillation use the average.
"""

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array
from tqdm import tqdm

from dvmsr_jax import bicubic, data, images, losses, metrics, parallel, report
from dvmsr_jax.checkpoint import Checkpoints, phase_directory
from dvmsr_jax.config import ModelConfig, OptimConfig, TrainConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR, model_from_parameters, named_parameters
from dvmsr_jax.pretrained import load_model

# The paper halves the learning rate at 250, 400, 450 and 475 of 500 thousand steps.
HALVINGS = (0.5, 0.8, 0.9, 0.95)


class TrainingError(UserError):
    """The run cannot go on; the message says why and from where it can be taken up."""


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Array
    params: dict[str, dict[str, Array]]
    """"model" and, in mid-level distillation, "projections"; each by name."""
    opt_state: Any
    ema: dict[str, Array]
    """The averaged weights of the model."""


class Teacher(NamedTuple):
    """A frozen teacher."""

    config: ModelConfig
    parameters: dict[str, Array]


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate at each step of a run of `steps`."""
    warmup = round(config.warmup * steps)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1))
    else:
        halvings = {round(share * steps) - warmup: 0.5 for share in HALVINGS}
        main = optax.piecewise_constant_schedule(config.learning_rate, halvings)
    if not warmup:
        return main
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rise, main], [warmup])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Adam under the schedule, on gradients clipped by their global norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adam(learning_rate(config, steps), b1=config.b1, b2=config.b2),
    )


def rssb_pairs(config: TrainConfig, teacher: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Which RSSB's features are compared with which of the teacher's, in mid-level distillation."""
    if not config.distill.rssbs:
        ratio = teacher.rssbs / config.model.rssbs
        return tuple((i, round((i + 1) * ratio) - 1) for i in range(config.model.rssbs))
    for student_rssb, teacher_rssb in config.distill.rssbs:
        if not (0 <= student_rssb < config.model.rssbs and 0 <= teacher_rssb < teacher.rssbs):
            raise UserError(
                f"distill.rssbs names ({student_rssb}, {teacher_rssb}), but the student has "
                f"{config.model.rssbs} RSSBs and the teacher {teacher.rssbs}, counted from 0"
            )
    return config.distill.rssbs


def init_state(
    config: TrainConfig, optimizer: optax.GradientTransformation, teacher: Teacher | None
) -> TrainState:
    """The state before the first step."""

    @jax.jit  # to compile once rather than operation by operation
    def init():
        key = jax.random.key(config.seed)
        model = named_parameters(DVMSR(config.model, rngs=nnx.Rngs(key)))
        params = {"model": model, "projections": {}}
        if teacher is not None and config.distill.level == "mid":
            shape = (config.model.channels, teacher.config.channels)
            for i in range(len(rssb_pairs(config, teacher.config))):
                projection = nnx.initializers.lecun_normal()(jax.random.fold_in(key, i), shape)
                params["projections"][f"{i}"] = projection
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), model)

    return init()


def loss_function(
    config: TrainConfig,
    params: dict[str, dict[str, Array]],
    teacher: Teacher | None,
    lr: Array,
    hr: Array,
    keys: Array,
) -> tuple[Array, dict[str, Array]]:
    """(loss, its parts) on float batches of LR and HR crops in [0, 1], with a key for each."""
    model = model_from_parameters(config.model, params["model"], compute=config.compute)
    output, features = model.with_features(lr, keys=keys)
    pixel = losses.l1(output, hr)
    if teacher is None:
        return pixel, {"loss": pixel, "pixel_loss": pixel}

    teacher_model = model_from_parameters(
        teacher.config, teacher.parameters, compute=config.compute
    )
    target, target_features = jax.lax.stop_gradient(teacher_model.with_features(lr))
    if config.distill.level == "output":
        distillation = losses.l1(output, target)
    else:
        pairs = rssb_pairs(config, teacher.config)
        distillation = losses.mid_level(
            [features.rssbs[i] for i, _ in pairs],
            [target_features.rssbs[j] for _, j in pairs],
            [params["projections"][f"{i}"] for i in range(len(pairs))],
        )
    loss = pixel + config.distill.weight * distillation
    return loss, {"loss": loss, "pixel_loss": pixel, "distill_loss": distillation}


def make_train_step(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    teacher: Teacher | None,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """step(state, batch of uint8 {"lr", "hr"}) -> (state, metrics); donates the state.

    Loss and gradients are computed under `shard_map`, each device on its share of the batch, so
    that kernels which XLA cannot partition stay local; their means over the devices update the
    replicated parameters.
    """

    def gradients(params, teacher_parameters, step, batch):
        lr, hr = (batch[name].astype(jnp.float32) / 255 for name in ("lr", "hr"))
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        first = jax.lax.axis_index(parallel.AXIS) * len(lr)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(len(lr)))
        frozen = None if teacher is None else Teacher(teacher.config, teacher_parameters)

        def loss(params):
            return loss_function(config, params, frozen, lr, hr, keys)

        grads, parts = jax.grad(loss, has_aux=True)(params)
        return jax.lax.pmean((grads, parts), parallel.AXIS)

    replicated, sharded = PartitionSpec(), PartitionSpec(parallel.AXIS)
    gradients = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(replicated, replicated, replicated, sharded),
        out_specs=replicated,
        check_vma=False,  # the means above are explicit, and custom VJPs stay simple
    )
    schedule = learning_rate(config.optim, config.steps)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, teacher_parameters, batch):
        grads, parts = gradients(state.params, teacher_parameters, state.step, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early averages would remember the random start: let the memory grow with the run.
        t = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.optim.ema_decay, (1 + t) / (10 + t))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params["model"])
        parts |= {
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state, ema), parts

    # An argument rather than a constant, so that XLA does not fold 7 million weights into the code.
    teacher_parameters = parallel.replicate({} if teacher is None else teacher.parameters, mesh)
    return lambda state, batch: train_step(state, teacher_parameters, batch)


class Validator:
    """Scores weights on the pictures kept apart."""

    def __init__(self, config: TrainConfig, records: data.Records):
        self._scale = config.model.scale
        self._records = [records.val[i] for i in range(len(records.val))]

        @jax.jit
        def forward(parameters, lr):
            model = model_from_parameters(config.model, parameters, compute=config.compute)
            return model(lr.astype(jnp.float32) / 255)

        self._forward = forward
        self._bicubic = [bicubic.upscale(record["lr"], self._scale) for record in self._records]
        self.bicubic_psnr_y = self._mean_psnr_y(self._bicubic)

    def __call__(self, parameters: dict[str, Array]) -> tuple[float, np.ndarray]:
        """(mean PSNR-Y, a sample picture bicubic | ours | HR)."""
        results = [
            images.to_uint8(np.asarray(self._forward(parameters, record["lr"][None])[0]))
            for record in self._records
        ]
        panels = {"bicubic": self._bicubic[0], "ours": results[0], "HR": self._records[0]["hr"]}
        return self._mean_psnr_y(results), report.side_by_side(panels)

    def _mean_psnr_y(self, results: list[np.ndarray]) -> float:
        pairs = zip(results, self._records, strict=True)
        return float(np.mean([metrics.psnr_y(sr, r["hr"], self._scale) for sr, r in pairs]))


def train(config: TrainConfig) -> Path:
    """Runs a phase from its newest checkpoint, or from the start, to `config.steps`.

    SIGINT and SIGTERM end it after the step under way, with a checkpoint.

    Returns:
        The phase's directory, which `load_model` takes.

    Raises:
        UserError: the configuration, the data or the teacher cannot be used, or the loss is not
            finite.
    """
    directory = phase_directory(config)
    mesh = parallel.make_mesh(config.data.batch_size)
    teacher = load_teacher(config) if config.phase == "student" else None
    optimizer = make_optimizer(config.optim, config.steps)
    state = init_state(config, optimizer, teacher)
    checkpoints = Checkpoints(config)
    if (restored := checkpoints.restore(state.ema, state._replace(ema={}))) is not None:
        _, ema, rest = restored
        state = rest._replace(ema=ema)
    start = int(state.step)
    print(f"{config.phase}: steps {start} to {config.steps}, in {directory}")
    if start >= config.steps:
        checkpoints.close()
        return directory

    records = data.load_records(config.data, config.model.scale)
    state = parallel.replicate(state, mesh)
    step_function = make_train_step(config, optimizer, mesh, teacher)
    validate = Validator(config, records)
    log = report.Log(directory, start)
    batches = data.batches(
        records.train,
        config.data,
        scale=config.model.scale,
        seed=config.seed,
        start=start,
        stop=config.steps,
    )

    pending: list[dict[str, Array]] = []  # metrics not yet fetched from the device
    with (
        _StopSignals() as stop,
        tqdm(total=config.steps, initial=start, unit="step", desc=config.phase) as bar,
    ):
        for step in range(start + 1, config.steps + 1):
            state, parts = step_function(state, parallel.shard_batch(next(batches), mesh))
            pending.append(parts)
            bar.update()
            last = step == config.steps or stop.requested
            log_now = last or step % config.log_every == 0
            save_now = last or step % config.checkpoint_every == 0
            validate_now = step == config.steps or step % config.val_every == 0

            if log_now or save_now or validate_now:
                values = _fetch(pending, step, checkpoints)
                pending = []
                bar.set_postfix(loss=f"{values['loss']:.4f}")
                log.scalars(step, values)
            if validate_now:
                psnr_y, sample = validate(state.ema)
                scores = {"val_psnr_y": psnr_y, "val_bicubic_psnr_y": validate.bicubic_psnr_y}
                log.scalars(step, scores)
                images.write_png(directory / "samples" / f"{step:07d}.png", sample)
                bar.write(
                    f"step {step}: PSNR-Y {psnr_y:.2f} dB (bicubic {validate.bicubic_psnr_y:.2f})"
                )
            if save_now:
                checkpoints.save(step, state.ema, state._replace(ema={}))
            if last:
                break
    checkpoints.close()
    log.close()
    if stop.requested and step < config.steps:
        print(f"stopped after step {step}; the same command goes on from there")
    return directory


def load_teacher(config: TrainConfig) -> Teacher:
    """The frozen teacher that the student phase is to learn from.

    Raises:
        UserError: there is none, or its scale is not the student's.
    """
    path = config.distill.teacher
    if path is None:
        path = config.workdir.expanduser() / "teacher"
        if not (path / "checkpoints").is_dir():
            raise UserError(
                f"there is no teacher in {path}; run the teacher phase under the same --workdir, "
                "or pass a checkpoint with --distill.teacher PATH"
            )
    teacher = load_model(path)
    if teacher.config.scale != config.model.scale:
        raise UserError(
            f"{path} is a teacher for x{teacher.config.scale}, the student is to be "
            f"x{config.model.scale}"
        )
    return Teacher(teacher.config, named_parameters(teacher))


def _fetch(
    pending: list[dict[str, Array]], step: int, checkpoints: Checkpoints
) -> dict[str, float]:
    """The means of the metrics of the steps up to `step`, all of whose losses must be finite."""
    fetched = jax.device_get(pending)
    for i, parts in enumerate(fetched):
        if not np.isfinite(parts["loss"]):
            newest = checkpoints.newest()
            raise TrainingError(
                f"the loss is {parts['loss']} at step {step - len(fetched) + 1 + i}; the last good "
                f"checkpoint is {newest or 'not written yet'}. A lower --optim.learning-rate or "
                "--optim.clip may help."
            )
    return {name: float(np.mean([parts[name] for parts in fetched])) for name in fetched[0]}


class _StopSignals:
    """While entered, SIGINT and SIGTERM only set `requested`."""

    def __enter__(self):
        self.requested = False
        self._previous = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _request(self, number, frame):
        self.requested = True

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

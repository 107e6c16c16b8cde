"""The training step of both phases: state, losses, gradients, update.

teacher: the loss against the HR pictures, L1 in the paper. student: that plus lambda times L1 to a
frozen teacher, at the output or at chosen RSSBs (arXiv 2405.03008, section 3.3). Both minimise with
Adam under a schedule and average the weights; validation, export and distillation use the average.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Key

from dvmsr_jax import data, parallel
from dvmsr_jax.config import NetworkConfig, OptimConfig, TrainConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.inference import upscale_batch
from dvmsr_jax.model import Weights, build, named_parameters
from dvmsr_jax.training import losses

# For the step, on CPUs. XLA's own order of operations favours concurrency, which takes half as much
# memory again and is no faster; and it forgets optimization barriers before it decides, among them
# those of `remat`.
_SPARING = {
    "xla_disable_hlo_passes": "cse_barrier_expander",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
# On CPUs, for programs that run once: optimising them would take longer than running them.
_HASTY = {"xla_backend_optimization_level": 0}

# The paper halves the learning rate at 250, 400, 450 and 475 of 500 thousand steps.
HALVINGS = (0.5, 0.8, 0.9, 0.95)


class TrainState(NamedTuple):
    """Everything a step changes. Random keys and batches are functions of the seed and the step."""

    step: Array
    params: dict[str, dict[str, Array]]
    """"model" and, in mid-level distillation, "projections"; each by name."""
    opt_state: Any
    ema: dict[str, Array]
    """The averaged weights of the model."""


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
    """Adam under the schedule, on gradients clipped by their global norm unless `clip` is 0."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.adam(learning_rate(config, steps), b1=config.b1, b2=config.b2),
    )


def rssb_pairs(config: TrainConfig, teacher: NetworkConfig) -> tuple[tuple[int, int], ...]:
    """Which RSSB's features are compared with which of the teacher's, in mid-level distillation.

    By default every one of the student's, with the one that ends at or just after the same share of
    the teacher's depth. Raises UserError if the configuration names one that is not there.
    """
    if not config.distill.rssbs:
        count = config.model.blocks
        return tuple((i, math.ceil((i + 1) * teacher.blocks / count) - 1) for i in range(count))
    for student_rssb, teacher_rssb in config.distill.rssbs:
        if not (0 <= student_rssb < config.model.blocks and 0 <= teacher_rssb < teacher.blocks):
            raise UserError(
                f"distill.rssbs names ({student_rssb}, {teacher_rssb}), but the student has "
                f"{config.model.blocks} RSSBs and the teacher {teacher.blocks}, counted from 0"
            )
    return config.distill.rssbs


def init_state(
    config: TrainConfig,
    teacher: Weights | None,
    initial: Mapping[str, Array | np.ndarray] | None = None,
) -> TrainState:
    """The state before the first step: parameters from `initial`, by name, and random ones."""
    optimizer = make_optimizer(config.optim, config.steps)

    # Compiled once rather than operation by operation.
    @functools.partial(jax.jit, compiler_options=_on_cpus(_HASTY))
    def init(initial):
        key = jax.random.key(config.seed)
        model = named_parameters(build(config.model, rngs=nnx.Rngs(key))) | initial
        params = {"model": model, "projections": {}}
        if teacher is not None and config.distill.level == "mid":
            shape = (config.model.channels, teacher.config.channels)
            for i in range(len(rssb_pairs(config, teacher.config))):
                projection = nnx.initializers.lecun_normal()(jax.random.fold_in(key, i), shape)
                params["projections"][f"{i}"] = projection
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), model)

    return init(dict(initial or {}))


def loss_function(
    config: TrainConfig,
    params: dict[str, dict[str, Array]],
    teacher: Weights | None,
    batch: dict[str, Float[Array, "b _ _ 3"]],
    keys: Key[Array, " b"],
) -> tuple[Array, dict[str, Array]]:
    """(loss, its parts) on crops in [0, 1], "lr" and "hr", with a drop-path key for each.

    Distils if there is a `teacher`, whose answers are computed here unless they are in the batch as
    "target". Crops marked in "zoomed" are only distilled: in the means of the other losses, they
    count as reproduced exactly.
    """
    model = Weights(config.model, params["model"]).model(config.compute)
    output, features = model.with_features(batch["lr"], keys=keys, remat=config.remat)
    hr = batch["hr"]
    if "zoomed" in batch:
        hr = jnp.where(batch["zoomed"][:, None, None, None], output, hr)
    loss = losses.PIXEL[config.loss.pixel](output, hr)
    parts = {"pixel_loss": loss}
    if config.loss.fft_weight:
        parts["fft_loss"] = losses.fourier(output, hr)
        loss += config.loss.fft_weight * parts["fft_loss"]
    if teacher is None:
        return loss, {"loss": loss, **parts}

    if "target" in batch:
        distillation = losses.l1(output, batch["target"])
    else:
        teach = teacher.model(config.compute)
        if config.distill.level == "output":
            target = upscale_batch(teach, batch["lr"], self_ensemble=config.distill.self_ensemble)
            distillation = losses.l1(output, jax.lax.stop_gradient(target))
        else:
            pairs = rssb_pairs(config, teacher.config)
            target_features = jax.lax.stop_gradient(teach.with_features(batch["lr"])[1])
            distillation = losses.mid_level(
                [features.rssbs[i] for i, _ in pairs],
                [target_features.rssbs[j] for _, j in pairs],
                [params["projections"][f"{i}"] for i in range(len(pairs))],
            )
    loss += config.distill.weight * distillation
    return loss, {"loss": loss, **parts, "distill_loss": distillation}


class TrainStep:
    """step(state, batch) -> (state, metrics), compiled once; donates the state.

    A batch is an input of `feed` or, without one, crops as `Feed.crops` returns them; it is
    sharded over the mesh, all else replicated.

    Loss and gradients are computed under `shard_map`, each device on its share of the batch, so
    that kernels which XLA cannot partition stay local; their means over the devices update the
    parameters. The number of devices, of processes and of accumulated parts changes the result,
    but only by rounding.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        teacher: Weights | None = None,
        feed: data.Feed | None = None,
        *,
        random_start: bool = True,
    ):
        """`random_start`: whether any parameters were random before the first step."""
        optimizer = make_optimizer(config.optim, config.steps)
        schedule = learning_rate(config.optim, config.steps)
        replicated, sharded = PartitionSpec(), PartitionSpec(parallel.AXIS)

        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(replicated, replicated, replicated, sharded),
            out_specs=replicated,
            check_vma=False,  # the means below are explicit, and custom VJPs stay simple
        )
        def gradients(params, constants, step, batch):
            if feed is not None:
                batch = feed.crops(constants["cache"], batch)
            frozen = constants["teacher"]
            count = len(batch["lr"])
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            numbers = jax.lax.axis_index(parallel.AXIS) * count + jnp.arange(count)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

            def one_part(batch, keys):
                crops = {
                    name: x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x
                    for name, x in batch.items()
                }
                loss = functools.partial(loss_function, config)
                return jax.grad(loss, has_aux=True)(params, frozen, crops, keys)

            result = _mean_over_parts(one_part, config.optim.accumulate, batch, keys)
            return jax.lax.pmean(result, parallel.AXIS)

        @functools.partial(jax.jit, donate_argnums=0, compiler_options=_on_cpus(_SPARING))
        def train_step(state, constants, batch):
            grads, parts = gradients(state.params, constants, state.step, batch)
            # Or else XLA, on its way to their norm, may keep what all of them are made of.
            grads = jax.lax.optimization_barrier(grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            # An average would remember a random start for long, so its decay grows with the run (as
            # TensorFlow's ExponentialMovingAverage does, given the step). Not by way of
            # optax.incremental_update, which takes 1 - decay and rounds otherwise in early steps.
            t = state.step.astype(jnp.float32)
            grown = (1 + t) / (10 + t) if random_start else 1.0
            decay = jnp.minimum(config.optim.ema_decay, grown)
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params["model"])
            parts |= {
                "gradient_norm": optax.tree.norm(grads),
                "weight_norm": optax.tree.norm(params),
                "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            }
            return TrainState(state.step + 1, params, opt_state, ema), parts

        self._step: Any = train_step
        # Arguments rather than constants, for XLA not to fold 7 million weights into the code.
        cache = {} if feed is None else feed.load_cache()
        self._constants = parallel.replicate({"teacher": teacher, "cache": cache}, mesh)

    def __call__(
        self, state: TrainState, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        """The state after the step and the metrics of its batch, means over it.

        loss, pixel_loss and, if used, fft_loss and distill_loss; gradient_norm (before clipping),
        weight_norm and learning_rate.
        """
        return self._step(state, self._constants, batch)

    def compile(self, state: TrainState, batch: dict[str, Array]) -> jax.stages.Compiled:
        """Compiles the step for batches like this one and returns the program, for its cost."""
        self._step = self._step.lower(state, self._constants, batch).compile()
        return self._step


def memory_of(program: jax.stages.Compiled) -> int:
    """Bytes that a program takes on each device: arguments, results and temporary arrays."""
    sizes: Any = program.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )


def _on_cpus(options):
    return options if jax.default_backend() == "cpu" else None


def _mean_over_parts(function, parts, *inputs):
    """The mean of `function` over equal parts of the inputs, one after the other.

    On CPUs, this is not a loop in the program: XLA brings convolutions into the form for which it
    has fast code in a program's entry computation only, and those of a backward pass need it.
    """
    if parts == 1:
        return function(*inputs)
    inputs = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), inputs)
    shapes = jax.eval_shape(lambda inputs: function(*jax.tree.map(lambda x: x[0], inputs)), inputs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, part):
        total, part = jax.lax.optimization_barrier((total, part))  # not all parts at once
        return jax.tree.map(jnp.add, total, function(*part)), None

    total, _ = jax.lax.scan(add, zeros, inputs, unroll=jax.default_backend() == "cpu")
    return jax.tree.map(lambda x: x / parts, total)

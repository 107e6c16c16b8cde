"""The programs of training and inference, lowered for TPUs on a machine without one.

Each of their calls of `jax.jit` is traced and lowered as on a TPU; nothing is compiled or computed.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvmsr_jax import data, inference, parallel
from dvmsr_jax.config import Compute, DataConfig, DistillConfig, LossConfig, OptimConfig
from dvmsr_jax.configs import PRESETS
from dvmsr_jax.kernels.native_library import NativeLibrary
from dvmsr_jax.model import Weights, parameter_shapes
from dvmsr_jax.training import step

pytestmark = pytest.mark.usefixtures("optax_promotes_dtypes")

STUDENT, TEACHER = (PRESETS["paper"][phase] for phase in ("student", "teacher"))
CROP = 8


def small(config):
    """The configuration with a small model and crops."""
    model = dataclasses.replace(config.model, channels=8, rssbs=1, vimms_per_rssb=1, states=4)
    crops = DataConfig(lr_crop=CROP, batch_size=4)
    return dataclasses.replace(config, model=model, data=crops)


@pytest.fixture
def lowered(monkeypatch):
    """The programs so far. In place of their results, they return zeros."""
    texts = []
    jit = jax.jit

    def lowering_jit(function, **options):
        jitted = jit(function, **options)

        def call(*arguments):
            if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments)):
                return jitted(*arguments)
            program = jitted.trace(*arguments).lower(lowering_platforms=("tpu",))
            texts.append(program.as_text())
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.out_info)

        return call

    monkeypatch.setattr(jax, "jit", lowering_jit)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    forget_native_libraries()
    yield texts
    forget_native_libraries()


def forget_native_libraries():
    """Whether the C++ code can run is decided once, by the platform of that moment."""
    NativeLibrary.register.cache_clear()
    NativeLibrary.missing.cache_clear()


def assert_no_foreign_code(programs, count):
    """Custom calls are code for one platform, except those of shardings."""
    assert len(programs) == count
    for text in programs:
        assert "stablehlo.convolution" in text
        assert not {*re.findall(r"custom_call @(\w+)", text)} - {"Sharding"}


def zeros(config):
    """Weights of zeros."""
    shapes = parameter_shapes(config)
    return Weights(config, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


def records(config, count):
    """Sub-images of zeros."""
    side = config.data.lr_crop + 4
    hr = np.zeros((side * config.model.scale,) * 2 + (3,), np.uint8)
    return [{"lr": hr[:side, :side], "hr": hr}] * count


def lower_step(config, teacher=None, targets=False):
    """Lowers the initial state's program and the step's."""
    mesh = parallel.make_mesh(config.data.batch_size, config.optim.accumulate)
    pictures = records(config, 3)
    feed = data.make_feed(
        pictures,
        config.data,
        scale=config.model.scale,
        targets=[record["hr"] for record in pictures] if targets else None,
    )
    state = parallel.replicate(step.init_state(config, teacher), mesh)
    train_step = step.TrainStep(config, mesh, teacher, feed)
    (batch,) = parallel.prefetch(feed.inputs(seed=0, start=0, stop=1), mesh)
    train_step(state, batch)


CACHE = DataConfig(lr_crop=CROP, batch_size=4, cache="device")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": CACHE},
        {"optim": OptimConfig(accumulate=2)},
        {
            "remat": True,
            "compute": Compute(precision="bfloat16"),
            "loss": LossConfig(pixel="charbonnier", fft_weight=0.1),
        },
    ],
    ids=["plain", "device cache", "accumulated", "remat, bfloat16 and other losses"],
)
def test_teacher_steps(lowered, changes):
    lower_step(dataclasses.replace(small(TEACHER), **changes))
    assert_no_foreign_code(lowered[1:], 1)
    if "optim" in changes:  # as a loop, which CPUs do without
        assert "stablehlo.while" in lowered[1]


@pytest.mark.parametrize(
    ("options", "cache"),
    [
        ({"self_ensemble": True}, "none"),
        ({"level": "mid"}, "none"),
        ({"targets": "precomputed"}, "device"),
    ],
    ids=["self-ensemble", "mid", "precomputed, device cache"],
)
def test_student_steps(lowered, options, cache):
    config = small(STUDENT)
    crops = dataclasses.replace(config.data, cache=cache)
    config = dataclasses.replace(config, data=crops, distill=DistillConfig(**options))
    lower_step(config, zeros(small(TEACHER).model), targets="targets" in options)
    assert_no_foreign_code(lowered[1:], 1)


def test_the_papers_distillation(lowered):
    lower_step(
        dataclasses.replace(STUDENT, data=dataclasses.replace(STUDENT.data, batch_size=8)),
        zeros(TEACHER.model),
    )
    assert_no_foreign_code(lowered[1:], 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_inference(lowered, precision):
    model = zeros(small(STUDENT).model).model(Compute(precision=precision))
    image = np.zeros((5, 7, 3), np.float32)
    inference.make_whole(model)(image[None])
    assert_no_foreign_code(lowered, 1)
    upscale = inference.make_streamer(model, band_rows=4)
    assert sum(len(rows) for rows in upscale(image)) == 5 * 4
    assert_no_foreign_code(lowered, 1 + 3)  # of a band: the same each time


def test_tiles(lowered):
    config = dataclasses.replace(small(STUDENT).model, bidirectional=True)
    upscale = inference.make_tiler(zeros(config).model(), tile=8, overlap=2)
    assert sum(len(rows) for rows in upscale(np.zeros((8, 8, 3), np.float32))) == 32
    assert_no_foreign_code(lowered, 1)


def test_the_papers_student_in_bands(lowered):
    upscale = inference.make_streamer(zeros(STUDENT.model).model())
    assert sum(len(rows) for rows in upscale(np.zeros((64, 64, 3), np.float32))) == 256
    assert_no_foreign_code(lowered, 1)

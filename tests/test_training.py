"""Both phases learn, the teacher does not change, and interrupted runs end like any other."""

import dataclasses
import fcntl
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax import images, parallel
from dvmsr_jax.checkpoint import CHECKSUMS
from dvmsr_jax.config import (
    Compute,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from dvmsr_jax.data import load_records
from dvmsr_jax.errors import StoppedError, UserError
from dvmsr_jax.model import DVMSR, Weights, named_parameters
from dvmsr_jax.pretrained import convert, load_model, training_facts
from dvmsr_jax.training import loop, report, run, step, targets

pytestmark = pytest.mark.usefixtures("optax_promotes_dtypes")

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ModelConfig(channels=12, rssbs=2, vimms_per_rssb=1, states=4)
STUDENT = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4)


@pytest.fixture
def config(photos, tmp_path):
    """A teacher phase of six steps."""
    return TrainConfig(
        phase="teacher",
        workdir=tmp_path / "run",
        model=TEACHER,
        data=DataConfig(
            hr_dirs=(photos,),
            data_dir=photos.parent / "records",
            val_images=1,
            lr_crop=8,
            batch_size=2,
        ),
        optim=OptimConfig(learning_rate=5e-3),
        steps=6,
        log_every=1,
        val_every=3,
        checkpoint_every=2,
    )


def student_of(config, **distill):
    return dataclasses.replace(
        config, phase="student", model=STUDENT, distill=DistillConfig(**distill)
    )


def step_repeatedly(config, teacher, steps):
    """Metrics of steps on one fixed batch, and the state after them."""
    config = dataclasses.replace(config, steps=100)
    mesh = parallel.make_mesh(config.data.batch_size)
    state = parallel.replicate(step.init_state(config, teacher), mesh)
    train_step = step.TrainStep(config, mesh, teacher)
    rng = np.random.default_rng(0)
    lr = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    batch = parallel.shard_batch({"lr": lr, "hr": lr.repeat(4, 1).repeat(4, 2)}, mesh)
    log = []
    for _ in range(steps):
        state, metrics = train_step(state, batch)
        log.append(jax.device_get(metrics))
    return log, state


def random_teacher():
    model = DVMSR(TEACHER, rngs=nnx.Rngs(1))
    return Weights.of(model)


def test_teacher_step_lowers_the_loss(config):
    log, state = step_repeatedly(config, None, 3)
    assert log[2]["loss"] < log[1]["loss"] < log[0]["loss"]
    assert int(state.step) == 3


@pytest.mark.parametrize("level", ["output", "mid"])
def test_student_step_lowers_the_loss_and_leaves_the_teacher(config, level):
    teacher = random_teacher()
    before = jax.tree.map(np.array, teacher.parameters)
    log, state = step_repeatedly(student_of(config, level=level, weight=0.5), teacher, 3)
    assert log[2]["loss"] < log[1]["loss"] < log[0]["loss"]
    for metrics in log:
        expected = metrics["pixel_loss"] + 0.5 * metrics["distill_loss"]
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
        assert metrics["distill_loss"] > 0
    for name, value in before.items():
        np.testing.assert_array_equal(teacher.parameters[name], value)
    assert state.ema.keys() == named_parameters(DVMSR(STUDENT, rngs=nnx.Rngs(0))).keys()


def test_output_distillation_is_the_distance_to_the_teacher(config):
    """A student that is its own teacher has a distillation loss of 0."""
    config = dataclasses.replace(
        config, phase="student", model=dataclasses.replace(TEACHER, drop_path=0.0)
    )
    state = step.init_state(config, random_teacher())
    lr = jnp.linspace(0, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    batch = {"lr": lr, "hr": jnp.zeros((2, 32, 32, 3))}
    teacher = Weights(config.model, state.params["model"])
    keys = jax.random.split(jax.random.key(0))
    _, parts = step.loss_function(config, state.params, teacher, batch, keys)
    assert parts["distill_loss"] < 1e-6


def test_ema_follows_the_weights(config):
    _, first = step_repeatedly(config, None, 1)
    start = step.init_state(config, None).ema
    for name, ema in first.ema.items():  # the decay of the first step is 1 / 10
        expected = 0.1 * start[name] + 0.9 * first.params["model"][name]
        np.testing.assert_allclose(ema, expected, rtol=1e-5, atol=1e-7)


def test_clip_0_does_not_clip(config):
    """It must not scale gradients to zero."""
    runs = []
    for clip in (0.0, 1e9):
        optim = dataclasses.replace(config.optim, clip=clip)
        runs.append(step_repeatedly(dataclasses.replace(config, optim=optim), None, 3)[0])
    assert runs[0][2]["loss"] < runs[0][0]["loss"]
    np.testing.assert_allclose(*([metrics["loss"] for metrics in run] for run in runs), rtol=1e-6)


def test_learning_rate_schedules():
    halving = step.learning_rate(OptimConfig(), 500_000)
    for at, factor in [(0, 1), (250_001, 2), (400_001, 4), (450_001, 8), (475_001, 16)]:
        np.testing.assert_allclose(halving(at), 2e-4 / factor, rtol=1e-6)
    np.testing.assert_allclose(halving(249_999), 2e-4, rtol=1e-6)
    cosine = step.learning_rate(OptimConfig(schedule="cosine", warmup=0.1), 1000)
    np.testing.assert_allclose([cosine(s) for s in (0, 50, 100)], [0, 1e-4, 2e-4], rtol=1e-6)
    np.testing.assert_allclose([cosine(s) for s in (550, 1000)], [1e-4, 0], rtol=1e-5, atol=1e-9)


def parameters_of(directory):
    return {k: np.asarray(x) for k, x in named_parameters(load_model(directory)).items()}


def interrupt_at(step, monkeypatch, number):
    """Sends a signal when this step's metrics are written."""
    scalars = report.Log.scalars

    def spy(self, at, values):
        scalars(self, at, values)
        if at == step and "loss" in values:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(report.Log, "scalars", spy)


def test_interrupted_run_ends_like_an_uninterrupted_one(config, tmp_path, monkeypatch, capsys):
    whole = parameters_of(loop.train(config))
    cut = dataclasses.replace(config, workdir=tmp_path / "cut")
    with monkeypatch.context() as patch:
        interrupt_at(3, patch, signal.SIGTERM)
        with pytest.raises(StoppedError, match="after step 4; the same command resumes"):
            loop.train(cut)
    directory = cut.workdir / "teacher"
    logged = [line["step"] for line in report.read_metrics(directory / "metrics.jsonl")]
    assert max(logged) == 4  # the step during which the signal came is finished
    with pytest.raises(UserError, match=r"teacher in .* has 2 steps left; .*--distill\.teacher"):
        run.load_teacher(student_of(cut))
    assert run.load_teacher(student_of(cut, teacher=directory)) is not None
    loop.train(cut)
    for name, value in parameters_of(directory).items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)
    assert "steps 4 to 6" in capsys.readouterr().out


def test_both_phases_write_their_results(config, monkeypatch, tmp_path):
    teacher_directory = loop.train(config)
    before = parameters_of(teacher_directory)
    student = student_of(config)
    directory = loop.train(student)
    assert directory == config.workdir / "student"
    assert load_model(directory).config == STUDENT
    convert(directory, tmp_path / "student.safetensors")
    convert(tmp_path / "student.safetensors", tmp_path / "copy.safetensors")
    facts = training_facts(tmp_path / "copy.safetensors")
    assert facts["step"] == facts["steps"] > 0
    assert facts["phase"] == "student"
    assert facts["optim.learning_rate"] > 0
    assert facts["sources.teacher"]
    assert "workdir" not in facts
    for name, value in parameters_of(teacher_directory).items():
        np.testing.assert_array_equal(value, before[name])

    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_psnr_y" in line] == [3, 6]
    assert list((directory / "tensorboard").glob("events*"))
    sample = images.read_rgb(directory / "samples" / "0000006.png")
    assert sample.shape[1] > 3 * 300
    assert [p.name for p in sorted((directory / "checkpoints").iterdir())] == ["3", "4", "6"]

    loop.train(student)  # finished: nothing happens
    with pytest.raises(UserError, match=r"optim\.b1: 0\.9 there, 0\.8 now"):
        loop.train(dataclasses.replace(student, optim=OptimConfig(learning_rate=5e-3, b1=0.8)))


def test_dry_run_prints_the_cost_and_writes_nothing(config, capsys):
    loop.dry_run(config)
    printed = capsys.readouterr().out
    for pattern in (
        r"12,324 parameters, 6 steps of 2 crops",
        r"GMACs",
        r"[1-9]\d* MiB",
        r"steps/s",
    ):
        assert re.search(pattern, printed), printed
    assert not config.workdir.exists()


def test_profile_and_pictures(config):
    directory = loop.train(dataclasses.replace(config, steps=8, val_every=8), profile=1)
    (trace,) = directory.glob("profile/**/perfetto_trace.json.gz")
    assert b"train_step" in gzip.decompress(trace.read_bytes())
    assert images.read_rgb(directory / "curves.png").std() > 0


def test_precomputed_targets_distil_like_the_teacher_itself(config):
    """The first step's losses differ only by rounding to 8 bits."""
    loop.train(config)
    online = dataclasses.replace(student_of(config), steps=1)
    precomputed = dataclasses.replace(
        student_of(config, targets="precomputed"), steps=1, workdir=config.workdir / "other"
    )
    precomputed = dataclasses.replace(
        precomputed,
        distill=dataclasses.replace(precomputed.distill, teacher=config.workdir / "teacher"),
        # Whole sub-images, because a crop's border looks different to the teacher.
        data=dataclasses.replace(config.data, lr_crop=80),
    )
    online = dataclasses.replace(online, data=precomputed.data)
    with pytest.raises(UserError, match="dvmsr data distill"):
        loop.train(precomputed)
    records = load_records(config.data, 4)
    targets.distill(config.workdir / "teacher", records.folder, self_ensemble=False, batch_size=1)
    losses = [
        report.read_metrics(loop.train(run) / "metrics.jsonl")[0] for run in (online, precomputed)
    ]
    assert losses[0]["pixel_loss"] == pytest.approx(losses[1]["pixel_loss"], rel=1e-5)
    assert losses[0]["distill_loss"] == pytest.approx(losses[1]["distill_loss"], abs=1 / 255)
    assert losses[0]["distill_loss"] != losses[1]["distill_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"level": "mid", "targets": "precomputed"},
            r"targets is for --distill\.level=output only",
        ),
        ({"level": "mid", "self_ensemble": True}, r"ensemble is for --distill\.level=output only"),
        ({"rssbs": ((0, 0),)}, r"--distill\.rssbs is for --distill\.level=mid only"),
    ],
)
def test_options_of_distillation_that_exclude_each_other(config, options, message):
    with pytest.raises(UserError, match=message):
        student_of(config, **options)


@pytest.mark.parametrize("options", [{"weight": 0.5}, {"teacher": Path("x")}, {"level": "mid"}])
def test_a_teacher_has_nothing_to_distil(config, options):
    (name,) = options
    with pytest.raises(UserError, match=f"^--distill.{name}: for --phase=student only"):
        dataclasses.replace(config, distill=DistillConfig(**options))


def test_student_without_teacher_says_what_to_do(config):
    with pytest.raises(UserError, match=r"no teacher in .*--distill\.teacher"):
        loop.train(student_of(config))


def test_teacher_of_another_scale_is_refused(config):
    teacher = dataclasses.replace(config, model=dataclasses.replace(TEACHER, scale=2), steps=1)
    directory = loop.train(teacher)
    with pytest.raises(UserError, match="teacher for x2, but the student is for x4"):
        loop.train(student_of(config, teacher=directory))


def test_rssb_pairs():
    config = TrainConfig(model=ModelConfig(rssbs=4))
    teacher = ModelConfig(rssbs=8)
    assert step.rssb_pairs(config, teacher) == ((0, 1), (1, 3), (2, 5), (3, 7))
    for expected in ((0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3), (1, 2, 3, 4)):
        pairs = step.rssb_pairs(config, ModelConfig(rssbs=expected[-1] + 1))
        assert pairs == tuple(enumerate(expected))
    chosen = dataclasses.replace(config, distill=DistillConfig(level="mid", rssbs=((0, 7),)))
    assert step.rssb_pairs(chosen, teacher) == ((0, 7),)
    wrong = dataclasses.replace(config, distill=DistillConfig(level="mid", rssbs=((4, 0),)))
    with pytest.raises(UserError, match=r"names \(4, 0\), but the student has 4"):
        step.rssb_pairs(wrong, teacher)


def test_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    """The message names the step and the last checkpoint, and no later one is written."""
    take_step = step.TrainStep.__call__

    def poisoned(self, state, batch):
        state, parts = take_step(self, state, batch)
        return state, parts | {"loss": jnp.where(state.step == 4, jnp.nan, parts["loss"])}

    monkeypatch.setattr(step.TrainStep, "__call__", poisoned)
    config = dataclasses.replace(config, log_every=6, val_every=6)
    with pytest.raises(
        UserError, match=r"loss is nan at step 4; the last good checkpoint is .*/2\."
    ):
        loop.train(config)
    steps = [p.name for p in (config.workdir / "teacher" / "checkpoints").iterdir()]
    assert steps == ["2"]


def test_weights_that_are_not_finite_are_not_saved(config):
    """The loss is the one before the step that spoils them."""
    config = dataclasses.replace(
        config, optim=OptimConfig(learning_rate=1e38), checkpoint_every=1, log_every=6
    )
    with pytest.raises(UserError, match=r"norm of the weights is inf at step 1; .* not written"):
        loop.train(config)
    assert not list((config.workdir / "teacher" / "checkpoints").iterdir())


def test_changes_have_to_be_allowed(config, photos, tmp_path, capsys):
    """In data and options; a run that diverged can resume with a lower learning rate."""
    loop.train(dataclasses.replace(config, steps=2))
    fewer = tmp_path / "fewer"
    shutil.copytree(photos, fewer)
    (fewer / "0.png").unlink()
    changed = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, hr_dirs=(fewer,)),
        model=dataclasses.replace(config.model, drop_path=0.5),
        optim=OptimConfig(learning_rate=1e-3),
    )
    with pytest.raises(UserError) as caught:
        loop.train(changed)
    differing = re.findall(r"^  (.*): .* there, .* now$", str(caught.value), re.MULTILINE)
    assert differing == ["model.drop_path", "optim.learning_rate", "sources.data", "steps"]
    assert re.search(r"^  \(pictures: 1 removed.*\)$", str(caught.value), re.MULTILINE)
    assert "--allow-changes" in str(caught.value)
    capsys.readouterr()
    loop.train(changed, allow_changes=True)
    printed = capsys.readouterr()
    assert "learning_rate: 0.005 there, 0.001 now" in printed.err
    assert "steps 2 to 6" in printed.out
    loop.train(changed)  # the changes are the run's own now
    other = dataclasses.replace(changed, model=STUDENT)
    with pytest.raises(UserError, match=r"rssbs: 2 there, 1 now\n.*another --workdir\.$"):
        loop.train(other, allow_changes=True)


def test_the_best_validation_counts_only_for_its_pictures(config, photos, tmp_path, capsys):
    """Flat pictures score far higher than any others."""
    flat = tmp_path / "flat"
    for i in range(3):
        images.write_png(flat / f"{i}.png", np.full((72, 80, 3), 90 + i, np.uint8))
    data = dataclasses.replace(config.data, hr_dirs=(flat,), data_dir=tmp_path / "records")
    directory = loop.train(dataclasses.replace(config, data=data, steps=3))

    def best_of(step):
        path = directory / "checkpoints" / str(step) / "best" / "metadata"
        return json.loads(path.read_text())

    before = best_of(3)
    loop.train(dataclasses.replace(config, steps=9, val_every=2), allow_changes=True)
    assert f"{before['psnr_y']:.2f} dB at step 3, no longer counts" in capsys.readouterr().err
    after = best_of(9)
    assert after["step"] > 3
    assert after["psnr_y"] < before["psnr_y"]
    kept = best_of(after["step"])  # and its checkpoint exists
    assert kept == after


def test_validation_is_degraded_as_training_is(config, capsys):
    """Bicubic scores less, the same in every run, and another degradation is another score."""
    degraded = dataclasses.replace(
        config, data=dataclasses.replace(config.data, degradation="real"), steps=3
    )
    directory = loop.train(config)
    lines = report.read_metrics(directory / "metrics.jsonl")
    (clean,) = {line["val_bicubic_psnr_y"] for line in lines if "val_psnr_y" in line}
    scores = set()
    for seed in (0, 1):
        other = dataclasses.replace(degraded, seed=seed, workdir=config.workdir / f"{seed}")
        lines = report.read_metrics(loop.train(other) / "metrics.jsonl")
        scores |= {line["val_bicubic_psnr_y"] for line in lines if "val_psnr_y" in line}
    (score,) = scores
    assert score < clean - 1

    longer = dataclasses.replace(degraded, steps=9)
    with pytest.raises(UserError, match=r"data\.degradation: clean there, real now"):
        loop.train(longer)
    capsys.readouterr()
    loop.train(longer, allow_changes=True)
    assert re.search(r"dB at step \d, no longer counts", capsys.readouterr().err)


@pytest.mark.parametrize("wrong", [{"more": 1}, {"psnr_y": None}, {"step": None}, {"step": "3"}])
def test_a_best_validation_of_other_content_is_damage(config, wrong, capsys):
    directory = loop.train(dataclasses.replace(config, steps=4))
    path = directory / "checkpoints" / "4" / "best" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    (directory / "checkpoints" / "4" / CHECKSUMS).unlink()  # as an older version left it
    loop.train(dataclasses.replace(config, steps=4))
    assert re.search(r"warning: .*/4: cannot be read .*not a validation", capsys.readouterr().err)


def test_one_run_at_a_time(config):
    folder = config.workdir / "teacher"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"another run is writing to {folder}"):
            loop.train(config)


@pytest.mark.parametrize(
    "content",
    ["[1]\n", "{}\n", '{"step": null}\n', '{"step": 1, "loss": "x"}\n', "x\n{}\n", "\xff\n\n"],
)
def test_metrics_of_other_content_are_refused(config, content):
    """They are left untouched; the log would be rewritten without them."""
    path = config.workdir / "teacher" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{path}: line 1 is not a line of metrics"):
        loop.train(config)
    assert path.read_bytes() == content.encode("latin-1")


def test_a_half_written_line_of_metrics_is_dropped(tmp_path):
    """A killed run or a power failure can leave one."""
    path = tmp_path / "metrics.jsonl"
    for tail in (b'{"step": 2, "lo', b"\0" * 99, b"\xff"):
        path.write_bytes(b'{"step": 1, "loss": NaN}\n' + tail)
        assert [line["step"] for line in report.read_metrics(path)] == [1]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TrainConfig, {"steps": 0}, "--steps is 0, not a whole number from 1 up"),
        (TrainConfig, {"seed": -1}, "--seed is -1, not within [0, 4294967296)"),
        (DataConfig, {"batch_size": 0}, "--data.batch-size is 0, not a whole number from 1 up"),
        (TrainConfig, {"log_every": 0}, "--log-every is 0, not a whole number from 1 up"),
        (
            ModelConfig,
            {"channels": 0},
            "there is no such model: channels is 0, not a whole number from 1 up",
        ),
        (OptimConfig, {"warmup": 1.5}, "--optim.warmup is 1.5, not within [0, 1)"),
        (OptimConfig, {"b1": math.nan}, "--optim.b1 is nan, not within [0, 1)"),
        (OptimConfig, {"clip": math.inf}, "--optim.clip is inf, not a number from 0 up"),
        (
            OptimConfig,
            {"learning_rate": math.nan, "accumulate": 0},
            "--optim.learning-rate is nan, not a number from 0 up; "
            "--optim.accumulate is 0, not a whole number from 1 up",
        ),
    ],
)
def test_values_out_of_range(kind, options, message):
    with pytest.raises(UserError) as caught:
        kind(**options)
    assert str(caught.value) == message


def test_bfloat16_learns_as_well(config):
    """Compares the mean loss of ten steps, after it has halved."""
    narrow = dataclasses.replace(config, compute=Compute(precision="bfloat16"))
    wide, narrow = (
        np.array([metrics["loss"] for metrics in step_repeatedly(c, None, 40)[0]])
        for c in (config, narrow)
    )
    assert wide[-10:].mean() < wide[0] / 2
    assert 0 < abs(narrow[-10:].mean() / wide[-10:].mean() - 1) < 0.02


@pytest.mark.parametrize(
    "model", [TEACHER, pytest.param(ModelConfig(), marks=pytest.mark.gpu)], ids=["small", "paper"]
)
def test_the_same_bits_twice(config, model):
    config = dataclasses.replace(config, model=model)
    first, second = (jax.device_get(step_repeatedly(config, None, 3)) for _ in range(2))
    for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_remat_saves_memory(config):
    """Only the activations of a single RSSB remain. (A fused ViMM keeps few of them anyway.)"""
    config = dataclasses.replace(config, compute=Compute("chunked"))
    model = dataclasses.replace(TEACHER, rssbs=4)
    data = dataclasses.replace(config.data, lr_crop=24)
    lr = np.zeros((2, 24, 24, 3), np.uint8)
    memory = []
    for remat in (False, True):
        changed = dataclasses.replace(config, model=model, data=data, remat=remat)
        mesh = parallel.make_mesh(2)
        state = parallel.replicate(step.init_state(changed, None), mesh)
        batch = parallel.shard_batch({"lr": lr, "hr": lr.repeat(4, 1).repeat(4, 2)}, mesh)
        memory.append(step.memory_of(step.TrainStep(changed, mesh).compile(state, batch)))
    assert memory[1] < 0.7 * memory[0]


def test_accumulation_saves_memory_and_keeps_convolutions_fast(config):
    """XLA has fast code on CPUs for convolutions in this form only, and loops keep them from it."""
    data = dataclasses.replace(config.data, batch_size=8, lr_crop=24)
    lr = np.zeros((8, 24, 24, 3), np.uint8)
    memory = []
    for parts in (1, 2):
        optim = dataclasses.replace(config.optim, accumulate=parts)
        changed = dataclasses.replace(config, model=STUDENT, data=data, optim=optim)
        mesh = parallel.make_mesh(8, parts)
        state = parallel.replicate(step.init_state(changed, None), mesh)
        batch = parallel.shard_batch({"lr": lr, "hr": lr.repeat(4, 1).repeat(4, 2)}, mesh)
        program = step.TrainStep(changed, mesh).compile(state, batch)
        memory.append(step.memory_of(program))
        if jax.default_backend() == "cpu":
            forms = re.findall(r" convolution\(.*dim_labels=(\w+->\w+)", program.as_text())
            assert set(forms) == {"b01f_01io->b01f"}
    assert memory[1] < 0.7 * memory[0]


def test_batch_must_split_over_the_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(UserError, match="batch size is 12, which 8 devices cannot share"):
        parallel.make_mesh(12)
    with pytest.raises(UserError, match=r"16, which 8 devices .* in 4 accumulated parts"):
        parallel.make_mesh(16, accumulate=4)


DEVICES = """
import dataclasses, sys
import jax, numpy as np
from flax import nnx
from dvmsr_jax import data, parallel
from dvmsr_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from dvmsr_jax.model import DVMSR, Weights, named_parameters
from dvmsr_jax.training import step

SMALL = ModelConfig(channels=8, rssbs=2, vimms_per_rssb=1, states=4, drop_path=0.3)
TEACHER = dataclasses.replace(SMALL, channels=12)
rng = np.random.default_rng(0)
records = {"lr": rng.integers(0, 256, (9, 8, 8, 3), np.uint8)}
records["hr"] = records["lr"].repeat(4, 1).repeat(4, 2)
records = [{name: x[i] for name, x in records.items()} for i in range(9)]
teacher = Weights.of(DVMSR(TEACHER, rngs=nnx.Rngs(1)))

def run(phase, cache="none", **changes):
    optim = OptimConfig(learning_rate=1e-3, accumulate=changes.pop("accumulate", 1))
    config = TrainConfig(
        phase=phase, model=SMALL, data=DataConfig(lr_crop=6, batch_size=8, cache=cache),
        optim=optim, steps=5, **changes,
    )
    mesh = parallel.make_mesh(8, optim.accumulate)
    frozen = teacher if phase == "student" else None
    state = parallel.replicate(step.init_state(config, frozen), mesh)
    feed = data.make_feed(records, config.data, scale=4)
    train_step = step.TrainStep(config, mesh, frozen, feed)
    for batch in parallel.prefetch(feed.inputs(seed=0, start=0, stop=5), mesh):
        state, metrics = train_step(state, batch)
    return {"loss": metrics["loss"], **state.params["model"]}

results = {"teacher": run("teacher"), "student": run("student")}
if jax.device_count() == 2:
    results["student, accumulated"] = run("student", accumulate=4)
    results["student, rematerialised"] = run("student", remat=True)
    results["student, cached"] = run("student", cache="device")
    print(*(len(x.sharding.device_set) for x in results["student"].values()))
np.savez(sys.argv[1], **{f"{k}/{n}": x for k, v in results.items() for n, x in v.items()})
"""


def test_devices_and_memory_savers_change_no_result(tmp_path):
    """1, 2 and 8 devices in both phases; on 2, accumulation, rematerialisation and device cache."""
    results = {}
    for devices in (1, 2, 8):
        flags = (
            f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        )
        path = tmp_path / f"{devices}.npz"
        subprocess.run(
            [sys.executable, "-c", DEVICES, path],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            check=True,
            capture_output=True,
        )
        results |= {(devices, *name.split("/")): value for name, value in np.load(path).items()}
    assert len({kind for _, kind, _ in results}) == 5
    for (devices, kind, name), value in results.items():
        expected = results[1, kind.split(",")[0], name]
        np.testing.assert_allclose(
            value, expected, rtol=1e-5, atol=1e-5, err_msg=f"{kind}, {devices} devices: {name}"
        )

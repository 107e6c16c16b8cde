"""The studies: each runs, nothing is done twice, interrupted runs go on, baselines have a size."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax import images, parallel
from dvmsr_jax.checkpoint import Best, CheckpointError, Checkpoints, phase_directory
from dvmsr_jax.config import Compute, DataConfig, ModelConfig, TrainConfig
from dvmsr_jax.cost import cost
from dvmsr_jax.errors import StoppedError, UserError
from dvmsr_jax.model import Weights, build, named_parameters, parameter_count, parameter_shapes
from dvmsr_jax.pretrained import PretrainedError, load_model, load_weights
from dvmsr_jax.training import report as training_report
from dvmsr_jax.training import step
from experiments import __main__ as command
from experiments import harness, networks, report
from experiments.budgets import BUDGETS
from experiments.study import Results, Score, load_studies
from experiments.tasks import Place, Task, in_order, is_done, read_result, result_path
from experiments.training import Best as BestRate
from experiments.training import Training

pytestmark = pytest.mark.usefixtures("optax_promotes_dtypes")

ROOT = Path(__file__).resolve().parents[1]
SMOKE = BUDGETS["smoke"]
STUDIES = load_studies()
BASELINES = [networks.CnnConfig(), networks.RlfnConfig(), networks.WindowsConfig()]
OTHERS = [*BASELINES, networks.AlternatingConfig()]


def name_of(config):
    return config.network


@pytest.fixture(scope="module")
def benchmark_folder(tmp_path_factory):
    """A benchmark of one small picture."""
    folder = tmp_path_factory.mktemp("benchmarks") / "Tiny"
    y, x = np.mgrid[:64, :72] / 9
    waves = [np.sin(x + c) + np.cos(y * c) for c in range(3)]
    images.write_png(folder / "HR" / "a.png", np.uint8(np.stack(waves, -1) * 63 + 127))
    return folder


@pytest.fixture
def place(tmp_path, photos, benchmark_folder):
    data = DataConfig(hr_dirs=(photos,), data_dir=photos.parent / "records", val_images=1)
    return Place(tmp_path / "results", tmp_path / "work", data, (benchmark_folder,))


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory, photos, benchmark_folder):
    """A place for all studies, as they share runs."""
    folder = tmp_path_factory.mktemp("experiments")
    data = DataConfig(hr_dirs=(photos,), data_dir=photos.parent / "records", val_images=1)
    return Place(folder / "results", folder / "work", data, (benchmark_folder,))


# Networks


@pytest.mark.parametrize("config", BASELINES, ids=name_of)
def test_baselines_are_as_large_as_the_student(config):
    sizes = {
        kind: sum(np.prod(shape, dtype=int) for shape in parameter_shapes(network).values())
        for kind, network in (("theirs", config), ("ours", ModelConfig()))
    }
    assert sizes["ours"] == 424_428
    assert abs(sizes["theirs"] / sizes["ours"] - 1) < 0.02


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", OTHERS, ids=name_of)
def test_shapes(config, precision):
    config = dataclasses.replace(SMOKE.network(config), scale=3)
    model = build(config, compute=Compute(precision=precision), rngs=nnx.Rngs(0))
    image = jax.random.uniform(jax.random.key(0), (2, 13, 21, 3))
    upscaled, features = nnx.jit(lambda model, image: model.with_features(image))(model, image)
    assert upscaled.shape == (2, 39, 63, 3)
    assert len(features.rssbs) == config.blocks == 1
    for x in jax.tree.leaves((upscaled, features)):
        assert x.dtype == jnp.float32
        assert np.isfinite(x).all()
    for x in jax.tree.leaves(features):
        assert x.shape == (2, 13, 21, 12)


@pytest.mark.parametrize("config", BASELINES, ids=name_of)
def test_a_step_lowers_the_loss(config):
    config = dataclasses.replace(SMOKE.base, model=SMOKE.network(config), steps=100)
    mesh = parallel.make_mesh(2)
    state = parallel.replicate(step.init_state(config, None), mesh)
    take_step = step.TrainStep(config, mesh)
    lr = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    batch = parallel.shard_batch({"lr": lr, "hr": lr.repeat(4, 1).repeat(4, 2)}, mesh)
    losses = []
    for _ in range(3):
        state, metrics = take_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("config", BASELINES, ids=name_of)
def test_every_kernel_counts_once_a_pixel(config):
    kernels = [
        np.prod(shape, dtype=int)
        for name, shape in parameter_shapes(config).items()
        if name.endswith(".kernel")
    ]
    expected = sum(kernels) * 16 * 24
    if isinstance(config, networks.WindowsConfig):  # scores and sums of values
        attention = 2 * config.window**2 * config.channels
        expected += config.depth * config.layers * attention * 16 * 24
    found = cost(config, 16, 24).macs
    if isinstance(config, networks.RlfnConfig):  # where attention is coarse, kernels count less
        assert 0.85 * expected < found < expected
    else:
        assert found == expected


def test_shifted_windows_do_not_wrap_around():
    config = networks.WindowsConfig(channels=12, depth=1)
    layer = networks.WindowLayer(config, True, Compute(), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 12))

    def changed_by(row, column):
        # Not all channels alike, which the norm would take out again.
        y = layer(x.at[0, row, column, 0].add(1.0))
        return np.argwhere(np.asarray(y != layer(x))[0].any(-1))

    for pixel, low, high in (((15, 15), 12, 15), ((0, 0), 0, 3), ((8, 8), 4, 11)):
        changed = changed_by(*pixel)
        assert changed.min() == low
        assert changed.max() == high


def test_alternate_rssbs_read_columns():
    config = dataclasses.replace(SMOKE.network(networks.AlternatingConfig()), rssbs=3)
    parameters = named_parameters(build(config, rngs=nnx.Rngs(0)))
    # Or else what the scans remember would be lost in rounding.
    louder = {name: x * (30 if "x_proj" in name else 1) for name, x in parameters.items()}
    model = Weights(config, louder).model()
    x = jax.random.normal(jax.random.key(0), (1, 9, 9, 12))

    def reaches(rssb, start, end):
        """Whether a pixel influences another far away."""
        y = rssb(x.at[(0, *start, 0)].add(1.0))
        return bool(np.asarray(y != rssb(x))[(0, *end)].any())

    rows, columns, rows_again = model.rssbs
    for rssb in (rows, rows_again):
        assert reaches(rssb, (2, 8), (6, 0))
        assert not reaches(rssb, (6, 0), (2, 8))
    assert reaches(columns, (8, 2), (0, 6))
    assert reaches(columns, (6, 0), (2, 8))
    assert not model.streams


def test_checkpoints_of_other_networks(tmp_path):
    config = dataclasses.replace(
        SMOKE.base, model=SMOKE.network(networks.CnnConfig()), workdir=tmp_path
    )
    state = step.init_state(config, None)
    checkpoints = Checkpoints(config)
    checkpoints.save(1, Best(), state.ema, state._replace(ema={}))
    checkpoints.close()
    weights = load_weights(phase_directory(config))
    assert weights.config == config.model
    with pytest.raises(PretrainedError, match="holds a Cnn, not a DVMSR"):
        load_model(phase_directory(config))
    same = Checkpoints(config)
    assert same.restore(state.ema, state._replace(ema={})).step == 1
    same.close()
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=3))
    again = Checkpoints(other, allow_changes=True)
    with pytest.raises(CheckpointError, match=r"model.depth: 1 there, 3 now"):
        again.restore(state.ema, state._replace(ema={}))
    again.close()


# Studies


@pytest.fixture(scope="module")
def finished(shared_place):
    """Runs a study, once; returns its tasks."""
    done = {}

    def finish(name):
        if name not in done:
            done[name] = STUDIES[name].tasks(SMOKE)
            with jax.numpy_dtype_promotion("standard"):
                harness.run(harness.possible(done[name]), shared_place)
        return done[name]

    return finish


@pytest.mark.parametrize("name", STUDIES)
def test_studies_run_and_report(name, finished, shared_place, tmp_path):
    tasks = [task for task in finished(name) if task.possible]
    assert all(is_done(task, shared_place) for task in tasks)
    document = tmp_path / "studies.md"
    report.write({name: STUDIES[name]}, SMOKE, shared_place, document)
    text = document.read_text()
    assert STUDIES[name].question in text
    assert "Not yet" not in text
    assert "nan" not in text
    assert (tmp_path / "studies" / f"{name}.png").stat().st_size > 5_000
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("../experiments/") or (tmp_path / link).exists()


@pytest.mark.parametrize("name", STUDIES)
def test_reports_cope_with_missing_results(name, finished, shared_place, tmp_path):
    everything = {task.id: task for task in in_order(finished(name)) if task.possible}
    for number, task in enumerate(everything.values()):
        place = dataclasses.replace(shared_place, results=tmp_path / f"{number}")
        place.results.mkdir()
        source = result_path(task, shared_place)
        result_path(task, place).write_text(source.read_text())
        report.write({name: STUDIES[name]}, SMOKE, place, tmp_path / "one.md")


def test_results_are_complete(finished, shared_place):
    (task,) = {x.id: x for x in finished("depth") if isinstance(x, Training)}.values()
    stored = json.loads(result_path(task, shared_place).read_text())
    assert {"machine", "version", "seconds", "peak_memory", "date"} < stored.keys()
    result = stored["result"]
    assert result["config"]["step"] == result["config"]["steps"] == 2
    assert result["config"]["seed"] == 0
    assert result["config"]["model.channels"] == 12
    weights = load_weights(task.weights(shared_place))
    assert result["parameters"] == parameter_count(weights.model())
    assert result["macs"] == cost(weights.config, 256, 256).macs
    lines = training_report.read_metrics(task.weights(shared_place) / "metrics.jsonl")
    assert result["scores"]["validation"]["psnr_y"] == pytest.approx(lines[-1]["val_psnr_y"])
    assert set(result["scores"]) == {"validation", "Tiny"}
    text = result_path(task, shared_place).read_text()
    assert str(shared_place.work) not in text


def test_learning_rates_are_chosen_by_validation(finished, shared_place):
    tasks = finished("baselines")
    best = next(task for task in tasks if isinstance(task, BestRate) and task.name == "CNN")
    scores = {
        candidate.config.optim.learning_rate: read_result(candidate, shared_place)["scores"][
            "validation"
        ]["psnr_y"]
        for candidate in best.candidates
    }
    assert set(scores) == set(SMOKE.rates)
    rate = max(scores, key=scores.__getitem__)
    longer = next(task for task in tasks if task.name == "CNN, five times as long")
    assert longer.resolved(shared_place).optim.learning_rate == rate
    used = read_result(longer, shared_place)["config"]
    assert used["optim.learning_rate"] == rate
    assert used["step"] == 5 * SMOKE.base.steps
    assert read_result(best, shared_place)["config"]["optim.learning_rate"] == rate


def test_a_rate_that_diverges_is_not_chosen(finished, shared_place, tmp_path):
    good = next(task for task in finished("baselines") if isinstance(task, Training))
    optim = dataclasses.replace(good.config.optim, learning_rate=1e30, clip=0.0)
    bad = Training("too fast", dataclasses.replace(good.config, optim=optim))
    best = BestRate("tuned", (bad, good))
    harness.run([bad, best], shared_place)
    diverged = read_result(bad, shared_place)
    assert re.fullmatch(r"the (loss|norm of the weights) is \w+ at step \d", diverged["diverged"])
    assert best.choice(shared_place) == good
    with pytest.raises(UserError, match="every learning rate diverged"):
        BestRate("hopeless", (bad,)).choice(shared_place)
    assert Results([bad, good], shared_place).names() == [good.name]


def test_students_have_their_teacher(finished, shared_place):
    students = [task for task in finished("distillation") if getattr(task, "teacher", None)]
    assert students
    for student in students:
        path = student.resolved(shared_place).distill.teacher
        assert path == student.teacher.weights(shared_place)
        assert student.teacher.seed != student.seed
        metrics = training_report.read_metrics(student.weights(shared_place) / "metrics.jsonl")
        assert metrics[0]["distill_loss"] > 0


def test_finished_studies_are_not_run_again(finished, shared_place, monkeypatch):
    tasks = harness.possible(finished("depth"))

    def refuse(self, place):
        raise AssertionError(self)

    monkeypatch.setattr(Training, "run", refuse)
    harness.run(tasks, shared_place)
    # Tasks that need nothing but what is there can do without training.
    assert harness.without_training(tasks, shared_place) == tasks
    elsewhere = dataclasses.replace(shared_place, results=shared_place.results / "none")
    assert not any(
        isinstance(task, Training) for task in harness.without_training(tasks, elsewhere)
    )


def test_an_interrupted_run_goes_on(place, monkeypatch):
    config = dataclasses.replace(SMOKE.base, model=SMOKE.network(SMOKE.base.model), steps=4)
    (whole,) = (task,) = [Training("run", config)]
    apart = dataclasses.replace(place, results=place.results / "2", work=place.work / "2")
    harness.run([whole], apart)

    scalars = training_report.Log.scalars

    def interrupt(self, at, values):
        scalars(self, at, values)
        if at == 2 and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training_report.Log, "scalars", interrupt)
        with pytest.raises(StoppedError, match="stopped after step 3"):
            harness.run([task], place)
    assert not is_done(task, place)
    harness.run([task], place)
    first, second = (read_result(task, where) for where in (apart, place))
    del first["training_seconds"], second["training_seconds"]
    assert first == second
    metrics = training_report.read_metrics(task.weights(place) / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4]


def test_a_lost_checkpoint_is_named(place):
    config = dataclasses.replace(SMOKE.base, model=SMOKE.network(SMOKE.base.model))
    with pytest.raises(UserError, match="train it again by removing"):
        Training("run", config).weights(place)


@pytest.mark.parametrize("damage", ["", "[]", "{}"])
def test_damaged_results_are_named(damage, place):
    task = STUDIES["depth"].tasks(SMOKE)[0]
    place.results.mkdir()
    result_path(task, place).write_text(damage)
    with pytest.raises(UserError, match=f"{task.id}.json: is not a result"):
        Results([task], place)


# Sharing


@dataclasses.dataclass(frozen=True)
class Slow(Task):
    """Counts how often it was run, in a file."""

    name: str
    needed: tuple[Task, ...] = ()
    kind = "slow"

    @property
    def needs(self):
        return self.needed

    @property
    def facts(self):
        return {"name": self.name}

    def seconds(self):
        return 1.0

    def run(self, place):
        assert all(is_done(task, place) for task in self.needs)
        time.sleep(0.02)
        with (place.work / f"{self.id}.runs").open("a") as file:
            file.write(f"{threading.get_ident()}\n")
        return {}


def test_processes_share_tasks(place, monkeypatch):
    """Threads stand for processes: each opens the locks for itself."""
    monkeypatch.setattr(harness, "POLL", 0.01)
    first = [Slow(f"{i}") for i in range(12)]
    tasks = harness.possible([*first, *(Slow(f"after {x}", (x,)) for x in first[::-1])])
    workers = [threading.Thread(target=harness.run, args=(tasks, place)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    runs = [(place.work / f"{task.id}.runs").read_text().splitlines() for task in tasks]
    assert all(len(run) == 1 for run in runs)
    assert len({run[0] for run in runs}) > 1
    assert len(list(place.results.glob("*.json"))) == len(tasks) == 24


def start(place, *arguments):
    command = [sys.executable, "-m", "experiments", *arguments, "--budget", "smoke"]
    command += ["--folder", place.work, "--results", place.results]
    command += ["--hr-dirs", *place.data.hr_dirs, "--data-dir", place.data.data_dir]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(place.work / "compiled")
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def started_tasks(output):
    return re.findall(r"^\[\d+/\d+, .* left\] (.*)$", output, re.MULTILINE)


def test_killed_and_shared_processes(place):
    """One process is killed in its training run; two others finish the study between them."""
    with start(place, "depth") as killed:
        output = []
        for line in killed.stdout:
            output.append(line)
            if "teacher: steps 0 to" in line:
                break
        killed.kill()
    assert killed.returncode == -signal.SIGKILL, output
    assert not list(place.results.glob("**/*.json"))
    with start(place, "depth") as one, start(place, "depth") as other:
        outputs = [process.communicate(timeout=300)[0] for process in (one, other)]
    assert one.returncode == other.returncode == 0, outputs
    started = [task for output in outputs for task in started_tasks(output)]
    assert sorted(started) == ["2 x 1, seed 0", "time of 2 x 1"]


# Reports


def test_the_report_is_that_of_the_results(tmp_path, monkeypatch):
    place = command.place_of(command.parse([]))
    monkeypatch.chdir(ROOT)
    document = ROOT / "docs" / "studies.md"
    found = tmp_path / "docs" / "studies.md"
    results = dataclasses.replace(place, results=ROOT / place.results)
    report.write(STUDIES, BUDGETS["cpu"], results, found)
    expected = document.read_text()
    outside = os.path.relpath(results.results, found.parent)
    assert found.read_text().replace(outside, "../experiments/results/cpu") == expected
    pictures = sorted(path.name for path in (tmp_path / "docs" / "studies").glob("*"))
    assert pictures == sorted(path.name for path in (ROOT / "docs" / "studies").glob("*"))


def test_small_differences_are_none(place):
    @dataclasses.dataclass(frozen=True)
    class Scored(Slow):
        seed: int = 0
        psnr_y: float = 0.0

        @property
        def facts(self):
            return {"name": self.name, "seed": self.seed}

        def run(self, place):
            return {"scores": {"validation": {"psnr_y": self.psnr_y}}}

    values = {"a": (30.0, 30.2), "b": (30.1, 30.3), "c": (31.0, 31.2), "wild": (28.0, 32.0)}
    calm = ["a", "b", "c"]
    tasks = [Scored(x, (), i, y) for x, both in values.items() for i, y in enumerate(both)]
    harness.run(tasks, place)
    results = Results(tasks, place)
    assert str(results.score("a")) == "30.10 ± 0.14"
    assert results.noise(calm) == pytest.approx(0.02**0.5)
    assert results.noise() == pytest.approx(((3 * 0.02 + 8) / 4) ** 0.5)
    assert results.compare("b", "a", calm) == "none (+0.10 ± 0.14 dB)"
    assert results.compare("c", "a", calm) == "+1.00 ± 0.14 dB"
    assert results.compare("c", "a") == "none (+1.00 ± 1.42 dB)"
    alone = Results([task for task in tasks if task.seed == 0], place)
    assert alone.compare("c", "a") == "+1.00 dB (one seed)"
    assert alone.score("a") == Score((30.0,))


# The command line


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["experiments", *map(str, arguments)])
    command.main()
    return capsys.readouterr().out


def test_overview_and_dry_run(monkeypatch, capsys, tmp_path):
    folders = ("--results", tmp_path / "results", "--folder", tmp_path / "work")
    lines = run_command(monkeypatch, capsys, *folders).splitlines()
    assert [line.split()[0] for line in lines[:7]] == list(STUDIES)
    assert all(" 0 of " in line for line in lines[:8])
    lines = run_command(monkeypatch, capsys, "depth", "--dry-run", *folders).splitlines()
    assert sum("seed 1" in line for line in lines) == 14
    days = run_command(monkeypatch, capsys, "depth", "--dry-run", "--budget", "paper", *folders)
    assert "days left" in days
    assert not (tmp_path / "work").exists()
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, capsys, "width", *folders)
    assert stop.value.code.startswith("error: there is no study 'width'; there are baselines")


def test_the_night_budget_is_a_night():
    tasks = {
        x.id: x for study in STUDIES.values() for x in harness.possible(study.tasks(BUDGETS["cpu"]))
    }
    assert sum(task.seconds() for task in tasks.values()) < 10 * 3_600


def test_equal_tasks_have_equal_identifiers():
    """Whatever their name, and in every process."""
    first, second = (
        Training(name, TrainConfig(phase="teacher", model=ModelConfig(rssbs=2))) for name in "ab"
    )
    assert first.facts == {
        "config": {"phase": "teacher", "model.rssbs": 2, "seed": 0},
        "needs": [],
    }
    assert first.id == second.id == "training-ca8ba87536"
    assert dataclasses.replace(first, seed=1).id != first.id
    moved = dataclasses.replace(first.config, workdir=Path("elsewhere"))
    assert dataclasses.replace(first, config=moved).id == first.id
    wider = dataclasses.replace(first.config, model=ModelConfig(rssbs=2, channels=61))
    assert dataclasses.replace(first, config=wider).id != first.id

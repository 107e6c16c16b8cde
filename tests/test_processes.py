"""Whole processes: several together, killed ones, and full disks."""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dvmsr_jax import images, parallel
from dvmsr_jax.checkpoint import load_weights
from dvmsr_jax.config import Cluster
from dvmsr_jax.errors import UserError
from dvmsr_jax.training.report import Log, read_metrics
from tests import crash_resume

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--preset=demo",
    "--model.channels",
    "8",
    "--model.rssbs",
    "1",
    "--model.states",
    "4",
    "--model.drop-path",
    "0.2",
    "--data.lr-crop",
    "8",
    "--data.batch-size",
    "8",
    # Adam takes a full step even if a gradient is nearly zero. A high rate would therefore magnify
    # the rounding differences of sums over processes.
    "--optim.learning-rate",
    "2e-4",
    "--steps",
    "6",
    "--log-every",
    "1",
    "--checkpoint-every",
    "2",
    "--val-every",
    "3",
]


@pytest.fixture
def photos(tmp_path):
    """Pictures of noise."""
    rng = np.random.default_rng(0)
    for i in range(4):
        images.write_png(
            tmp_path / "photos" / f"{i}.png", rng.integers(0, 256, (90, 96, 3), np.uint8)
        )
    return tmp_path / "photos"


@pytest.fixture
def start(tmp_path, photos):
    """start(phase, name, devices, *options): a process that trains in the folder `name`.

    It takes others for lost after `silence` seconds.
    """
    processes = []

    def start(phase, name, devices, *options, silence=parallel._SILENCE):
        program = f"from dvmsr_jax import parallel; parallel._SILENCE = {silence}; "
        program += "from dvmsr_jax.commands import train; train.main()"
        words = ["--workdir", tmp_path / name, "--data.hr-dirs", photos]
        words += ["--data.data-dir", tmp_path / "records"]
        flags = f"--xla_force_host_platform_device_count={devices}"
        process = subprocess.Popen(
            [sys.executable, "-c", program, f"--phase={phase}", *SMALL, *words, *options],
            cwd=ROOT,
            env=os.environ
            | {
                "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def finish(*processes, status=0):
    """Waits until they end with this status, and returns their output."""
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output
    return outputs


def pair(start, phase, name, *options, devices=(2, 2), **others):
    """Two processes with these numbers of devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    addresses = ["--cluster.coordinator-address", f"localhost:{port}", "--cluster.num-processes=2"]
    return [
        start(phase, name, count, *options, *addresses, f"--cluster.process-id={i}", **others)
        for i, count in enumerate(devices)
    ]


def assert_same_run(one, other, **tolerance):
    """The same losses at the same steps, and the same weights."""
    logs = [
        {
            line["step"]: line["loss"]
            for line in read_metrics(run / "metrics.jsonl")
            if "loss" in line
        }
        for run in (one, other)
    ]
    assert sorted(logs[0]) == list(range(1, 7))
    np.testing.assert_allclose(*(list(log.values()) for log in logs), **tolerance)
    expected, found = load_weights(one).parameters, load_weights(other).parameters
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, **tolerance, err_msg=name)


def test_two_processes_equal_one(start, tmp_path):
    """In both phases; in the student's, a signal stops them before they resume."""
    finish(start("teacher", "one", 4))
    _, second = finish(*pair(start, "teacher", "two"))
    assert "step/s" not in second  # only the first one prints
    assert_same_run(tmp_path / "one/teacher", tmp_path / "two/teacher", rtol=1e-5, atol=1e-5)

    options = ["--distill.teacher", tmp_path / "one/teacher", "--data.degradation=mild"]
    options += ["--data.zoom-in=0.3", "--data.zoom-out=0.2"]
    finish(start("student", "one", 4, *options))
    both = pair(start, "student", "two", *options)
    while not read_metrics(tmp_path / "two/student/metrics.jsonl"):
        assert both[0].poll() is None, both[0].communicate()[0]
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)  # the logging process must stop, too
    first, _ = finish(*both, status=130)
    assert re.search(r"stopped after step [1-5]; the same command resumes", first), first
    cached = ("--data.cache", "device")  # which must not matter, either
    first, _ = finish(*pair(start, "student", "two", *options, *cached))
    assert not re.search("steps 0 to 6", first), first
    assert_same_run(tmp_path / "one/student", tmp_path / "two/student", rtol=1e-5, atol=1e-5)


def errors_of(outputs):
    """The error lines of each; none may be a traceback or an abort by JAX."""
    for output in outputs:
        assert not re.search("Traceback|stack trace", output), output
    return [re.findall("^error: .*", output, re.MULTILINE) for output in outputs]


def test_an_error_in_one_process_ends_all(start, tmp_path):
    """With one line in each: here, only the first one finds the folder in use."""
    folder = tmp_path / "taken" / "teacher"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outputs = finish(*pair(start, "teacher", "taken"), status=1)
    expected = f"error: another run is writing to {folder}; stop it, or use another --workdir"
    assert errors_of(outputs) == [[expected]] * 2


def test_uneven_processes(start):
    outputs = finish(*pair(start, "teacher", "uneven", devices=(1, 3)), status=1)
    for (line,) in errors_of(outputs):
        assert line.startswith("error: the processes have different numbers of devices (1, 3)")


def test_a_lost_process_ends_the_others(start, tmp_path):
    # In earnest it is a minute, within the 100 s after which JAX would abort.
    first, second = pair(start, "teacher", "lost", "--steps=100000", silence=10)
    while not read_metrics(tmp_path / "lost/teacher/metrics.jsonl"):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    second.kill()
    (line,) = errors_of(finish(first, status=1))[0]
    assert re.match(r"error: (another process|process 1) of the run has ended or does not", line)


def test_a_late_process_is_not_waited_for(start):
    addresses = ["--cluster.coordinator-address=localhost:0", "--cluster.num-processes=2"]
    alone = start("teacher", "late", 1, *addresses, "--cluster.process-id=0", "--cluster.timeout=2")
    (line,) = errors_of(finish(alone, status=1))[0]
    assert line.startswith("error: not all processes of the cluster started within 2 s")


def test_missing_cluster():
    """A timely error, where JAX would abort the process or run it alone."""
    with pytest.raises(UserError, match="localhost:1: no answer"):
        parallel.start(Cluster("localhost:1", num_processes=2, process_id=1, timeout=0))
    with pytest.raises(UserError, match="pass all three or none"):
        parallel.start(Cluster("localhost:1"))
    with pytest.raises(UserError, match="pass all three or none"):
        parallel.start(Cluster("localhost:1", num_processes=1))
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_PLATFORMS": "cpu"}
    alone = subprocess.run(
        [sys.executable, ROOT / "train.py", "--phase=teacher"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 1
    assert alone.stderr.startswith("error: the cluster is described incompletely: ")


def test_one_process_is_alone(monkeypatch):
    """In any environment: some look like a TPU pod's but are not."""
    monkeypatch.setattr(jax.distributed, "initialize", None)
    parallel.start(Cluster(num_processes=1))
    assert jax.process_count() == 1


def test_given_addresses_turn_detection_off(monkeypatch):
    """JAX would find SLURM's local rank, and use only the GPU of that number."""
    found = []

    def initialize(*_, cluster_detection_method, **__):
        found.append(cluster_detection_method)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(parallel._failures, "watch", lambda: None)
    parallel.start(Cluster())
    parallel.start(Cluster("localhost:1", num_processes=2, process_id=0))
    assert found == [None, "deactivate"]


def test_numpy_arrays_are_not_gathered_for_comparison(monkeypatch):
    """jax.device_put does that among several processes, and a device cache may be 40 GB."""
    mesh = parallel.make_mesh(jax.device_count())
    monkeypatch.setattr(jax, "device_put", None)
    given = {"x": np.arange(6.0, dtype=np.float32).reshape(2, 3), "nothing": {}}
    copied = parallel.replicate(given, mesh)
    np.testing.assert_array_equal(copied["x"], given["x"])
    assert copied["x"].sharding.is_fully_replicated
    assert copied["x"].sharding.mesh == mesh


def test_killed_runs_end_like_an_undisturbed_one(tmp_path):
    """The short version; `python tests/crash_resume.py` kills a run twenty times."""
    crash_resume.main(tmp_path / "work", kills=2, steps=9, seed=1)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "upscale.py"])
@pytest.mark.parametrize("module", ["numpy", "jax"])
def test_interrupted_at_once(program, module):
    """During imports: the process ends without a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", ROOT / program, "--help"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.stderr.readline().split()[-1:] != [module]:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode in (-signal.SIGINT, 130)  # shells report 130 for the former, too
    assert "Traceback" not in errors


def test_full_disk(start, small_disk, tmp_path):
    """The run ends with a message, and can later resume from the last good checkpoint."""
    finish(start("teacher", "whole", 1))
    process = start("teacher", "small/run", 1)
    while not (small_disk / "run/teacher/checkpoints/2").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process, status=130)

    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    newest = max(int(p.name) for p in (small_disk / "run/teacher/checkpoints").iterdir())
    process = start("teacher", "small/run", 1)
    output = process.communicate(timeout=600)[0]
    if newest < 6:
        assert process.returncode == 1, output
        assert re.search(
            r"^error: .*small/run.*No space left on device.*same command", output, re.MULTILINE
        ), output
        assert "Traceback" not in output
    load_weights(small_disk / "run/teacher/checkpoints" / str(newest))

    filler.unlink()
    finish(start("teacher", "small/run", 1))
    assert_same_run(tmp_path / "whole/teacher", small_disk / "run/teacher", rtol=0, atol=0)


def test_full_disk_under_the_log(small_disk):
    """The message names the folder and says what to do."""
    log = Log(small_disk / "run", 0)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    many = {f"metric_{i}": 1.0 for i in range(9_999)}  # more than is left of the last block
    with pytest.raises(UserError) as caught:
        log.scalars(1, many)
    filler.unlink()
    log.close()
    assert re.fullmatch(
        rf"the log in {small_disk}/run cannot be written \(.*No space left.*\)\. "
        r"Once that is fixed, the same command resumes from the last checkpoint\.",
        str(caught.value),
    )

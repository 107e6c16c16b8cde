"""`make gpu` without a GPU: every part with tiny sizes, and parts that fail, hang or are done."""

import contextlib
import importlib
import itertools
import json
import os
import subprocess
from pathlib import Path

import jax
import pytest
import tyro

from benchmarks import gpu, inference, training
from benchmarks.table import Measured, Table
from dvmsr_jax.config import ModelConfig


@pytest.fixture
def in_this_process(monkeypatch):
    """Processes take long to start."""
    monkeypatch.setattr(gpu.machine, "apart", lambda function, *given: function(*given))
    monkeypatch.setattr(inference, "apart", lambda function, *given: function(*given))


@pytest.fixture
def settings(monkeypatch):
    """Restores JAX's settings, which a benchmark changes."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("in_this_process", "settings", "optax_promotes_dtypes")
def test_dry_run(monkeypatch, tmp_path, capsys):
    """Benchmarks run in this process: small models, and the first rows of the tables of training;
    tests run in theirs, and are skipped."""
    run = gpu.run

    def run_here(command, limit):
        module, *arguments = command
        if module == "benchmarks.checks":
            return run(command, limit)
        tyro.cli(importlib.import_module(module).main, args=arguments)
        return ""

    measure = training.measure
    monkeypatch.setattr(
        training,
        "measure",
        lambda report, title, rows, steps: measure(report, title, itertools.islice(rows, 1), steps),
    )
    small = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4)
    monkeypatch.setattr(inference, "CONFIG", small)
    monkeypatch.setattr(inference, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "run", run_here)
    left_out = "checks", "checks-scan"  # like checks-sizes
    gpu.main([name for name in gpu.PARTS if name not in left_out], smoke=True, results=tmp_path)
    (written,) = tmp_path.glob("*.json")
    parts = json.loads(written.read_text())["parts"]
    assert list(parts) == [name for name in gpu.PARTS if name not in left_out]
    assert all(part["error"] == "" for part in parts.values())
    rows = {name: [len(table["rows"]) for table in part["tables"]] for name, part in parts.items()}
    (tests,) = rows.pop("checks-sizes")
    assert tests == 3 * 2 * 2
    for name in ("scan", "scan-long", "scan-batches"):
        assert rows.pop(name) == [2]  # passes
    for name in ("inference", "inference-bands", "inference-scans"):
        assert rows.pop(name) == [2, 1]  # sizes; how time grows
    assert rows == {"training": [1], "training-memory": [1], "loader": [1 + 2 + 2 + 1]}
    printed = capsys.readouterr().out
    document = written.with_suffix(".md").read_text().splitlines()
    assert {line for line in printed.splitlines() if line.startswith("|")} <= set(document)


PROGRAM = """
import json, subprocess, sys, time
tables = [{"title": "", "columns": ["a"], "text": [], "rows": [[{"value": 1.0}]]}]
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    json.dump({"machine": "", "tables": tables}, file)
with open("RUNS", "a") as file:
    file.write(sys.argv[1] + "\\n")
if sys.argv[1] == "fails":
    sys.exit(3)
if sys.argv[1] == "hangs":
    with open("PID", "w") as file:
        file.write(str(subprocess.Popen(["sleep", "600"]).pid))
    time.sleep(600)
"""


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """A folder in which three parts run: one that fails, one that hangs, and one that works."""
    (tmp_path / "program.py").write_text(PROGRAM.replace("RUNS", "runs").replace("PID", "pid"))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "LIMIT", 3.0)
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    programs = {"scan": "fails", "training": "hangs", "loader": "works"}
    monkeypatch.setattr(
        gpu, "PARTS", {name: ("program", program) for name, program in programs.items()}
    )
    return tmp_path


@pytest.mark.usefixtures("in_this_process")
def test_parts_that_fail_keep_their_tables_and_lose_no_others(parts):
    with pytest.raises(SystemExit, match="not complete: scan, training"):
        gpu.main(smoke=True, results=parts / "results")
    (path,) = (parts / "results").glob("*.json")
    found = json.loads(path.read_text())["parts"]
    reasons = {name: part["error"] for name, part in found.items()}
    expected = {"scan": "exit status 3", "training": "did not end within 3 s", "loader": ""}
    assert reasons == expected
    assert all(Table.of(part["tables"][0]).rows == [[Measured(1.0)]] for part in found.values())
    document = path.with_suffix(".md").read_text()
    assert "**did not end within 3 s**" in document
    assert document.count("commit abc.") == 3
    child = Path("/proc", (parts / "pid").read_text(), "stat")
    assert not child.exists() or ") Z " in child.read_text()  # killed, with the part


@pytest.mark.usefixtures("in_this_process")
def test_parts_are_not_repeated_for_the_same_commit(parts, monkeypatch, capsys):
    def run(*names, **options):
        with contextlib.suppress(SystemExit):
            gpu.main(names, smoke=True, results=parts / "results", **options)
        runs = (parts / "runs").read_text().split()
        (parts / "runs").write_text("")
        return runs

    assert run("loader", "scan") == ["works", "fails"]
    assert run("loader", "scan") == ["fails"]
    assert "loader: in " in capsys.readouterr().out
    assert run("loader", again=True) == ["works"]
    monkeypatch.setattr(gpu, "commit", lambda: "def")
    assert run("loader") == ["works"]
    assert run("loader") == []
    monkeypatch.setattr(gpu, "commit", lambda: "")  # uncommitted changes
    assert run("loader") == run("loader") == ["works"]
    (path,) = (parts / "results").glob("*.json")
    assert set(json.loads(path.read_text())["parts"]) == {"scan", "loader"}
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(SystemExit, match=r"\.json: is not a file of results .*; move it away"):
            gpu.main(("loader",), smoke=True, results=parts / "results")
        assert path.read_text() == content


def test_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert gpu.commit() == ""
    results = tmp_path / "benchmarks" / "results" / "card.json"
    results.parent.mkdir(parents=True)
    (tmp_path / "code.py").write_text("1")
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    clean = gpu.commit()
    assert len(clean) == 40
    results.write_text("{}")
    assert gpu.commit() == clean
    (tmp_path / "code.py").write_text("2")
    assert gpu.commit() == ""


@pytest.mark.usefixtures("in_this_process")
def test_without_a_gpu_there_is_a_message(tmp_path):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match=r"JAX has no NVIDIA GPU here .* `make gpu` installs it"):
        gpu.main(results=tmp_path / "results")
    assert not (tmp_path / "results").exists()

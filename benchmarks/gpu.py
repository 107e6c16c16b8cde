"""Everything that is to be measured and checked on an NVIDIA GPU: `make gpu`.

    python -m benchmarks.gpu
    python -m benchmarks.gpu scan training --again

Each part is a program of its own, and stopped after eight minutes. Its tables so far are kept in
a file for each kind of card, as JSON, with the Markdown beside it. Parts whose results for this
commit and machine are there already are skipped. With uncommitted changes, nothing is skipped.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro

from benchmarks import machine
from benchmarks.table import Table
from dvmsr_jax.files import replacing, write_json

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 480.0  # seconds for a part

Name = Literal[
    "checks",
    "checks-scan",
    "checks-sizes",
    "scan",
    "scan-long",
    "scan-batches",
    "inference",
    "inference-bands",
    "inference-scans",
    "training",
    "training-memory",
    "loader",
]
_INFERENCE = ("benchmarks.inference", "--scans", "auto", "--sizes", "64", "256", "512", "1024")
# The module that each part runs, and its arguments.
PARTS: dict[Name, tuple[str, ...]] = {
    "checks": ("benchmarks.checks", "--select", "not real_sizes and not selective_scan"),
    "checks-scan": ("benchmarks.checks", "--tests", "tests/test_selective_scan.py"),
    "checks-sizes": (
        "benchmarks.checks",
        "--tests",
        "tests/test_triton.py",
        "--select",
        "real_sizes",
    ),
    "scan": ("benchmarks.scan", "--gpu", "--sizes", "1", "65536"),
    "scan-long": ("benchmarks.scan", "--gpu", "--sizes", "1", "1048576"),
    "scan-batches": ("benchmarks.scan", "--gpu", "--sizes", "32", "4096", "128", "4096"),
    "inference": (*_INFERENCE, "--modes", "whole"),
    "inference-bands": (*_INFERENCE, "--modes", "streaming"),
    "inference-scans": (
        *("benchmarks.inference", "--sizes", "256", "--modes", "whole", "--precisions", "float32"),
        *("--scans", "associative", "sequential", "chunked-parallel", "auto"),
    ),
    "training": ("benchmarks.training", "--presets", "paper", "--tables", "phases"),
    "training-memory": ("benchmarks.training", "--presets", "paper", "--tables", "savers"),
    "loader": ("benchmarks.loader",),
}


class Device(NamedTuple):
    """What JAX computes on."""

    platform: str
    kind: str
    machine: str


def find_device() -> Device:
    """Describes JAX's first device."""
    return Device(jax.default_backend(), jax.devices()[0].device_kind, machine.describe())


def run(command: Iterable[str], limit: float) -> str:
    """Runs a part in a process of its own; returns why it did not end well, or nothing."""
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(limit)
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return f"did not end within {limit:.0f} s"
    finally:  # also if this process is interrupted; with the part's own processes
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def commit() -> str:
    """The commit of this code; "" if it has been changed since, or is not under version control."""
    git = ["git", "-C", str(ROOT)]
    code = [".", ":!benchmarks/results"]
    try:
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", *code], check=True, capture_output=True, text=True
        )
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return "" if changes.stdout else head.stdout.strip()


def markdown(card: str, parts: dict[str, dict[str, Any]]) -> str:
    """All tables of a card's results, with a heading and the machine for each part."""
    sections = [f"# {card}"]
    for name, part in parts.items():
        state = f"commit {part['commit']}" if part["commit"] else "uncommitted code"
        sections += [f"## {name}", f"{part['machine']}; {state}."]
        sections += [f"**{part['error']}**"] * bool(part["error"])
        sections += [Table.of(table).markdown() for table in part["tables"]]
    return "\n\n".join(sections) + "\n"


def main(
    parts: tyro.conf.Positional[tuple[Name, ...]] = (),
    again: bool = False,
    torch: tuple[str, ...] = (),
    results: Path = ROOT / "benchmarks" / "results",
    smoke: bool = False,
) -> None:
    """Runs the parts one after the other, and writes RESULTS/<card>.json and <card>.md.

    Args:
        parts: parts to run. None: all.
        again: also run the parts whose results are there already.
        torch: x4 models in PyTorch to measure beside this one, as FILE.py:CLASS: the published
            code's is models/team07_DVMSR.py:DVMSR in the repository of the NTIRE 2024 challenge.
        results: folder of the results.
        smoke: tiny sizes on any device, to check that everything works.
    """
    try:
        device = machine.apart(find_device)
    except RuntimeError as error:  # JAX_PLATFORMS names what is not there
        sys.exit(f"benchmarks.gpu: JAX does not start: {error}")
    if device.platform != "gpu" and not smoke:
        sys.exit(
            f"benchmarks.gpu: JAX has no NVIDIA GPU here ({device.machine}). It needs a card, its "
            'driver, and JAX with CUDA: `make gpu` installs it, or pip install "jax[cuda13]"'
        )
    path = results / f"{re.sub(r'[^A-Za-z0-9]+', '-', device.kind)}.json"
    try:
        found = json.loads(path.read_text())["parts"] if path.exists() else {}
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"benchmarks.gpu: {path}: is not a file of results ({error}); move it away")
    now = {"commit": commit(), "machine": device.machine}
    failed = []
    for name in parts or PARTS:
        before = found.get(name, {})
        known = now["commit"] and all(before.get(key) == value for key, value in now.items())
        if known and not before["error"] and not again:
            print(f"{name}: in {path} already (--again repeats it)", flush=True)
            continue
        print(f"\n{name}\n", flush=True)
        command = [*PARTS[name]]
        if smoke and command[0] != "benchmarks.checks":  # its tests are skipped without a GPU
            command.append("--smoke")
        if torch and PARTS[name][0] == "benchmarks.inference":
            command += ["--torch", *torch]
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="dvmsr-gpu-") as folder:
            written = Path(folder) / "tables.json"
            reason = run([*command, "--json", str(written)], LIMIT)
            tables = json.loads(written.read_text())["tables"] if written.exists() else []
        seconds = round(time.perf_counter() - start, 1)
        found[name] = {**now, "error": reason, "seconds": seconds, "tables": tables}
        found = {name: found[name] for name in PARTS if name in found}
        write_json(path, {"card": device.kind, "parts": found})
        with replacing(path.with_suffix(".md")) as temporary:
            temporary.write_text(markdown(device.kind, found))
        if reason:
            print(f"benchmarks.gpu: {name}: {reason}", file=sys.stderr)
            failed.append(name)
    print(f"\nResults: {path} and {path.with_suffix('.md').name}")
    if failed:
        sys.exit(f"benchmarks.gpu: not complete: {', '.join(failed)}; run it again for these")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

"""The tests that need an NVIDIA GPU, as a table: `python -m benchmarks.checks`.

They compare the Triton kernels with the specification, also at real sizes and beyond offsets of
2^31, and require the same bits from the same inputs twice, of the scan and of training steps.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import tyro

from benchmarks import machine
from benchmarks.table import Measured, Report

ROOT = Path(__file__).resolve().parents[1]
# A line of pytest's for each test.
_TEST = re.compile(r"tests/(\S.*?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")


def main(
    tests: tuple[str, ...] = ("tests",),
    select: str = "",
    json: Path | None = None,
) -> None:
    """Runs the tests, with a row for each. The exit status is pytest's.

    Args:
        tests: files or folders of tests.
        select: an expression as for pytest's -k. Empty: all tests that need a GPU.
        json: also write the table to this file.
    """
    report = Report(machine.apart(machine.describe), json)
    report.table(("test", "outcome", "time"), text=("test", "outcome"))
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-k", select, *tests]
    # In another process, because pytest and its plugins instrument modules as they are imported.
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        start = time.perf_counter()
        for line in process.stdout:
            seconds, start = time.perf_counter() - start, time.perf_counter()
            if found := _TEST.match(line):
                name, outcome = found.groups()
                report.row([name.replace("|", "\\|"), outcome.lower(), Measured(seconds, "s")])
            else:
                print(line, end="", file=sys.stderr)
    sys.exit(process.returncode)


if __name__ == "__main__":
    tyro.cli(main)

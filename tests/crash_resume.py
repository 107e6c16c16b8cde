"""Kills a training run with SIGKILL at random moments; it must end like an undisturbed one.

python tests/crash_resume.py --kills 20

The moments fall into starting, stepping, validating and writing checkpoints. Both runs must log the
same loss at every step, so that no sample was skipped or repeated, and end with the same bits in
every weight, average and moment of the optimizer.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from dvmsr_jax.checkpoint import read_arrays  # noqa: E402

OPTIONS = (
    "--phase=teacher --preset=demo --model.channels 8 --model.rssbs 1 --model.states 4 "
    "--model.drop-path 0.2 --data.lr-crop 8 --data.batch-size 2 "
    "--log-every 1 --checkpoint-every 3 --val-every 8"
)


class Run:
    """A small run that logs every step, in a folder of its own under `work`."""

    def __init__(self, work: Path, name: str, steps: int):
        self.folder, self._log = work / name / "teacher", work / f"{name}.log"
        self._command = [sys.executable, ROOT / "train.py", *OPTIONS.split()]
        self._command += ["--steps", str(steps), "--workdir", work / name]
        self._command += ["--data.hr-dirs", work / "photos", "--data.data-dir", work / "records"]
        # Programs are compiled once, so that not every kill falls into compiling.
        self._environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_PLATFORMS": "cpu",
        }
        self._steps = steps

    def start(self) -> subprocess.Popen:
        """Starts or resumes it."""
        with self._log.open("a") as log:
            return subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)

    def finish(self) -> None:
        """Runs it to its end."""
        if self.start().wait():
            sys.exit(f"a run failed:\n{self._log.read_text()}")

    def kill_after(self, steps: int, seconds: float) -> bool:
        """Kills it some seconds after it has logged more steps; False if it had already ended."""
        target = max(self.losses(), default=0) + steps
        with self.start() as process:
            while process.poll() is None and max(self.losses(), default=0) < target:
                time.sleep(0.01)
            time.sleep(seconds)
            process.kill()
        if process.returncode > 0:
            sys.exit(f"a run failed:\n{self._log.read_text()}")
        return process.returncode < 0

    def losses(self) -> dict[int, float]:
        """The loss that was logged at each step."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        logged = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        assert len(dict(logged)) == len(logged), "a step was logged twice"
        return dict(logged)

    def arrays(self) -> dict[str, np.ndarray]:
        """The contents of its last checkpoint."""
        step = (self.folder / "checkpoints" / str(self._steps)).absolute()
        items = {item: read_arrays(step / item) for item in ("ema", "state")}
        return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(items)}


def main(work: Path, kills: int, steps: int, seed: int) -> int:
    """Runs and compares both; returns the number of kills before the run had ended.

    Fails with a message or an assertion.
    """
    rng = np.random.default_rng(seed)
    (work / "photos").mkdir(parents=True)
    for i in range(5):
        pixels = rng.integers(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(pixels).save(work / "photos" / f"{i}.png")

    whole, killed = Run(work, "whole", steps), Run(work, "killed", steps)
    begin = time.monotonic()
    whole.finish()
    print(f"undisturbed: {steps} steps in {time.monotonic() - begin:.0f} s", flush=True)
    random.seed(seed)
    done = 0
    while done < kills:
        # Every fourth kill during the start, the others within a few steps of the intended one.
        aim = 0 if done % 4 == 3 else random.randint(1, max(1, steps // kills))
        if not killed.kill_after(aim, random.uniform(0, 0.1 if aim else 10)):
            break
        done += 1
        print(f"kill {done} at step {max(killed.losses(), default=0)}", flush=True)
    killed.finish()

    assert done > 0, "it ended before it could be killed; take more --steps"
    assert killed.losses() == whole.losses()
    assert sorted(whole.losses()) == list(range(1, steps + 1))
    expected, found = whole.arrays(), killed.arrays()
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    temporary = [p for p in (killed.folder / "checkpoints").iterdir() if not p.name.isdigit()]
    assert not temporary, f"left behind: {temporary}"
    print(f"{done} kills, and the same {len(expected)} arrays, bit for bit")
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crash-resume-") as folder:
        done = main(Path(folder), arguments.kills, arguments.steps, arguments.seed)
    if done < arguments.kills:
        sys.exit(f"the run had ended after {done} kills; take more --steps")

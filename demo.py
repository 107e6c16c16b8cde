"""`make demo`: upscales a photograph, trains a small teacher, and distils a small student.

The photographs come with scikit-image: one is held out and shown, the others are for training.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from dvmsr_jax import evaluation, images
from dvmsr_jax.commands import evaluate
from dvmsr_jax.configs import PRESETS
from dvmsr_jax.inference import make_upscaler
from dvmsr_jax.pretrained import load_model
from dvmsr_jax.program import one_line_errors
from dvmsr_jax.registry import DEFAULT
from dvmsr_jax.samples import SAMPLES
from dvmsr_jax.training import report
from dvmsr_jax.training.loop import train

FOLDER = Path("demo")
HELD_OUT = "astronaut"
# The part of the held-out picture that is shown: rows, columns.
SHOWN = slice(40, 260), slice(120, 340)


def main() -> None:
    """Writes the results to FOLDER, and resumes an interrupted run."""
    photos, benchmark = FOLDER / "photos", FOLDER / "held-out"
    for path in SAMPLES:
        folder = benchmark / "HR" if path.stem == HELD_OUT else photos
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)

    (example,) = evaluation.find_benchmarks([benchmark], scale=4)["held-out"]
    print("The default weights on a photograph that they were not trained on:")
    evaluate.run(evaluate.Arguments(data=(benchmark,)))
    compare(example, {"DVMSR": Path(DEFAULT)}, FOLDER / "upscaled.png")
    print(f"See {FOLDER / 'upscaled.png'}. Next, a small teacher and student are trained.")

    phases = {}
    for phase, preset in PRESETS["demo"].items():
        data = dataclasses.replace(preset.data, hr_dirs=(photos,), data_dir=FOLDER / "data")
        phases[phase] = train(dataclasses.replace(preset, workdir=FOLDER, data=data))

    for phase, directory in phases.items():
        print(f"\nThe {phase} on a photograph that it was not trained on:")
        evaluate.run(evaluate.Arguments(ckpt=directory, data=(benchmark,)))

    compare(example, phases, FOLDER / "side_by_side.png")
    report.plot_training(list(phases.values()), FOLDER / "training_curve.png")
    print(f"\nSee {FOLDER / 'side_by_side.png'} and {FOLDER / 'training_curve.png'}.")


def compare(example: evaluation.Example, weights: Mapping[str, Path], target: Path) -> None:
    """Writes part of the picture, upscaled by bicubic and by each model, beside the original."""
    upscaled = {
        label: make_upscaler(load_model(path))(example.lr) for label, path in weights.items()
    }
    images.write_png(target, evaluation.comparison(example, upscaled, SHOWN))


if __name__ == "__main__":
    with one_line_errors(interrupted="interrupted; the same command resumes from there"):
        main()

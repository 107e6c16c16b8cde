"""Scores a model on benchmarks: PSNR-Y and SSIM-Y compared with bicubic, parameters, MACs, time.

    dvmsr evaluate --ckpt PATH --data Set5 Set14
    dvmsr evaluate --ckpt x4-real --data Set5 --degrade blur=1 noise=10 jpeg=50

The default for --data is photographs that come with scikit-image.
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from dvmsr_jax import evaluation, program
from dvmsr_jax.config import Compute
from dvmsr_jax.cost import cost
from dvmsr_jax.errors import printable
from dvmsr_jax.inference import make_upscaler
from dvmsr_jax.model import parameter_count
from dvmsr_jax.pretrained import load_model
from dvmsr_jax.program import keep_compiled_programs, one_line_errors
from dvmsr_jax.registry import DEFAULT

# Metrics in the table; --json adds others.
METRICS = ("psnr_y", "ssim_y")
# The size for which papers state the cost of x4 models.
COST_SIZE = 256


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    ckpt: Path = Path(DEFAULT)
    """A name of weights (see checkpoints/README.md), a checkpoint directory (WORKDIR/PHASE), a
    .safetensors file or a published .pth file."""
    data: tuple[Path, ...] = ()
    """Benchmarks (folders with HR/ and, optionally, LR/), or folders of several benchmarks.
    Default: photographs from scikit-image."""
    degrade: tuple[str, ...] = ()
    """Degrade the LR pictures: blur=SIGMA (in LR pixels), noise=SIGMA (in levels of 255) and
    jpeg=QUALITY, in this order. grid: every combination of them, including none."""
    json: Path | None = None
    """Also write the scores to this file."""
    save_images: Path | None = None
    """Write the upscaled pictures under this folder."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = field(default_factory=Compute)
    self_ensemble: bool = False
    """Average over the eight flips and rotations of each picture."""


def parse(arguments: Sequence[str]) -> Arguments:
    """Parses the command line."""
    return tyro.cli(
        Arguments, args=arguments, prog=program.name(), description=program.described(__doc__)
    )


def run(arguments: Arguments) -> dict[str, Any]:
    """Evaluates, prints a table line by line, and returns the contents for --json."""
    model = load_model(arguments.ckpt, compute=arguments.compute)
    program.warn_of_bfloat16(arguments.compute)
    scale = model.config.scale
    if arguments.data:
        found = evaluation.find_benchmarks(arguments.data, scale)
    else:
        found = {"samples": evaluation.sample_benchmark(scale)}
    benchmarks: dict[str, evaluation.Benchmark | evaluation.Degraded] = {**found}
    if arguments.degrade:
        cells = evaluation.parse_degradations(arguments.degrade)
        benchmarks = {
            f"{name} {cell}": evaluation.Degraded(benchmark, strengths)
            for name, benchmark in found.items()
            for cell, strengths in cells.items()
        }
    upscale = make_upscaler(model, self_ensemble=arguments.self_ensemble)

    width = max(12, *(len(printable(name)) for name in benchmarks))
    row = (f"{{:{width}}}" + " {:>6} {:>10} {:>8} {:>10} {:>8} {:>10}").format
    print(row("x" + str(scale), "images", "PSNR-Y", "SSIM-Y", "bicubic", "", "s/image"))
    datasets = {}
    for name, examples in benchmarks.items():
        scores, seconds = evaluation.evaluate(
            upscale, examples, scale, name=name, save_dir=arguments.save_images
        )
        datasets[name] = scores
        numbers = [of[metric] for of in (scores, scores["bicubic"]) for metric in METRICS]
        formatted = [f"{x:.4f}" if i % 2 else f"{x:.3f}" for i, x in enumerate(numbers)]
        mean_seconds = statistics.mean(seconds.values())
        print(row(printable(name), len(seconds), *formatted, f"{mean_seconds:.2f}"), flush=True)

    costs = cost(model.config, COST_SIZE, COST_SIZE)
    parameters = parameter_count(model)
    print(
        f"{parameters:,} parameters; at {COST_SIZE}x{COST_SIZE} {costs.macs / 1e9:.2f} GMACs "
        f"and {costs.scan_flops / 1e9:.2f} GFLOPs of scans "
        f"(papers' usual count: {costs.usual_macs / 1e9:.2f} GMACs)"
    )
    facts = {"ckpt": str(arguments.ckpt), "parameters": parameters, **costs._asdict()}
    facts |= {"config": dataclasses.asdict(model.config), "self_ensemble": arguments.self_ensemble}
    return {"model": facts, "datasets": datasets}


def main() -> None:
    """Runs the program."""
    with one_line_errors(out_of_memory="leave out the largest pictures"):
        arguments = parse(sys.argv[1:])
        keep_compiled_programs()
        result = run(arguments)
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")

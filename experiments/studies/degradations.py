"""PSNR-Y against the strength of blur, noise and JPEG."""

from dataclasses import dataclass
from typing import Any

import matplotlib.figure
import numpy as np

from dvmsr_jax import evaluation, images
from dvmsr_jax.data import degradations
from dvmsr_jax.inference import make_upscaler
from experiments.budgets import Budget
from experiments.probes import Probe, Source, pictures
from experiments.studies.baselines import CNN, OTHERS, tuned
from experiments.study import Results, Section, Study, legend, markdown
from experiments.tasks import Facts, Place, Task

STRENGTHS: dict[str, tuple[float, ...]] = {
    "blur": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0),
    "noise": (0.0, 2.0, 5.0, 10.0, 20.0, 30.0),
    "jpeg": (100, 90, 75, 50, 30, 10),
}
UNITS = {"blur": "sigma, LR pixels", "noise": "sigma, levels of 255", "jpeg": "quality"}
WEIGHTS = ("x4", "x4-real")
# The picture that is shown, its part in HR pixels, and the degradations that it is shown with.
SHOWN, PART = "chelsea", (slice(64, 192), slice(144, 304))
CELLS: tuple[dict[str, Any], ...] = ({}, {"blur": 1.0}, {"noise": 10.0}, {"jpeg": 50})


class Curves(Probe):
    """The scores of weights on pictures that are degraded more and more."""

    kind = "curves"

    @property
    def facts(self) -> Facts:
        """See Task."""
        return {**super().facts, "strengths": {name: list(x) for name, x in STRENGTHS.items()}}

    def seconds(self) -> float:
        """See Task."""
        return 300.0

    def run(self, place: Place) -> Facts:
        """PSNR-Y for each degradation, benchmark and strength, of the weights and of bicubic."""
        model = self.load(place)
        upscale, scale = make_upscaler(model), model.config.scale
        found: Facts = {degradation: {} for degradation in STRENGTHS}
        for degradation, strengths in STRENGTHS.items():
            for name, benchmark in pictures(place, scale).items():
                curve: dict[str, list[float]] = {"psnr_y": [], "bicubic": []}
                for strength in strengths:
                    degraded = evaluation.Degraded(benchmark, {degradation: strength})
                    label = f"{name} {degradation}={strength:g}"
                    scores, _ = evaluation.evaluate(upscale, degraded, scale, name=label)
                    curve["psnr_y"].append(round(scores["psnr_y"], 4))
                    curve["bicubic"].append(round(scores["bicubic"]["psnr_y"], 4))
                found[degradation][name] = curve
        return found


@dataclass(frozen=True)
class Crops(Probe):
    """Part of a photograph, degraded and upscaled, as a picture beside the result."""

    kind = "crops"

    @property
    def facts(self) -> Facts:
        """See Task."""
        part = [[side.start, side.stop] for side in PART]
        return {**super().facts, "picture": SHOWN, "part": part, "cells": list(CELLS)}

    def seconds(self) -> float:
        """See Task."""
        return 20.0

    def run(self, place: Place) -> Facts:
        """Writes the picture; the result is its name."""
        model = self.load(place)
        upscale, scale = make_upscaler(model), model.config.scale
        (shown,) = (x for x in evaluation.sample_benchmark(scale) if x.name == SHOWN)
        panels = {"original": shown.hr[PART]}
        for cell in CELLS:
            label = " ".join(f"{name} {x:g}" for name, x in cell.items()) or "clean"
            panels[label] = upscale(degradations.apply(shown.lr, **cell))[PART]
        images.write_png(place.results / f"{self.id}.png", images.side_by_side(panels))
        return {"picture": f"{self.id}.png"}


def tasks(budget: Budget) -> list[Task]:
    """Curves of the weights with names and of the trained CNN, and pictures to look at."""
    cnn, _ = tuned(budget, CNN, OTHERS[CNN])
    named: dict[str, Source] = {name: name for name in WEIGHTS}
    sources = budget.some({**named, CNN: cnn})
    curves = (Curves(name, source) for name, source in sources.items())
    return [*curves, *(Crops(f"{name}, crops", source) for name, source in sources.items())]


def report(results: Results) -> Section:
    """Table, figure and answer."""
    names = (*WEIGHTS, CNN)
    figure = matplotlib.figure.Figure(figsize=(11, 3.8), layout="constrained")
    rows, answers = [], []
    for axes, (degradation, strengths) in zip(
        figure.subplots(1, 3), STRENGTHS.items(), strict=True
    ):
        curves = {}
        for name in names:
            for found in results.of(name):
                on = next(iter(found[degradation]))  # the first benchmark
                curves["bicubic"] = found[degradation][on]["bicubic"]
                curves[name] = found[degradation][on]["psnr_y"]
                axes.set_title(on)
        for name, values in curves.items():
            axes.plot(range(len(strengths)), values, ":" if name == "bicubic" else "-", label=name)
            rows.append([degradation, name, *(f"{value:.2f}" for value in values)])
        axes.set_xticks(range(len(strengths)), [f"{x:g}" for x in strengths])
        axes.set(xlabel=f"{degradation}: {UNITS[degradation]}", ylabel="PSNR-Y, dB")
        axes.grid(alpha=0.3)
        legend(axes)
        if set(WEIGHTS) <= curves.keys():
            clean, real = (np.array(curves[name]) for name in WEIGHTS)
            better = [f"{x:g}" for x, gain in zip(strengths, real - clean, strict=True) if gain > 0]
            answers.append(
                f"{degradation}: {WEIGHTS[1]} is better at {', '.join(better) or 'no strength'}, "
                f"by up to {max(real - clean):.1f} dB"
            )
    blocks = []
    for degradation, strengths in STRENGTHS.items():
        mine = [row[1:] for row in rows if row[0] == degradation]
        if mine:
            blocks.append(markdown([degradation, *(f"{x:g}" for x in strengths)], mine))
    pictures = [
        f"![{name}: {SHOWN}, degraded and upscaled]({{results}}/{found['picture']})"
        for name in names
        for found in results.of(f"{name}, crops")
    ]
    return Section(
        "; ".join(answers) + "." if answers else "", "\n\n".join([*blocks, *pictures]), figure
    )


STUDY = Study(
    question="How does quality fall with blur, noise and compression?",
    paper="All pictures are shrunk by bicubic, and clean.",
    how="""
    The LR pictures are degraded by one means at a time, as by `evaluate.py --degrade`. `x4` was
    trained on clean pictures, `x4-real` on degraded ones, and the CNN on clean ones, with the
    budget of the other studies.
    """,
    limits="PSNR rewards smooth results on noisy pictures. Real pictures combine degradations.",
    tasks=tasks,
    report=report,
)

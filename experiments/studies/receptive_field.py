"""How far a network looks."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import scipy.ndimage
from flax import nnx
from jaxtyping import Array, Float

from dvmsr_jax import bicubic
from dvmsr_jax.images import read_rgb
from dvmsr_jax.model import Network
from dvmsr_jax.samples import SAMPLES
from experiments.budgets import Budget
from experiments.probes import Probe, Source
from experiments.studies import baselines, direction
from experiments.study import Results, Section, Study, markdown
from experiments.tasks import Facts, Place, Task

SHARES = (0.5, 0.9, 0.99)
# Side of the pictures and of the patch whose gradient is taken, in LR pixels.
SIDE, PATCH = 64, 4
# Attribution: the largest blur of the path, in LR pixels.
BLUR = 8.0


@dataclass(frozen=True)
class Field(Probe):
    """The gradient of a central output patch by the input, and its attribution.

    The effective receptive field (Luo et al., arXiv 1701.04128) is the gradient's magnitude.
    The local attribution map (Gu and Dong, arXiv 2011.11036) integrates the gradient of the patch's
    sharpness along a path from a blurred picture to the picture itself. Both are means over
    photographs.
    """

    side: int
    steps: int
    """Points of the path."""

    kind = "field"

    @property
    def facts(self) -> Facts:
        """See Task."""
        shape = {"side": self.side, "patch": PATCH, "steps": self.steps, "blur": BLUR}
        return {**super().facts, **shape}

    def seconds(self) -> float:
        """See Task."""
        return 30 + 2e-4 * self.steps * self.side**2 * len(SAMPLES)

    def run(self, place: Place) -> Facts:
        """Maps, as tenths of decades below the largest value, and the pixels that hold SHARES."""
        model = self.load(place)
        gradient, attribute = gradients(model, self.side)
        fields, maps = [], []
        for image in photographs(self.side, model.config.scale):
            fields.append(np.abs(gradient(image)).sum(-1))
            total = np.zeros(image.shape, np.float32)
            path = [blurred(image, BLUR * (1 - t / self.steps)) for t in range(self.steps + 1)]
            for before, after in itertools.pairwise(path):
                total += np.asarray(attribute(after)) * (after - before)
            maps.append(np.abs(total).sum(-1))
        return {"gradient": summary(fields), "attribution": summary(maps)}


def gradients(
    model: Network, side: int
) -> tuple[Callable[[np.ndarray], Array], Callable[[np.ndarray], Array]]:
    """The gradients by an image of the patch's sum, and of its sharpness."""
    graph, parameters = nnx.split(model)
    s = model.config.scale
    start = (side - PATCH) // 2 * s
    patch = slice(start, start + PATCH * s)

    def output(parameters, image):
        return nnx.merge(graph, parameters)(image[None])[0, patch, patch]

    def brightness(image, parameters):
        return output(parameters, image).sum()

    def sharpness(image, parameters):
        pixels = output(parameters, image)
        down, right = (jnp.abs(jnp.diff(pixels, axis=axis)).sum() for axis in (0, 1))
        return down + right

    first, second = (jax.jit(jax.grad(function)) for function in (brightness, sharpness))
    return lambda image: first(image, parameters), lambda image: second(image, parameters)


def photographs(side: int, scale: int) -> list[np.ndarray]:
    """The centres of scikit-image's photographs, as LR pictures in [0, 1]."""
    found = []
    for path in SAMPLES:
        hr = read_rgb(path)
        top, left = ((size - side * scale) // 2 for size in hr.shape[:2])
        hr = hr[top : top + side * scale, left : left + side * scale]
        found.append(bicubic.downscale(hr, scale).astype(np.float32) / 255)
    return found


def blurred(image: Float[np.ndarray, "h w 3"], sigma: float) -> Float[np.ndarray, "h w 3"]:
    """The image after a Gaussian blur."""
    return scipy.ndimage.gaussian_filter(image, sigma, axes=(0, 1)) if sigma else image


def summary(maps: list[np.ndarray]) -> Facts:
    """The mean of maps, each with sum 1, in a form that is small as JSON."""
    mean = np.mean([x / x.sum() for x in maps], axis=0)
    order = np.sort(mean, axis=None)[::-1].cumsum()
    half = len(mean) // 2
    decades = np.log10(np.maximum(mean / mean.max(), 1e-9))
    return {
        "pixels": {f"{share:g}": int(np.searchsorted(order, share) + 1) for share in SHARES},
        "above": round(float(mean[: half - PATCH // 2].sum()), 4),
        "below": round(float(mean[half + PATCH // 2 :].sum()), 4),
        "tenths": [" ".join(map(str, row)) for row in np.rint(-10 * decades).astype(int)],
    }


def tasks(budget: Budget) -> list[Task]:
    """The default weights, and those that the studies of direction and baselines train."""
    sources: dict[str, Source] = {"x4": "x4"}
    for name, network in baselines.OTHERS.items():
        sources[name], _ = baselines.tuned(budget, name, network)
    sources |= {run.name: run for run in direction.runs(budget) if run.seed == 0}
    side, steps = (16, 2) if budget.tiny else (SIDE, 20)
    return [Field(name, source, side, steps) for name, source in budget.some(sources).items()]


def report(results: Results) -> Section:
    """Table, figure and answer."""
    rows, found = [], {name: results.of(name)[0] for name in results.names()}
    for name, maps in found.items():
        field, attribution = maps["gradient"], maps["attribution"]
        held = [f"{x:,}" for kind in (field, attribution) for x in kind["pixels"].values()]
        rows.append([name, *held, f"{field['above']:.1%}", f"{field['below']:.1%}"])
    shares = [f"{share:.0%}" for share in SHARES]
    columns = [*(f"gradient, {x}" for x in shares), *(f"attribution, {x}" for x in shares)]
    table = markdown(["weights", *columns, "above", "below"], rows)

    figure = matplotlib.figure.Figure(figsize=(2.4 * len(found), 5), layout="constrained")
    grid = figure.subplots(2, len(found), squeeze=False)
    for axes, (name, maps) in zip(grid.T, found.items(), strict=True):
        for ax, kind in zip(axes, ("gradient", "attribution"), strict=True):
            tenths = np.array([row.split() for row in maps[kind]["tenths"]], int)
            ax.imshow(-tenths / 10, vmin=-5, vmax=0, cmap="magma")
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name}: {kind}", size=8)
    areas = {name: maps["gradient"]["pixels"]["0.99"] for name, maps in found.items()}
    held = [f"{name} {areas[name]:,}" for name in sorted(areas, key=areas.__getitem__)]
    answer = f"99% of the gradient lies in this many pixels: {', '.join(held)}."
    return Section(answer, table, figure)


STUDY = Study(
    question="How far does a network look?",
    paper="Mamba is said to see further than CNNs; nothing is measured.",
    how="""
    Gradient of the sum of a central patch of 4x4 LR pixels by the input, and the local
    attribution of its sharpness, for 64x64 pixels of five photographs. The table counts the
    input pixels that hold a share of it, and the shares of the gradient above and below the
    patch. The figure's colours span five decades. `x4` has been trained for long, the others
    with the budget.
    """,
    limits="""
    A gradient is a local measure. Networks that were trained briefly may use less of what they
    can see.
    """,
    tasks=tasks,
    report=report,
)

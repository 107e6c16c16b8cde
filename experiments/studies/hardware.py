"""Time and memory on real machines, beside MACs."""

import itertools
from typing import NamedTuple

import matplotlib
import matplotlib.figure
import numpy as np
from cycler import cycler
from matplotlib.artist import Artist

from dvmsr_jax.config import Compute, NetworkConfig
from experiments.budgets import Budget
from experiments.studies.baselines import DVMSR, OTHERS
from experiments.study import Results, Section, Study, markdown
from experiments.tasks import Task
from experiments.timing import Mode, Platform, Timing

SIDES = (64, 128, 256, 512, 1_024, 2_048)
BATCHES = (1, 4, 16)
PLATFORMS: tuple[Platform, ...] = ("cpu", "gpu")
SCANS = {
    f"{DVMSR}, associative": Compute(scan="associative"),
    f"{DVMSR}, sequential": Compute(scan="sequential"),
    f"{DVMSR}, chunked": Compute(scan="chunked"),
}
BANDS, ONNX, HALF = f"{DVMSR} in bands", f"{DVMSR} in bands, ONNX Runtime", ", bfloat16"


def label(name: str, side: int, batch: int, platform: str) -> str:
    """The name of a task."""
    return f"{name}, {batch} x {side}², {platform}"


class Way(NamedTuple):
    """A way to upscale, and what is timed of it."""

    network: NetworkConfig
    compute: Compute = Compute()
    mode: Mode = "whole"
    side: int = max(SIDES)
    """Largest side."""
    batches: tuple[int, ...] = BATCHES
    platforms: tuple[Platform, ...] = PLATFORMS


def ways(budget: Budget) -> dict[str, Way]:
    """All ways, by name."""
    found: dict[str, Way] = {}
    for name, network in budget.some({DVMSR: budget.base.model, **OTHERS}).items():
        whole = found[name] = Way(budget.network(network))
        bfloat16 = Compute(precision="bfloat16")
        found[name + HALF] = whole._replace(compute=bfloat16, side=256, batches=(1,))
    single = found[DVMSR]._replace(batches=(1,))
    found[BANDS] = single._replace(mode="bands")
    found[ONNX] = single._replace(mode="onnx", side=1_024, platforms=("cpu",))
    for name, compute in budget.some(SCANS).items():
        found[name] = single._replace(compute=compute, side=256)
    return found


def tasks(budget: Budget) -> list[Task]:
    """Every way at every size and batch within the budget, on each kind of device."""
    found: list[Task] = []
    named = ways(budget)
    for platform, side, batch in itertools.product(PLATFORMS, SIDES, BATCHES):
        side = 16 if budget.tiny else side
        if batch * side**2 > (budget.pixels if batch == 1 else budget.batch_pixels):
            continue
        for name, way in named.items():
            if side > way.side or batch not in way.batches or platform not in way.platforms:
                continue
            found.append(
                Timing(
                    label(name, side, batch, platform),
                    way.network,
                    side,
                    batch,
                    way.compute,
                    way.mode,
                    platform,
                )
            )
    return list({task.id: task for task in found}.values())


def report(results: Results) -> Section:
    """Table, figure and answer."""
    rows = []
    # Of single pictures, on each kind of device.
    costs: dict[str, dict[str, float]] = {}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name in results.names():
        way, case, platform = name.rsplit(", ", 2)
        batch = int(case.split(" x ")[0])
        facts = results.of(name)[0]
        macs, seconds = facts["macs"] / 1e9, facts["seconds"]
        rows.append(
            [
                way,
                platform,
                case,
                f"{seconds:.3g} s",
                f"{batch / seconds:.3g}",
                f"{facts['memory'] / 2**20:,.0f} MiB" if facts["memory"] else "",
                f"{float(f'{macs:.3g}'):,g}",
                f"{macs / seconds:.3g}",
            ]
        )
        if batch == 1:
            curves.setdefault(platform, {}).setdefault(way, []).append((macs, seconds))
            if way in (DVMSR, *OTHERS):  # later sizes, which are larger, replace smaller ones
                costs.setdefault(platform, {})[way] = 1e3 * seconds / macs
    numbers = ("time", "pictures/s", "memory", "GMACs", "GMACs/s")
    table = markdown(["network", "device", "pictures", *numbers], rows, text=3)

    answers = []
    for platform, of in costs.items():
        times = (f"{way} {of[way]:.3g} ms" for way in sorted(of, key=of.__getitem__))
        answers.append(f"on the {platform}, a GMAC takes {', '.join(times)}")
    answer = f"MACs do not predict time: {'; '.join(answers)}." if answers else ""

    figure = matplotlib.figure.Figure(figsize=(3.5 + 4.5 * len(curves), 4.5), layout="constrained")
    styles = cycler(linestyle=["-", "--"]) * cycler(color=matplotlib.colormaps["tab10"](range(10)))
    names = dict.fromkeys(way for lines in curves.values() for way in lines)
    style = dict(zip(names, styles, strict=False))
    drawn: dict[str, Artist] = {}
    for number, (platform, lines) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(1, len(curves), number)
        for way, points in lines.items():
            (drawn[way],) = axes.loglog(*np.array(sorted(points)).T, marker=".", **style[way])
        axes.set(title=platform, xlabel="GMACs, one picture", ylabel="seconds")
        axes.grid(alpha=0.3)
    figure.legend(drawn.values(), drawn, fontsize=8, loc="outside right center")
    return Section(answer, table, figure)


STUDY = Study(
    question="What does a picture cost on real machines, and do MACs predict it?",
    paper="Parameters and FLOPs are counted; no time is measured.",
    how="""
    Whole pictures of random numbers with random weights; medians. MACs are those of
    convolutions and products, without the scan. Memory is XLA's count of arguments, results and
    temporaries. `associative`, `sequential` and `chunked` are scans, the default otherwise. In
    bands, memory does not grow with the height. ONNX Runtime is timed on the CPU only.
    """,
    limits="""
    Other programs on the machine lengthen times; run this on an idle one. Cases beyond the
    budget's number of pixels are left out.
    """,
    tasks=tasks,
    report=report,
)

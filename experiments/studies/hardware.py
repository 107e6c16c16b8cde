"""Time and memory on real machines, beside MACs."""

import itertools
from typing import NamedTuple

import matplotlib
import matplotlib.figure
import numpy as np
from cycler import cycler

from dvmsr_jax.config import Compute, NetworkConfig
from dvmsr_jax.kernels.selective_scan import Implementation
from experiments.budgets import Budget
from experiments.studies.baselines import DVMSR, OTHERS
from experiments.study import Results, Section, Study, markdown
from experiments.tasks import Task
from experiments.timing import Mode, Platform, Timing

SIDES = (64, 128, 256, 512, 1_024, 2_048)
BATCHES = (1, 4, 16)
SCANS: tuple[Implementation, ...] = ("associative", "sequential", "chunked")
PLATFORMS: tuple[Platform, ...] = ("cpu", "gpu")
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
    for scan in SCANS[: 2 if budget.tiny else None]:
        found[f"{DVMSR}, {scan}"] = single._replace(compute=Compute(scan=scan), side=256)
    return found


def tasks(budget: Budget) -> list[Task]:
    """Every way at every size and batch within the budget, on each kind of device."""
    found: list[Task] = []
    for platform, side, batch in itertools.product(PLATFORMS, SIDES, BATCHES):
        side = 16 if budget.tiny else side
        if side**2 > budget.pixels or (batch > 1 and batch * side**2 > budget.batch_pixels):
            continue
        for name, way in ways(budget).items():
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
    found = [(name, results.of(name)[0]) for name in results.names()]
    rows = []
    for name, facts in found:
        way, case, platform = name.rsplit(", ", 2)
        batch = int(case.split(" x ")[0])
        macs = facts["macs"] / 1e9
        rows.append(
            [
                way,
                platform,
                case,
                f"{facts['seconds']:.3g} s",
                f"{batch / facts['seconds']:.3g}",
                f"{facts['memory'] / 2**20:,.0f} MiB" if facts["memory"] else "",
                f"{float(f'{macs:.3g}'):,g}",
                f"{macs / facts['seconds']:.3g}",
            ]
        )
    numbers = ("time", "pictures/s", "memory", "GMACs", "GMACs/s")
    table = markdown(["network", "device", "pictures", *numbers], rows, text=3)

    # Of one picture of the largest size, on each kind of device; later sizes replace smaller ones.
    costs: dict[str, dict[str, float]] = {}
    for name, facts in found:
        way, case, platform = name.rsplit(", ", 2)
        if way in (DVMSR, *OTHERS) and case.startswith("1 x "):
            costs.setdefault(platform, {})[way] = facts["seconds"] / facts["macs"] * 1e12
    answers = []
    for platform, of in costs.items():
        times = (f"{way} {of[way]:.3g} ms" for way in sorted(of, key=of.__getitem__))
        answers.append(f"on the {platform}, a GMAC takes {', '.join(times)}")
    answer = f"MACs do not predict time: {'; '.join(answers)}." if answers else ""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, facts in found:
        way, case, platform = name.rsplit(", ", 2)
        if case.startswith("1 x "):
            point = (facts["macs"] / 1e9, facts["seconds"])
            curves.setdefault(platform, {}).setdefault(way, []).append(point)
    figure = matplotlib.figure.Figure(figsize=(3.5 + 4.5 * len(curves), 4.5), layout="constrained")
    styles = cycler(linestyle=["-", "--"]) * cycler(color=matplotlib.colormaps["tab10"](range(10)))
    names = dict.fromkeys(way for lines in curves.values() for way in lines)
    style = dict(zip(names, styles, strict=False))
    for number, (platform, lines) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(1, len(curves), number)
        for way, points in lines.items():
            axes.loglog(*np.array(sorted(points)).T, marker=".", label=way, **style[way])
        axes.set(title=platform, xlabel="GMACs, one picture", ylabel="seconds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
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

"""Time and memory on real machines, beside MACs."""

import itertools
from typing import Literal

import matplotlib
import matplotlib.figure
import numpy as np

from dvmsr_jax.config import Compute, NetworkConfig
from dvmsr_jax.kernels.selective_scan import Implementation
from experiments.budgets import Budget
from experiments.studies.baselines import DVMSR, OTHERS
from experiments.study import Results, Section, Study, legend, markdown
from experiments.tasks import Task
from experiments.timing import Timing

SIDES = (64, 128, 256, 512, 1_024, 2_048)
BATCHES = (1, 4, 16)
SCANS: tuple[Implementation, ...] = ("associative", "sequential", "chunked")
# Scans other than the default one are timed up to this side.
SCAN_SIDE = 256
PLATFORMS: tuple[Literal["cpu", "gpu"], ...] = ("cpu", "gpu")
BANDS, HALF = f"{DVMSR} in bands", ", bfloat16"


def label(name: str, side: int, batch: int, platform: str) -> str:
    """The name of a task."""
    return f"{name}, {batch} x {side}², {platform}"


def tasks(budget: Budget) -> list[Task]:
    """Every network at every size and batch within the budget, on each kind of device."""
    ways: dict[str, tuple[NetworkConfig, Compute, Literal["whole", "bands"]]] = {}
    for name, network in budget.some({DVMSR: budget.base.model, **OTHERS}).items():
        ways[name] = (budget.network(network), Compute(), "whole")
        ways[name + HALF] = (budget.network(network), Compute(precision="bfloat16"), "whole")
    model, compute, _ = ways[DVMSR]
    ways[BANDS] = (model, compute, "bands")
    scans = budget.some({f"{DVMSR}, {scan}": Compute(scan=scan) for scan in SCANS})
    ways |= {name: (model, how, "whole") for name, how in scans.items()}
    found: list[Task] = []
    for platform, side, batch in itertools.product(PLATFORMS, SIDES, BATCHES):
        side = 16 if budget.tiny else side
        if batch * side**2 > budget.pixels:
            continue
        for name, (network, how, mode) in ways.items():
            extra = name in scans or name.endswith(HALF)
            if (extra and (batch > 1 or side > SCAN_SIDE)) or (mode == "bands" and batch > 1):
                continue
            task = Timing(
                label(name, side, batch, platform), network, side, batch, how, mode, platform
            )
            found.append(task)
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
                f"{macs:.3g}",
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
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=matplotlib.colormaps["tab20"](range(12)))
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, facts in found:
        way, case, platform = name.rsplit(", ", 2)
        if case.startswith("1 x "):
            point = (facts["macs"] / 1e9, facts["seconds"])
            curves.setdefault(f"{way}, {platform}", []).append(point)
    for name, points in curves.items():
        axes.loglog(*np.array(sorted(points)).T, ".-", label=name)
    axes.set(xlabel="GMACs, one picture", ylabel="seconds")
    axes.grid(alpha=0.3)
    legend(axes)
    return Section(answer, table, figure)


STUDY = Study(
    question="What does a picture cost on real machines, and do MACs predict it?",
    paper="Parameters and FLOPs are counted; no time is measured.",
    how="""
    Whole pictures of random numbers with random weights; medians. MACs are those of
    convolutions and products, without the scan. Memory is XLA's count of arguments, results and
    temporaries. `associative`, `sequential` and `chunked` are scans, the default otherwise. In
    bands, memory does not grow with the height.
    """,
    limits="""
    Other programs on the machine lengthen times; run this on an idle one. Cases beyond the
    budget's number of pixels are left out.
    """,
    tasks=tasks,
    report=report,
)

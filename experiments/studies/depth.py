"""Quality against depth and width."""

import matplotlib.figure

from experiments.budgets import Budget
from experiments.study import Results, Section, Study, markdown
from experiments.tasks import Task
from experiments.timing import Timing

# Name -> fields of the DVMSR.
VARIANTS = {
    f"{rssbs} x {vimms}": {"rssbs": rssbs, "vimms_per_rssb": vimms}
    for rssbs in (2, 4, 6, 8)
    for vimms in (1, 2, 3)
} | {"width 40": {"channels": 40}, "width 80": {"channels": 80}}

# Side of the picture that is timed, in LR pixels.
SIDE = 128


def tasks(budget: Budget) -> list[Task]:
    """Trains every variant, and times it."""
    variants = {name: budget.dvmsr(**fields) for name, fields in VARIANTS.items()}
    side = min(SIDE, int(budget.pixels**0.5))
    timings = [
        Timing(f"time of {name}", config.model, side)
        for name, config in budget.some(variants).items()
    ]
    return [*budget.trainings(variants, budget.seeds), *timings]


def report(results: Results) -> Section:
    """Table, figure and answer."""
    scores = results.scores(VARIANTS)
    costs = {name: results.of(name)[0]["macs"] / 1e9 for name in scores}
    front = pareto({name: (costs[name], score.mean) for name, score in scores.items()})
    benchmarks = results.benchmarks()
    rows = []
    for name in scores:
        facts = results.of(name)[0]
        timing = next(iter(results.of(f"time of {name}")), None)
        rows.append(
            [
                name,
                f"{facts['parameters']:,}",
                f"{costs[name]:.1f}",
                f"{timing['seconds']:.2f} s" if timing else "",
                f"{timing['memory'] / 2**20:,.0f} MiB" if timing else "",
                *(str(results.score(name, on) or "") for on in benchmarks),
                "yes" if name in front else "",
            ]
        )
    columns = ["RSSBs x ViMMs", "parameters", "GMACs", f"time, {SIDE}²", "memory"]
    table = markdown([*columns, *benchmarks, "on the front"], rows)

    answer = ""
    if len(scores) > 1:
        small, best = front[0], front[-1]
        answer = f"No network is better than the cheapest, {small}."
    if len(front) > 1:
        answer = (
            f"From {small} to {best}, which costs {costs[best] / costs[small]:.1f} times the MACs, "
            f"quality gains {results.compare(best, small)}. No cheaper network is as good as one "
            f"of {', '.join(front)}."
        )

    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, score in scores.items():
        axes.errorbar(costs[name], score.mean, score.deviation, fmt="o", color="tab:blue", ms=4)
        axes.annotate(name, (costs[name], score.mean), (4, 4), textcoords="offset points", size=8)
    axes.plot([costs[name] for name in front], [scores[name].mean for name in front], "--", lw=1)
    axes.set(xlabel="GMACs for 256x256", ylabel="validation PSNR-Y, dB", xscale="log")
    axes.grid(alpha=0.3)
    return Section(answer, table, figure)


def pareto(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names, by rising cost, of (cost, quality) that no cheaper point reaches."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


STUDY = Study(
    question="How does quality depend on depth and width?",
    paper="""
    The student has 4 RSSBs of 2 ViMMs and 60 channels, the teacher 8 of 192 channels; no other
    sizes are compared.
    """,
    how="""
    Each network is trained alike, without a teacher; RSSBs x ViMMs per RSSB at 60 channels, and
    widths at 4 x 2. Times are medians for one whole picture with the default scan.
    """,
    limits="""
    Deeper networks gain more from longer training, so a short one favours small networks. The
    learning rate is that of the paper's student for all.
    """,
    tasks=tasks,
    report=report,
)

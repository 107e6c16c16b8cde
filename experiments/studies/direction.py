"""One way, two ways, and columns; and whether a one-way network is worse where it begins."""

import dataclasses

import matplotlib.figure
import numpy as np

from dvmsr_jax import metrics
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.inference import make_upscaler
from experiments.budgets import Budget
from experiments.networks import AlternatingConfig
from experiments.probes import Probe, all_pictures
from experiments.study import Results, Section, Study, legend, markdown
from experiments.tasks import Facts, Place, Task
from experiments.training import Training

ONE, TWO, EQUAL, COLUMNS = "one way", "two ways", "two ways, equal time", "rows and columns"
# RSSBs of two ways that cost as many operations as the base's four of one way.
EQUAL_RSSBS = 3
# Rows from the border that are looked at, in LR pixels.
DEPTH = 24


class Border(Probe):
    """The error near the beginning of the scan, relative to that near its end.

    Each picture is upscaled twice, the second time upside down. The same rows are then once near
    the beginning and once near the end.
    """

    kind = "border"

    def seconds(self) -> float:
        """See Task."""
        return 60.0

    def run(self, place: Place) -> Facts:
        """Mean squared errors of the luma by distance from the border, in LR rows."""
        model = self.load(place)
        upscale, scale = make_upscaler(model), model.config.scale
        errors: dict[str, list[np.ndarray]] = {"begin": [], "end": []}
        for _, lr, hr in all_pictures(place, scale):
            for turn in (0, 2):
                turned = np.ascontiguousarray(np.rot90(lr, turn))
                difference = metrics.luma(upscale(turned)) - metrics.luma(np.rot90(hr, turn))
                # Without the columns that scores leave out, too.
                rows = (difference[:, scale:-scale] ** 2).mean(1).reshape(-1, scale).mean(1)
                half = min(DEPTH, len(rows) // 2)
                errors["begin"].append(rows[:half])
                errors["end"].append(rows[::-1][:half])
        depth = min(map(len, errors["begin"]))
        means = {
            name: np.mean([rows[:depth] for rows in found], axis=0)
            for name, found in errors.items()
        }
        return {name: np.round(mean, 3).tolist() for name, mean in means.items()}


def runs(budget: Budget) -> list[Training]:
    """Trains the variants."""
    fields = {x.name: getattr(budget.base.model, x.name) for x in dataclasses.fields(ModelConfig)}
    variants = {
        ONE: budget.of(budget.base.model),
        TWO: budget.dvmsr(bidirectional=True),
        EQUAL: budget.dvmsr(bidirectional=True, rssbs=EQUAL_RSSBS),
        COLUMNS: budget.of(AlternatingConfig(**fields)),
    }
    return budget.trainings(variants, budget.claim_seeds)


def tasks(budget: Budget) -> list[Task]:
    """The runs, and the borders of the default weights and of one way and two ways."""
    trained = runs(budget)
    borders = [Border(f"border of {x.name}", x) for x in trained if x.seed == 0]
    return [*trained, Border("border of x4", "x4"), *borders[:2]]


def report(results: Results) -> Section:
    """Table, figure and answer."""
    scores = results.scores([ONE, TWO, EQUAL, COLUMNS])
    benchmarks = results.benchmarks()
    rows = []
    for name in scores:
        facts = results.of(name)[0]
        gain = results.compare(name, ONE) if name != ONE and ONE in scores else ""
        values = (str(results.score(name, on) or "") for on in benchmarks)
        numbers = (f"{facts['parameters']:,}", f"{facts['training_seconds'] / 60:.1f} min")
        rows.append([name, *numbers, *values, gain])
    table = markdown(["direction", "parameters", "training", *benchmarks, "gain, validation"], rows)

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    sentences = [
        f"{name} instead of {ONE} changes validation by {results.compare(name, ONE)}"
        for name in scores
        if name != ONE and ONE in scores
    ]
    for name in results.names():
        if name.startswith("border of "):
            found = results.of(name)[0]
            ratio = 10 * np.log10(np.divide(found["begin"], found["end"]))
            axes.plot(np.arange(len(ratio)), ratio, label=name.removeprefix("border of "))
            first, rest = (
                10 * np.log10(np.sum(found["begin"][rows]) / np.sum(found["end"][rows]))
                for rows in (slice(0, 1), slice(1, None))
            )
            sentences.append(
                f"in {name.removeprefix('border of ')}, the error of the row that is read first is "
                f"{first:+.2f} dB from that of the same row read last, and {rest:+.2f} dB in the "
                f"{len(ratio) - 1} rows after it"
            )
    axes.axhline(0, color="gray", lw=0.5)
    axes.set(
        xlabel="distance from the top or bottom, LR rows",
        ylabel="error when read first / last, dB",
    )
    axes.grid(alpha=0.3)
    legend(axes)
    answer = "; ".join(sentences)
    return Section(answer[:1].upper() + answer[1:] + "." if answer else "", table, figure)


STUDY = Study(
    question="What is a second direction worth, and does causality show?",
    paper="One way instead of two costs 0.01 dB, and saves time.",
    how=f"""
    'two ways' scans each sequence from both ends, with parameters for each; at equal time it
    has {EQUAL_RSSBS} RSSBs. In 'rows and columns', every other RSSB reads columns. (A network
    that reads columns only is one that reads rows of the transposed picture, and training
    transposes half of the pictures.) For the borders, each picture is upscaled as it is and
    turned by 180 degrees, so that the same rows come first once and last once.
    """,
    limits="""
    Validation pictures are small, and the last rows have no neighbours below either, in any
    network with convolutions.
    """,
    tasks=tasks,
    report=report,
)

"""DVMSR beside other networks of its size."""

import dataclasses

import matplotlib.figure

from dvmsr_jax.config import NetworkConfig
from experiments.budgets import Budget
from experiments.networks import CnnConfig, RlfnConfig, WindowsConfig
from experiments.study import Results, Section, Study, legend, markdown
from experiments.tasks import Task
from experiments.training import Best, Training

DVMSR, CNN = "DVMSR", "CNN"
OTHERS: dict[str, NetworkConfig] = {
    CNN: CnnConfig(),
    "RLFN": RlfnConfig(),
    "attention": WindowsConfig(),
}
EQUAL_TIME, LONG = f"{CNN}, equal time", "{}, five times as long"
# Steps of the CNN in the time of one of DVMSR's, measured in turns on two idle cores.
STEPS_AT_EQUAL_TIME = 1.6


def tuned(budget: Budget, name: str, network: NetworkConfig) -> tuple[Best, list[Task]]:
    """(the best of the budget's learning rates, all runs of the network at it)."""
    optims = [dataclasses.replace(budget.base.optim, learning_rate=rate) for rate in budget.rates]
    candidates = tuple(
        Training(f"{name}, {optim.learning_rate:g}", budget.of(network, optim=optim))
        for optim in optims
    )
    best = Best(name, candidates)
    more = (
        Training(name, budget.of(network), seed, tuned_by=best) for seed in range(1, budget.seeds)
    )
    return best, [*candidates, best, *more]


def tasks(budget: Budget) -> list[Task]:
    """Tunes the learning rate of each network, and trains it with more seeds, and for longer."""
    found: list[Task] = []
    steps = budget.base.steps
    for name, network in budget.some({DVMSR: budget.base.model, **OTHERS}).items():
        best, runs = tuned(budget, name, network)
        found += runs
        if name == CNN:
            config = budget.of(network, steps=round(STEPS_AT_EQUAL_TIME * steps))
            found += (
                Training(EQUAL_TIME, config, seed, tuned_by=best) for seed in range(budget.seeds)
            )
        if name in (DVMSR, CNN):
            config = budget.of(network, steps=5 * steps)
            found.append(Training(LONG.format(name), config, tuned_by=best))
    return found


def report(results: Results) -> Section:
    """Table, figure and answer."""
    names = [DVMSR, *OTHERS, EQUAL_TIME, LONG.format(DVMSR), LONG.format(CNN)]
    scores = results.scores(names)
    benchmarks = results.benchmarks()
    rows = []
    for name in scores:
        facts = results.of(name)[0]
        rows.append(
            [
                name,
                f"{facts['parameters']:,}",
                f"{facts['macs'] / 1e9:.1f}",
                f"{facts['config']['steps']:,}",
                f"{facts['config']['optim.learning_rate']:g}",
                f"{facts['training_seconds'] / 60:.1f} min",
                *(str(results.score(name, on) or "") for on in benchmarks),
            ]
        )
    columns = ["network", "parameters", "GMACs", "steps", "learning rate", "training"]
    table = markdown([*columns, *benchmarks], rows)

    comparisons = [
        f"over {other} {results.compare(DVMSR, other)}"
        for other in (*OTHERS, EQUAL_TIME)
        if other in scores and DVMSR in scores
    ]
    if {LONG.format(DVMSR), LONG.format(CNN)} <= scores.keys():
        long = scores[LONG.format(DVMSR)].mean - scores[LONG.format(CNN)].mean
        comparisons.append(f"over {CNN}, both five times as long, {long:+.2f} dB (one seed)")
    answer = f"DVMSR's lead in validation: {'; '.join(comparisons)}." if comparisons else ""

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in scores:
        for i, facts in enumerate(results.of(name)):
            color = f"C{list(scores).index(name)}"
            axes.plot(*zip(*facts["curve"], strict=True), color=color, label=None if i else name)
    axes.set(xlabel="step", ylabel="validation PSNR-Y, dB", xscale="log")
    axes.grid(alpha=0.3)
    legend(axes)
    return Section(answer, table, figure)


STUDY = Study(
    question="What does Mamba contribute beyond other networks of the same size?",
    paper="DVMSR is compared with published results of other networks, trained in other ways.",
    how="""
    Each network has 424 K parameters within 2%, DVMSR's head and tail, and the same pictures,
    steps and optimiser; its learning rate is the best of the same few in validation (seed 0).
    CNN: residual blocks of two 3x3 convolutions, as in EDSR. RLFN: its blocks. attention:
    shifted windows of 8x8, as in SwinIR-light, with two layers per block. At equal time, the CNN
    takes 1.6 times as many steps as DVMSR.
    """,
    limits="""
    Short training favours networks that learn fast. The learning rate is chosen with one seed,
    on the pictures that the table's validation column is from. Training times are not comparable:
    the machine was also used for other work, and the code became faster between the runs.
    """,
    tasks=tasks,
    report=report,
)

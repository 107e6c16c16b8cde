"""docs/studies.md, from the results alone."""

import os
from collections.abc import Sequence
from pathlib import Path

from dvmsr_jax import files
from experiments.budgets import Budget
from experiments.harness import duration
from experiments.study import Results, Study
from experiments.tasks import Place, Task, in_order, is_done, read_origin, read_result

HEAD = """\
# Studies

Questions that the paper leaves open, answered by short runs: budget `{budget}`, {steps:,} steps of
{crops} crops of {side}x{side}. This document is written by `python -m experiments report`, from the
files in `experiments/results/` alone.

    python -m experiments                    # the studies, their cost, what has been run
    python -m experiments depth              # run what is missing of a study
    python -m experiments depth --dry-run    # its runs and their cost

[experiments](../experiments/__init__.py) describes how to share the work and how to add to it.

Scores are PSNR-Y in dB: a mean ± the standard deviation over seeds. A difference is called none if
it is below twice its standard deviation, which follows from the spread of all variants' seeds.
"""


def write(studies: dict[str, Study], budget: Budget, place: Place, document: Path) -> None:
    """Writes the document, and a figure for each study into a folder of the same name.

    Raises:
        UserError: a result is damaged.
    """
    steps, data = budget.base.steps, budget.base.data
    parts = [HEAD.format(budget=budget.name, steps=steps, crops=data.batch_size, side=data.lr_crop)]
    for name, study in studies.items():
        parts.append(_section(name, study, study.tasks(budget), place, document))
    with files.replacing(document) as unfinished:
        unfinished.write_text("\n".join(parts))


def _section(name: str, study: Study, tasks: Sequence[Task], place: Place, document: Path) -> str:
    paper, how, limits = (" ".join(text.split()) for text in (study.paper, study.how, study.limits))
    lines = [f"## {name}", f"**{study.question}**"]
    every = in_order(tasks)
    done = [task for task in every if is_done(task, place)]
    results = Results(tasks, place)
    if results.names():
        section = study.report(results)
        figure = document.with_suffix("") / f"{name}.png"
        with files.replacing(figure) as unfinished:
            section.figure.savefig(unfinished, dpi=100, format="png")
        # Pictures that tasks have made are beside their results.
        table = section.table.format(results=os.path.relpath(place.results, document.parent))
        picture = f"![{name}]({figure.parent.name}/{figure.name})"
        lines += [section.answer or "Not yet complete.", table, picture]
    else:
        lines.append("Not yet run.")
    lines += [f"The paper: {paper}", f"How it was done: {how}"]
    if done:
        lines.append(_provenance(done, len(every), place))
    lines.append(f"What this does not show: {limits}")
    return "\n\n".join(line for line in lines if line) + "\n"


def _provenance(done: Sequence[Task], total: int, place: Place) -> str:
    origins = [read_origin(task, place) for task in done]
    machines = sorted({origin["machine"] for origin in origins})
    seconds = sum(origin["seconds"] for origin in origins)
    line = f"{len(done)} of {total} runs, {duration(seconds)} on {'; '.join(machines)}."
    diverged = [str(task) for task in done if "diverged" in read_result(task, place)]
    return f"{line} Diverged: {'; '.join(diverged)}." if diverged else line

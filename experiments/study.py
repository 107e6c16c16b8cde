"""Studies, and what their reports have in common: scores over seeds, and their differences."""

import importlib
import math
import pkgutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.axes
import matplotlib.figure

from benchmarks.table import Table
from experiments import studies
from experiments.budgets import Budget
from experiments.tasks import Facts, Place, Task, is_done, read_result


class Score(NamedTuple):
    """PSNR-Y of several seeds, in dB."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; 0 for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        one = len(self.values) == 1
        return f"{self.mean:.2f}" if one else f"{self.mean:.2f} ± {self.deviation:.2f}"


class Results:
    """The results of a study's tasks, as far as there are any, by the tasks' names."""

    def __init__(self, tasks: Sequence[Task], place: Place):
        """Training runs that diverged are left out."""
        self._found: dict[str, list[Facts]] = {}
        for task in tasks:
            if is_done(task, place) and "diverged" not in (result := read_result(task, place)):
                self._found.setdefault(task.name, []).append(result)

    def of(self, name: str) -> list[Facts]:
        """The results of the tasks with this name, one for each seed."""
        return self._found.get(name, [])

    def names(self) -> list[str]:
        """The names of tasks that have results, in the study's order."""
        return list(self._found)

    def score(self, name: str, on: str = "validation") -> Score | None:
        """PSNR-Y of a variant; None without results."""
        values = [x["scores"][on]["psnr_y"] for x in self.of(name) if on in x.get("scores", {})]
        return Score(tuple(values)) if values else None

    def scores(self, names: Iterable[str]) -> dict[str, Score]:
        """PSNR-Y in validation of those variants that have been run."""
        found = {name: self.score(name) for name in names}
        return {name: score for name, score in found.items() if score is not None}

    def benchmarks(self) -> list[str]:
        """The pictures on which there are scores, with "validation" first."""
        scored = (result.get("scores", {}) for found in self._found.values() for result in found)
        return list(dict.fromkeys(name for scores in scored for name in scores))

    def noise(self, alike: Iterable[str] | None = None) -> float:
        """Standard deviation of a seed's validation, in dB, pooled over these variants or all."""
        scores = self.scores(self._found if alike is None else alike).values()
        several = [score.values for score in scores if len(score.values) > 1]
        return math.sqrt(statistics.mean(map(statistics.variance, several))) if several else 0.0

    def compare(self, first: str, second: str, alike: Iterable[str] | None = None) -> str:
        """In words, how much better the first is in validation.

        A difference below twice its standard deviation is called none. `alike` names the variants
        whose seeds spread as much as those of the two; all by default.
        """
        scores = self.scores([first, second])
        one, other = scores[first], scores[second]
        difference = one.mean - other.mean
        noise = self.noise(alike)
        if not noise:
            return f"{difference:+.2f} dB (one seed)"
        deviation = noise * math.sqrt(1 / len(one.values) + 1 / len(other.values))
        amount = f"{difference:+.2f} ± {deviation:.2f} dB"
        return amount if abs(difference) >= 2 * deviation else f"none ({amount})"


class Section(NamedTuple):
    """The part of a report that follows from results."""

    answer: str
    """A sentence; empty while results are missing."""
    table: str
    """In Markdown. {results} stands for the folder of the results."""
    figure: matplotlib.figure.Figure


@dataclass(frozen=True)
class Study:
    """A question, and how it is answered. Texts are in Markdown."""

    question: str
    paper: str
    """The paper's claim."""
    how: str
    limits: str
    """What the results do not show."""
    tasks: Callable[[Budget], Sequence[Task]]
    report: Callable[[Results], Section]
    """Called if there are any results."""


def load_studies() -> dict[str, Study]:
    """The studies by name, which is that of their module with dashes."""
    names = [module.name for module in pkgutil.iter_modules(studies.__path__)]
    return {
        name.replace("_", "-"): importlib.import_module(f"{studies.__name__}.{name}").STUDY
        for name in names
    }


def legend(axes: matplotlib.axes.Axes) -> None:
    """Adds a legend, if there is anything to explain."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table whose first `text` columns are words, and the others numbers; empty without rows."""
    table = Table("", list(columns), list(columns[:text]), [list(row) for row in rows])
    return table.markdown() if table.rows else ""

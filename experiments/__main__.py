"""Runs studies, and reports on them.

    python -m experiments                          the studies, their cost, what has been run
    python -m experiments depth --budget cpu       run a study, or what is missing of it
    python -m experiments depth --dry-run          its runs and their cost
    python -m experiments report                   rebuild docs/studies.md from the results

To continue after an interruption, or to share the work among processes, repeat the command.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dvmsr_jax.config import DataConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.program import keep_compiled_programs, one_line_errors
from dvmsr_jax.samples import SAMPLES
from experiments import harness, report
from experiments.budgets import BUDGETS, Budget
from experiments.study import Study, load_studies
from experiments.tasks import Place, Task, is_done

REPORT = "report"


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    studies: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of studies, or `report`. None: list the studies."""
    budget: Literal["smoke", "cpu", "paper"] = "cpu"
    """smoke: seconds. cpu: a night on two cores. paper: the paper's schedule."""
    dry_run: bool = False
    """Print the runs and their estimated cost, and exit."""
    training: bool = True
    """Whether to run what needs training; --no-training runs the rest."""
    hr_dirs: tuple[Path, ...] = ()
    """Folders of training pictures. None: download DIV2K; for smoke, scikit-image's photographs."""
    prepared: Path | None = None
    """A folder made by `dvmsr data prepare`, instead of --hr-dirs."""
    data_dir: Path = DataConfig.data_dir
    """Where pictures are downloaded to and prepared, once."""
    benchmarks: tuple[Path, ...] = ()
    """Test pictures, as for `evaluate.py --data`, for the scores besides validation."""
    folder: Path = Path("runs/experiments")
    """Folder for training runs."""
    results: Path = Path("experiments/results")
    """Folder for results."""
    document: Path = Path("docs/studies.md")
    """The file that `report` writes; its figures go to a folder of the same name beside it."""


def parse(arguments: Sequence[str]) -> Arguments:
    """Parses the command line."""
    return tyro.cli(Arguments, args=arguments, prog="python -m experiments", description=__doc__)


def place_of(arguments: Arguments) -> Place:
    """The folders of a budget's tasks."""
    work = arguments.folder.expanduser() / arguments.budget
    hr_dirs, data_dir = arguments.hr_dirs, arguments.data_dir
    if arguments.budget == "smoke" and not (hr_dirs or arguments.prepared):
        hr_dirs, data_dir = (work / "photos",), work / "data"
    data = DataConfig(
        hr_dirs=hr_dirs,
        prepared=arguments.prepared,
        data_dir=data_dir,
        val_images=BUDGETS[arguments.budget].base.data.val_images,
    )
    results = arguments.results.expanduser() / arguments.budget
    return Place(results, work, data, arguments.benchmarks)


def overview(studies: dict[str, Study], budget: Budget, place: Place) -> None:
    """Prints a line for each study."""
    total: dict[str, Task] = {}
    for name, study in studies.items():
        tasks = harness.possible(study.tasks(budget))
        total |= {task.id: task for task in tasks}
        _print_line(name, tasks, place)
    _print_line("all", list(total.values()), place)
    print(f"\nbudget {budget.name}: {budget.purpose}; times are estimates for two CPU cores")


def _print_line(name: str, tasks: Sequence[Task], place: Place) -> None:
    left = [task for task in tasks if not is_done(task, place)]
    cost, rest = (harness.duration(sum(task.seconds() for task in x)) for x in (tasks, left))
    done = len(tasks) - len(left)
    print(f"{name:16} {done:4} of {len(tasks):3} runs done  {cost:>9} in all  {rest:>9} left")


def main() -> None:
    """Runs the command line."""
    with one_line_errors(interrupted="interrupted; the same command continues"):
        arguments = parse(sys.argv[1:])
        studies = load_studies()
        budget, place = BUDGETS[arguments.budget], place_of(arguments)
        if arguments.studies == (REPORT,):
            report.write(studies, budget, place, arguments.document)
            print(f"wrote {arguments.document}")
            return
        for name in arguments.studies:
            if name not in studies:
                names = ", ".join(studies)
                raise UserError(f"there is no study {name!r}; there are {names}, and {REPORT!r}")
        if not arguments.studies:
            overview(studies, budget, place)
            return
        chosen = [task for name in arguments.studies for task in studies[name].tasks(budget)]
        tasks = harness.possible(chosen)
        if not arguments.training:
            tasks = harness.without_training(tasks, place)
        if arguments.dry_run:
            for task in tasks:
                state = "done" if is_done(task, place) else harness.duration(task.seconds())
                print(f"{state:>9}  {task}")
            _print_line("in all", tasks, place)
            return
        keep_compiled_programs()
        if place.data.hr_dirs == (place.work / "photos",):
            for path in SAMPLES:
                place.data.hr_dirs[0].mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place.data.hr_dirs[0])
        harness.run(tasks, place)


if __name__ == "__main__":
    main()

"""What a teacher gives, where, and how much of it."""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib.figure

from dvmsr_jax.config import DistillConfig, ModelConfig
from experiments.budgets import TEACHER_SEED, Budget
from experiments.study import Results, Section, Study, markdown
from experiments.tasks import Task
from experiments.training import Training

ALONE, LONGER = "no teacher", "no teacher, and its time"
PUBLISHED = {"teacher": Path("published")}
# Trained teachers: name -> fields of the DVMSR.
TEACHERS = {
    "60 x 8": {"rssbs": 8},
    "60 x 4": {},
    "96 x 8": {"channels": 96, "rssbs": 8},
}
# Students: name -> (their teacher, fields of DistillConfig).
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"teacher {name}": (name, {}) for name in TEACHERS},
    "published": ("published", {}),
    "published, self-ensemble": ("published", {"self_ensemble": True}),
    **{f"lambda {weight:g}": ("published", {"weight": weight}) for weight in (0.1, 0.5, 2.0)},
    **{
        f"RSSB {i + 1}": ("published", {"level": "mid", "rssbs": ((i, i),)})
        for i in range(ModelConfig().rssbs)
    },
    "all RSSBs": ("published", {"level": "mid"}),
}
# Students of features. Their seeds differ more than those of all others.
FEATURES = {name for name, (_, fields) in STUDENTS.items() if fields.get("level") == "mid"}


def teacher(budget: Budget, name: str) -> Training:
    """The run that trains a teacher."""
    return Training(f"teacher {name} itself", budget.dvmsr(**TEACHERS[name]), TEACHER_SEED)


def tasks(budget: Budget) -> list[Task]:
    """Trains the teachers, their students, and students without one."""
    found: list[Task] = [*budget.trainings({ALONE: budget.base}, budget.seeds)]
    for name, (taught_by, fields) in budget.some(STUDENTS).items():
        trained = teacher(budget, taught_by) if taught_by in TEACHERS else None
        given = fields if trained else PUBLISHED | fields
        config = budget.of(budget.base.model, phase="student", distill=DistillConfig(**given))
        students = [Training(name, config, seed, teacher=trained) for seed in range(budget.seeds)]
        found += [*([trained] if trained else []), *students]
        if name == next(iter(STUDENTS)):
            found += longer(budget, students)
    return found


def longer(budget: Budget, students: list[Training]) -> list[Training]:
    """The base, trained for as long as these students and their teacher take together."""
    alone = Training(LONGER, budget.of(budget.base.model))
    assert students[0].teacher is not None
    total = students[0].operations() + students[0].teacher.operations()
    steps = round(total * budget.base.steps / alone.operations())
    config = dataclasses.replace(alone.config, steps=steps)
    return [Training(LONGER, config, seed) for seed in range(len(students))]


def gain_of(results: Results, name: str) -> str:
    """In words, how much better a run is than training alone."""
    alike = [other for other in results.names() if (other in FEATURES) == (name in FEATURES)]
    return results.compare(name, ALONE, alike)


def report(results: Results) -> Section:
    """Table, figure and answer."""
    names = [ALONE, LONGER, *STUDENTS, *(f"teacher {name} itself" for name in TEACHERS)]
    scores = results.scores(names)
    benchmarks = results.benchmarks()
    rows = []
    for name in scores:
        gain = gain_of(results, name) if ALONE in scores and name != ALONE else ""
        values = (str(results.score(name, on) or "") for on in benchmarks)
        rows.append([name, f"{results.of(name)[0]['config']['steps']:,}", *values, gain])
    table = markdown(["student", "steps", *benchmarks, "gain, validation"], rows)

    answer = ""
    if ALONE in scores:
        gains = []
        for what, features in (("outputs", False), ("features", True)):
            students = [x for x in scores if x in STUDENTS and (x in FEATURES) == features]
            if students:
                best = max(students, key=lambda name: scores[name].mean)
                gains.append(f"the best student of {what} ({best}) gains {gain_of(results, best)}")
        if LONGER in scores:
            longer = gain_of(results, LONGER)
            gains.append(f"training alone for the time of teacher and student gains {longer}")
        if gains:
            answer = f"Over training alone, {'; '.join(gains)}."

    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(reversed(scores)):
        axes.errorbar(scores[name].mean, i, xerr=scores[name].deviation, fmt="o", color="tab:blue")
    axes.set_yticks(range(len(scores)), list(reversed(scores)))
    if ALONE in scores:
        axes.axvline(scores[ALONE].mean, ls=":", color="gray")
    axes.set(xlabel="validation PSNR-Y, dB")
    axes.grid(alpha=0.3, axis="x")
    return Section(answer, table, figure)


STUDY = Study(
    question="What does distillation give, where, and from which teacher?",
    paper="""
    Distilling the output helps by 0.01 to 0.02 dB; features at mid-level add nothing, nor does
    a teacher of twice the width.
    """,
    how="""
    The paper's student with L1 to a teacher, of weight lambda (1 unless stated), on the output
    or on the output of RSSBs. Teachers, channels x RSSBs, were trained with one seed and the
    same number of steps; `published` are the authors' weights. 'no teacher, and its time' takes
    as many more steps as the training of teacher 60 x 8 and its use would take, by operations.
    The spread of the seeds of students of RSSBs, which is larger, is pooled apart from that of
    the others.
    """,
    limits="""
    Teachers that were trained briefly are weak. The published weights are strong for their
    size, and of the student's own size. The L1 of features is much larger than that of the
    output, so that it rules the loss at the same weight; smaller weights were not tried.
    """,
    tasks=tasks,
    report=report,
)

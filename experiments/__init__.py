"""Studies: runs that answer a question about the network, and a report on their results.

    python -m experiments                          what there is, what each costs, what has been run
    python -m experiments depth --budget cpu       run it, or what is missing of it
    python -m experiments depth --dry-run          its runs and their cost
    python -m experiments report                   rebuild docs/studies.md from the results

A study is a file in `studies/` with a STUDY: a function from a budget to a list of tasks, and one
from their results to a table and a figure. To add a study, add such a file. To add a variant, add a
line to the study's dictionary of named configurations.

A task (`tasks.py`) is a piece of work whose outcome is a small JSON file: a training run
(`training.py`, by `dvmsr_jax.training.loop.train`), a timing (`timing.py`), or whatever a study
defines. It is identified by what its result depends on, so studies share the tasks that they have
in common, and a task that is changed is a new one. `budgets.py` scales all of them.

Any number of processes can run the same command, on one machine or on several that share the
folders --folder and --results. Each takes a task that nobody else is at, and none is done twice;
training runs that were interrupted go on from their last checkpoint. This rests on flock, which
Linux forwards over NFS and, mounted with that option, Lustre. Without it, start one process only.
"""

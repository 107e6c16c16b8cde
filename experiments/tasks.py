"""Tasks: pieces of work that end in a small JSON file, and the folders that they use."""

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvmsr_jax import files
from dvmsr_jax.config import DataConfig
from dvmsr_jax.errors import UserError

Facts = dict[str, Any]
"""JSON types."""


@dataclass(frozen=True)
class Place:
    """The folders that tasks read from and write to."""

    results: Path
    """Result files, one for each task."""
    work: Path
    """Training runs, and locks."""
    data: DataConfig
    """Where the training pictures are; its other fields are ignored."""
    benchmarks: tuple[Path, ...] = ()
    """Folders of test pictures, as for `evaluate.py --data`."""


class Task(abc.ABC):
    """A piece of work. Tasks with equal `facts` are the same."""

    name: str
    """Its row in the study's table. Tasks that differ only in their seed share it."""
    kind: str
    """The first word of its identifier."""

    @property
    def needs(self) -> tuple["Task", ...]:
        """Tasks whose results or weights it uses."""
        return ()

    @property
    def possible(self) -> bool:
        """Whether this machine has what it needs."""
        return True

    @property
    @abc.abstractmethod
    def facts(self) -> Facts:
        """What its result depends on."""

    @abc.abstractmethod
    def seconds(self) -> float:
        """Estimated time on the machine of `training.RATE`."""

    @abc.abstractmethod
    def run(self, place: Place) -> Facts:
        """Does it. A task that was interrupted is run again, and may go on from where it was."""

    @functools.cached_property
    def id(self) -> str:
        """Its name in the file system."""
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{digest[:10]}"

    def __str__(self) -> str:
        return self.name


def described(config: Any) -> Facts:
    """The fields of a configuration that differ from their defaults.

    A field that is added later therefore leaves identifiers as they are. The kind of a network is
    always among them.
    """
    default, found = type(config)(), {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = described(value)
        elif value != getattr(default, field.name) or field.name == "network":
            found[field.name] = value
    return json.loads(json.dumps(found, default=str))


def result_path(task: Task, place: Place) -> Path:
    """The file of its result."""
    return place.results / f"{task.id}.json"


def is_done(task: Task, place: Place) -> bool:
    """Whether it has a result."""
    return result_path(task, place).exists()


def write_result(task: Task, place: Place, result: Mapping[str, Any], origin: Facts) -> None:
    """Stores a result, with what it depends on and where it was made."""
    content = {"task": {"kind": task.kind, **task.facts}, "result": result, **origin}
    files.write_json(result_path(task, place), content)


def read_result(task: Task, place: Place) -> Facts:
    """The result of a task that is done.

    Raises:
        UserError: its file is damaged.
    """
    return _read(result_path(task, place))["result"]


def read_origin(task: Task, place: Place) -> Facts:
    """Where and when the result was made."""
    content = _read(result_path(task, place))
    return {name: content[name] for name in ("machine", "version", "seconds")}


def _read(path: Path) -> Facts:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or "result" not in content:
            raise ValueError("it holds something else")
    except ValueError as error:
        raise UserError(
            f"{path}: is not a result ({error}); restore it, or remove it to run its task again"
        ) from error
    return content


def in_order(tasks: Iterable[Task]) -> list[Task]:
    """The tasks and all that they need, each once, after those that it needs."""
    found: dict[str, Task] = {}

    def add(task: Task) -> None:
        if task.id not in found:
            for needed in task.needs:
                add(needed)
            found[task.id] = task

    for task in tasks:
        add(task)
    return list(found.values())

"""Tables of measurements: printed as Markdown and written as JSON, row by row."""

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from dvmsr_jax.files import write_json


@dataclasses.dataclass(frozen=True)
class Measured:
    """A measured number."""

    value: float
    unit: str = ""
    ratio: float | None = None
    """The improvement over a baseline."""
    remark: str = ""
    """Printed after the number."""

    def __str__(self) -> str:
        text = rounded(self.value, 3)
        if self.unit:
            text += self.unit if self.unit in ("x", "%") else f" {self.unit}"
        if self.ratio is not None:
            text += f" ({rounded(self.ratio)}x)"
        return text + self.remark


Cell: TypeAlias = str | int | Measured


@dataclasses.dataclass
class Table:
    """A table with the title above it."""

    title: str
    columns: list[str]
    text: list[str]
    """The columns that are aligned left; the others are numbers."""
    rows: list[list[Cell]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Table":
        """The table that `dataclasses.asdict` made this dictionary of."""
        rows = [
            [Measured(**cell) if isinstance(cell, dict) else cell for cell in row]
            for row in content["rows"]
        ]
        return cls(**content | {"rows": rows})

    def head(self) -> str:
        """The title and the header, as Markdown."""
        marks = ["---" if column in self.text else "---:" for column in self.columns]
        lines = [_line(self.columns), _line(marks)]
        return "\n".join(([self.title, ""] if self.title else []) + lines)

    def markdown(self) -> str:
        """The whole table as Markdown."""
        return "\n".join([self.head(), *map(_line, self.rows)])


class Report:
    """Prints tables of measurements as they come, and keeps a JSON file of them up to date."""

    def __init__(self, machine: str, path: Path | None = None):
        """Prints the machine; writes to `path` if given."""
        self.machine = machine
        self.tables: list[Table] = []
        self._path = path
        print(machine, flush=True)

    def table(self, columns: Iterable[str], text: Collection[str] = (), title: str = "") -> None:
        """Begins a table whose columns in `text` are not numbers."""
        self.tables.append(Table(title, list(columns), list(text)))
        print(f"\n{self.tables[-1].head()}", flush=True)

    def row(self, cells: Iterable[Cell]) -> None:
        """Adds a row to the last table."""
        cells = list(cells)
        self.tables[-1].rows.append(cells)
        print(_line(cells), flush=True)
        if self._path is not None:
            tables = [dataclasses.asdict(table) for table in self.tables]
            write_json(self._path, {"machine": self.machine, "tables": tables})


def rounded(x: float, digits: int = 2) -> str:
    """Formats a number with so many significant digits, or with all digits before the point."""
    return f"{x:,.0f}" if abs(x) >= 10 ** (digits - 1) else f"{x:.{digits}g}"


def _line(cells: Iterable[Cell]) -> str:
    texts = (f"{cell:,}" if isinstance(cell, int) else f"{cell}" for cell in cells)
    return f"| {' | '.join(texts)} |"

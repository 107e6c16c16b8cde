"""Markdown tables, printed row by row as the measurements come in."""

from collections.abc import Collection, Iterable


def print_head(columns: Iterable[str], text: Collection[str] = ()) -> None:
    """The names of the columns. Those in `text` are set left, all others, numbers, right."""
    columns = list(columns)
    print_row(columns)
    print_row("---" if column in text else "---:" for column in columns)


def print_row(cells: Iterable) -> None:
    """One row."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def rounded(x: float) -> str:
    """Two significant digits, or all before the point."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"

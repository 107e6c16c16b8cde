"""Markdown tables, printed row by row."""

from collections.abc import Collection, Iterable


def print_head(columns: Iterable[str], text: Collection[str] = ()) -> None:
    """Prints the header. Columns in `text` are aligned left, the others (numbers) right."""
    columns = list(columns)
    print_row(columns)
    print_row("---" if column in text else "---:" for column in columns)


def print_row(cells: Iterable) -> None:
    """Prints one row."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def rounded(x: float) -> str:
    """Formats a number with two significant digits, or with all digits before the point."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"

"""What a run and a comparison print when they are done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from shared.errors import RequestError
from shared.report.run_page import cost_rows, grouped, matrices, number, score_rows, spelled

WIDTH = 80  # where there is no terminal
WRITTEN = 12  # classes of a confusion matrix that is printed


def print_run(found: Mapping[str, Any]) -> None:
    """Scores of the test split, by class, their confusion, and what they cost, predicted and measured."""
    results = found["test"]
    groups = grouped(results)
    support = groups.pop("support", {})
    print_table(("test", ""), score_rows(results))
    if groups:
        counted = [results.get("unit", "pixels")] if support else []
        heads = (results.get("by", "class"), *(spelled(group) for group in groups), *counted)
        members = dict.fromkeys(name for values in groups.values() for name in values)
        counts = {name: [number(support.get(name))] if support else [] for name in members}
        print_table(heads, [(n, *(number(v.get(n)) for v in groups.values()), *counts[n]) for n in members])
    for task, matrix, names in matrices(found):
        if len(matrix) <= WRITTEN:
            rows = [(name, *(f"{count:,}" for count in row)) for name, row in zip(names, matrix, strict=True)]
            print_table(("truth \\ predicted", *names), rows, title=task or None)
    print_table(("cost", "predicted", "measured"), cost_rows(found))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A table; the first column is text, the others numbers. What is wider than the terminal becomes several tables,
    each with the first column."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise RequestError("tables need rich: pip install 'omniadapt[run]'") from error

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=WIDTH)
    rows = list(rows)
    cells = [[row[column] for row in rows] for column in range(len(heads))]
    narrow = [max(map(len, [*head.split(), "", *cells[i]])) for i, head in enumerate(heads)]  # heads break at blanks
    for columns in _pieces(narrow, console.width):
        whole = [max(len(heads[column]), narrow[column]) for column in columns]
        tight = sum(whole) + 2 * len(columns) + 2 > console.width
        look = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "header_style": "bold"}
        table = Table(title=title, title_justify="left", **look)
        for column in columns:
            width = min(narrow[column], 40) if tight else None
            table.add_column(heads[column], justify="right" if column else "left", overflow="fold", width=width)
        for row in rows:
            table.add_row(*(row[column] for column in columns))
        console.print(table)
        title = None


def _pieces(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Columns that fit beside the first one in turn; each takes 2 characters more than its text."""
    piece = [0]
    for column in range(1, len(widths)):
        if len(piece) > 1 and sum(widths[i] + 2 for i in (*piece, column)) + 2 > room:
            yield piece
            piece = [0]
        piece.append(column)
    yield piece

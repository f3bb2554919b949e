"""What a run and a comparison print when they are done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shared.errors import RequestError
from shared.report.run_page import cost_rows, grouped, number, score_rows, spelled


def print_run(found: Mapping[str, Any]) -> None:
    """Scores of the test split, by class, and what they cost."""
    classes = [
        (spelled(f"{g}/{n}"), number(v))
        for g, vs in grouped(found["test"]).items()
        if g != "support"
        for n, v in vs.items()
    ]
    print_table(("test", ""), [*score_rows(found["test"]), *classes])
    print_table(("cost", ""), cost_rows(found))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A table; the first column is text, the others numbers. Where there is no terminal it is as wide as it needs."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise RequestError("tables need rich: pip install 'omniadapt[run]'") from error

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold")
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=200)
    console.print(table)

"""What ``omniadapt list`` shows: the entries of a kind, methods by their place on the map of the field."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from shared import catalog, recipe
from shared.errors import RequestError
from shared.taxonomy import CATEGORIES


def rows(kind: str, filters: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Name, summary and, for a method, its record; recipes where ``kind`` is empty.

    filters: "key=value" of a method's record; all must hold. Raises RequestError where one matches nothing.
    """
    if filters and kind != "method":
        raise RequestError(f"only methods can be filtered ({filters[0]})")
    if not kind:
        return [{"name": name, "summary": recipe.summary(recipe.locate(name))} for name in recipe.names()]
    found = [{"name": e.name, "summary": e.summary, "module": e.module, **_record(e)} for e in catalog.entries(kind)]
    for each in filters:
        found = _filtered(found, each)
    if kind == "method":
        found.sort(key=lambda row: CATEGORIES.index(_category(row)))
    return found


def _record(entry: catalog.Entry) -> dict[str, Any]:
    return entry.record.row() if entry.record else {}


def _category(row: dict[str, Any]) -> str:
    return row["categories"][0] if "categories" in row else "reference"


def _filtered(found: list[dict[str, Any]], asked: str) -> list[dict[str, Any]]:
    key, equals, value = asked.partition("=")
    if not equals:
        raise RequestError(f"filter {asked!r}: write key=value, such as mergeable=yes")
    keys = {name for row in found for name in row}
    if found and key not in keys:
        raise RequestError(f"no method has a {key!r}{catalog.nearest(key, keys)}")
    kept = [row for row in found if value in _spellings(row.get(key))]
    if not kept:
        there = sorted({text for row in found for text in _spellings(row.get(key)) if text})
        raise RequestError(f"no method has {asked}; there are {', '.join(there) or 'none left'}")
    return kept


def _spellings(value: Any) -> list[str]:
    """The words that match a value: any of a list's, yes or no for a flag."""
    if isinstance(value, bool):
        return ["yes", "true"] if value else ["no", "false"]
    return [str(each) for each in value] if isinstance(value, (list, tuple)) else [str(value)]


def lines(found: Sequence[dict[str, Any]], columns: int = sys.maxsize) -> Iterator[str]:
    """The rows as text, methods below the name of their category."""
    width = max((len(row["name"]) for row in found), default=0)
    group, indent = None, ""
    for row in found:
        if "categories" in row and _category(row) != group:
            group, indent = _category(row), "  "
            yield group
        room = max(columns - width - 2 - len(indent), 20)
        yield f"{indent}{row['name']:<{width}}  {textwrap.shorten(row['summary'], room, placeholder=' …')}"

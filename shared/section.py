"""Sections of recipes: a class by name and its arguments, checked against its signature before anything is built."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shared import catalog
from shared.errors import RequestError

ONLY = {"optimiser": "Optimiser", "trainer": "Engine"}  # the type of a section that need not say it


@dataclass(frozen=True)
class Section:
    """One class of a recipe and its checked arguments.

    nested: arguments that are sections by name themselves (``data.tasks.NAME``), as a type spells them with
    ``Mapping[str, Annotated[Any, "data"]]``.
    """

    entry: catalog.Entry
    arguments: dict[str, Any]
    nested: dict[str, dict[str, Section]] = field(default_factory=dict)

    def build(self, *wired: Any) -> Any:
        """The object, its positional arguments those of ``wired``. Raises RequestError as its class does."""
        parts = {
            argument: {name: _told(f"{argument}.{name}", section) for name, section in sections.items()}
            for argument, sections in self.nested.items()
        }
        return self.entry.load()(*wired, **self.arguments, **parts)

    def outline(self) -> SimpleNamespace:
        """A data set's ``bands`` and ``classes`` as its settings or its class state them, None where only files tell;
        classes by task where there are several. Its other settings are there as they are, or their defaults, and
        what its class states of all its data."""
        kind, given = self.entry.load(), self.arguments
        defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
        bands = given.get("bands") or given.get("band_names") or defaults.get("bands") or getattr(kind, "bands", None)
        classes = given.get("classes") or getattr(kind, "classes", None)
        count = bands if isinstance(bands, int) else len(bands) if isinstance(bands, Sequence) else None
        known: Any = tuple(classes) if isinstance(classes, Sequence) else None
        if parts := next(iter(self.nested.values()), None):
            by_task = {name: section.outline().classes for name, section in parts.items()}
            known = by_task if all(by_task.values()) else None
        stated = {n: v for base in getattr(kind, "__mro__", ())[::-1] for n, v in vars(base).items()}
        stated = {n: v for n, v in stated.items() if not n.startswith("_") and not hasattr(v, "__get__")}
        settings = {name: v for name, v in {**defaults, **given}.items() if v is not inspect.Parameter.empty}
        return SimpleNamespace(**{**stated, **settings, "bands": count, "classes": known})

    def drawn_by(self, seed: int) -> None:
        """Data whose ``seed`` is None unless given take this one."""
        if any(a.name == "seed" and a.default == "None" for a in self.entry.arguments):
            self.arguments["seed"] = seed if self.arguments.get("seed") is None else self.arguments["seed"]
        for sections in self.nested.values():
            for section in sections.values():
                section.drawn_by(seed)


def _told(path: str, section: Section) -> Any:
    try:
        return section.build()
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def check(path: str, kind: str, value: Any, problems: list[str], files: bool) -> Section | None:
    """The section of a ``kind`` that a value spells; what is wrong goes to ``problems``, each with its key path.

    files: whether the files it names must exist.
    """
    if not isinstance(value, Mapping):
        problems.append(f"{path}: wants a mapping with a type and its settings, got {value!r}")
        return None
    given = dict(value)
    name = given.pop("type", ONLY.get(kind))
    if not isinstance(name, str):
        problems.append(f"{path}.type: wants the name of a {kind}, got {name!r}")
        return None
    try:
        entry = catalog.find(name, kind)
    except RequestError as error:
        problems.append(f"{path}.type: {error}")
        return None
    known = {argument.name: argument for argument in entry.arguments}
    for key in (key for key in given if key not in known):
        have = f" (it has: {', '.join(known)})" if known else " (it has none)"
        problems.append(f"{path}.{key}: {entry.name} has no such setting{catalog.nearest(str(key), known) or have}")
    problems += [
        f"{path}.{a.name}: {entry.name} needs it ({a.type})"
        for a in entry.arguments
        if a.required and a.name not in given
    ]
    found = Section(entry, {})
    for a in entry.arguments:
        if a.name in given and (inner := _kind_within(entry.annotation(a))):
            found.nested[a.name] = _nested(f"{path}.{a.name}", inner, given[a.name], problems, files)
        elif a.name in given:
            found.arguments[a.name] = _value(f"{path}.{a.name}", entry, a, given[a.name], problems, files)
    return found


def _kind_within(annotation: Any) -> str | None:
    """The kind of the sections that a ``Mapping[str, Annotated[Any, KIND]]`` holds; None for any other type."""
    marks = [m for inner in typing.get_args(annotation) for m in getattr(inner, "__metadata__", ())]
    return marks[0] if marks and marks[0] in catalog.KINDS else None


def _nested(path: str, kind: str, value: Any, problems: list[str], files: bool) -> dict[str, Section]:
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        problems.append(f"{path}: wants a name with a type and its settings for each, got {value!r}")
        return {}
    found = {name: check(f"{path}.{name}", kind, each, problems, files) for name, each in value.items()}
    return {name: section for name, section in found.items() if section}


def _value(
    path: str, entry: catalog.Entry, argument: catalog.Argument, value: Any, problems: list[str], files: bool
) -> Any:
    """The value as its type wants it (a Path, a tuple …), strictly: "8" is no number and 1 is no truth value."""
    try:
        from pydantic import ConfigDict, TypeAdapter, ValidationError
    except ImportError as error:
        raise RequestError("recipes need pydantic: pip install 'omniadapt[run]'") from error
    adapter = TypeAdapter(entry.annotation(argument), config=ConfigDict(strict=True, allow_inf_nan=False))
    try:
        checked = adapter.validate_json(json.dumps(value, default=str))
    except ValidationError:
        problems.append(f"{path}: wants {argument.type}, got {value!r}")
        return None
    if files:
        text = "Path" in argument.type and "Literal" not in argument.type
        absent = [p for p in _paths(checked, text) if not p.exists()]
        problems += [f"{path}: no such file or folder: {p} (paths are relative to {Path.cwd()})" for p in absent]
    return checked


def _paths(value: Any, text: bool) -> Iterable[Path]:
    """The paths within a value; ``text`` says that strings are paths too (the type names both)."""
    if isinstance(value, Path) or (text and isinstance(value, str)):
        yield Path(value)
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _paths(item, text)

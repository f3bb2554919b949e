"""The catalogue: what a recipe may name, found by reading the source files; nothing is imported and nothing registers.

A class is configurable by what it is:

- a method derives from ``Method``, a backbone from a class whose name ends in ``Backbone``, a task from ``Task``;
- data is a class of a module or package called ``data`` that offers ``train``, ``validation`` and ``test`` and is built
  from keyword arguments alone;
- a head is a class of a module or package called ``heads`` that offers ``loss`` and ``predict``;
- an optimiser is ``Optimiser`` or ``SPSA`` and the trainer ``Engine``, of ``shared.training``.

Public classes at the top level of the modules below ``shared/methods``, ``shared/training`` and ``modalities`` count.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from shared.errors import RequestError
from shared.taxonomy import Record

KINDS = ("task", "data", "backbone", "method", "head", "optimiser", "trainer")
_ROOT = Path(__file__).resolve().parent.parent
_ROOMS = ("shared/methods/", "shared/training/", "modalities/")


@dataclass(frozen=True)
class Argument:
    """One constructor argument as its source spells it: name, type, and default (None where it must be given)."""

    name: str
    type: str
    default: str | None

    @property
    def required(self) -> bool:
        return self.default is None


@dataclass(frozen=True)
class Entry:
    """A configurable class: where it is, what it says of itself, and its keyword-only constructor arguments."""

    name: str
    kind: str
    module: str
    doc: str
    arguments: tuple[Argument, ...]
    record: Record | None = None  # a method's place on the map of the field

    @property
    def summary(self) -> str:
        """The first sentence or paragraph of the docstring, on one line."""
        return " ".join(self.doc.partition("\n\n")[0].split())

    def load(self) -> type:
        """The class itself; imports its module."""
        return getattr(importlib.import_module(self.module), self.name)

    def annotation(self, argument: Argument) -> Any:
        """The type of an argument as an object, from the source alone."""
        return _evaluate(argument.type, _scan()[self.module].aliases)


def entries(kind: str | None = None) -> list[Entry]:
    """All configurable classes (of one kind), by name. Raises RequestError where two share a name."""
    return [entry for entry in _catalogue() if kind in (None, entry.kind)]


def find(name: str, kind: str | None = None) -> Entry:
    """The entry called ``name``; case, ``_`` and ``-`` do not matter (``cloud_adapter`` is ``CloudAdapter``).

    Raises RequestError that names the nearest known name.
    """
    known = {fold(entry.name): entry for entry in entries(kind)}
    if fold(name) in known:
        return known[fold(name)]
    what = kind or "class"
    have = ", ".join(entry.name for entry in known.values()) or "none"
    raise RequestError(
        f"no {what} is called {name!r}{nearest(name, [e.name for e in known.values()])} (there are: {have})"
    )


def fold(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; nearest: 'x'", or nothing where no name comes near."""
    folded = {fold(n): n for n in names}
    near = difflib.get_close_matches(fold(name), folded, n=1)
    return f"; nearest: {folded[near[0]]!r}" if near else ""


@dataclass
class _Class:
    """What the source of one top-level class says."""

    name: str
    module: str
    bases: list[str]
    doc: str
    methods: set[str]
    arguments: list[Argument] | None  # None where it inherits its constructor
    wired: bool  # its own constructor has positional arguments
    open: bool  # its constructor passes further arguments up
    record: dict[str, Any] | None = None


@dataclass
class _Module:
    classes: list[_Class] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)  # top-level NAME = expression: may be a type's alias


@cache
def _catalogue() -> tuple[Entry, ...]:
    classes = [c for module in _scan().values() for c in module.classes]
    by_name = {c.name: c for c in classes}
    found: dict[str, Entry] = {}
    for each in classes:
        kind = _kind(each, by_name)
        if kind is None:
            continue
        record = _record(each) if kind == "method" else None
        entry = Entry(each.name, kind, each.module, each.doc, tuple(_arguments(each, by_name)), record)
        if other := found.get(fold(entry.name)):
            raise RequestError(
                f"two classes are called {entry.name}: {other.module} and {entry.module}; rename one of them"
            )
        found[fold(entry.name)] = entry
    return tuple(sorted(found.values(), key=lambda e: e.name.lower()))


@cache
def _scan() -> dict[str, _Module]:
    files = sorted(p for top in ("shared", "modalities") for p in (_ROOT / top).rglob("*.py"))
    return {_dotted(path): _read(path) for path in files}


def _dotted(path: Path) -> str:
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(path: Path) -> _Module:
    module = _Module()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            functions = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
            bases = [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]
            docs = [ast.get_docstring(n) for n in (node, functions.get("__init__")) if n is not None]
            doc = "\n\n".join(filter(None, docs))
            init = functions.get("__init__")
            wired = init is not None and len(init.args.args) > 1
            arguments, passes_on = _constructor(node, init)
            module.classes.append(
                _Class(node.name, _dotted(path), bases, doc, set(functions), arguments, wired, passes_on, _facts(node))
            )
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            module.aliases[node.targets[0].id] = ast.unparse(node.value)
    return module


def _facts(node: ast.ClassDef) -> dict[str, Any] | None:
    """The literal arguments of ``record: ClassVar = Record(...)``, where the class has one."""
    for each in node.body:
        if (
            isinstance(each, ast.AnnAssign)
            and ast.unparse(each.target) == "record"
            and isinstance(each.value, ast.Call)
        ):
            return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in each.value.keywords}
    return None


def _record(method: _Class) -> Record | None:
    try:
        return None if method.record is None else Record(**method.record)
    except TypeError as error:
        raise RequestError(f"method {method.name} ({method.module}): its record does not read: {error}") from error


def _line(each: _Class, by_name: dict[str, _Class]) -> Iterator[_Class | str]:
    """The class and its ancestors, nearest first; an ancestor whose source is not ours is its bare name."""
    yield each
    for base in each.bases:
        if base in by_name and by_name[base] is not each:
            yield from _line(by_name[base], by_name)
        else:
            yield base


def _kind(each: _Class, by_name: dict[str, _Class]) -> str | None:
    place = each.module.replace(".", "/") + "/"
    if each.name.startswith("_") or not place.startswith(_ROOMS):
        return None
    line = list(_line(each, by_name))
    ancestors = {c if isinstance(c, str) else c.name for c in line[1:]}
    offers = {name for c in line if isinstance(c, _Class) for name in c.methods}
    rooms = each.module.split(".")
    if "Protocol" in each.bases:
        return None
    if "Method" in ancestors:
        return "method"
    if any(name.endswith("Backbone") for name in ancestors):
        return "backbone"
    if "Task" in ancestors:
        return "task"
    if "data" in rooms and {"train", "validation", "test"} <= offers and not each.wired:
        return "data"
    if "heads" in rooms and {"loss", "predict"} <= offers:
        return "head"
    if rooms[:2] == ["shared", "training"]:
        return {"Optimiser": "optimiser", "SPSA": "optimiser", "Engine": "trainer"}.get(each.name)
    return None


def _constructor(node: ast.ClassDef, init: ast.FunctionDef | None) -> tuple[list[Argument] | None, bool]:
    """A class's own keyword-only arguments or dataclass fields, and whether its ancestors' count too."""
    if init is not None:
        pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
        given = [Argument(a.arg, _text(a.annotation) or "Any", _text(default)) for a, default in pairs]
        return given, init.args.kwarg is not None
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return None, True
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    fields = [n for n in fields if "ClassVar" not in ast.unparse(n.annotation)]
    return [Argument(n.target.id, ast.unparse(n.annotation), _text(n.value)) for n in fields], True  # type: ignore[union-attr]


def _text(node: ast.expr | None) -> str | None:
    return None if node is None else ast.unparse(node)


def _arguments(each: _Class, by_name: dict[str, _Class]) -> Iterator[Argument]:
    """What the constructor takes: the class's own arguments, then those it passes on to its ancestors."""
    seen: set[str] = set()
    for ancestor in _line(each, by_name):
        if isinstance(ancestor, str) or ancestor.arguments is None:
            continue
        yield from (a for a in ancestor.arguments if a.name not in seen)
        seen |= {a.name for a in ancestor.arguments}
        if not ancestor.open:
            return


def _evaluate(text: str, aliases: dict[str, str]) -> Any:
    """An annotation as an object; it may use the names of typing, collections.abc, Path and its module's aliases."""
    import builtins
    import collections.abc
    import pathlib
    import typing

    names: dict[str, Any] = {**vars(builtins), **vars(typing), **vars(collections.abc), "Path": pathlib.Path}
    for node in ast.walk(ast.parse(text, mode="eval")):
        if isinstance(node, ast.Name) and node.id not in names and node.id in aliases:
            names[node.id] = _evaluate(aliases[node.id], aliases)
    return eval(text, {"__builtins__": {}}, names)  # our own source, not a user's

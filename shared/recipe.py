"""Recipes: YAML whose keys are constructor arguments, checked whole against the signatures before anything is built.

A recipe has the sections ``task, data, backbone, method, head, optimiser, trainer`` and a ``seed``. A section names a
class (``type``, a name that ``shared.catalog`` finds) and gives its keyword-only arguments; the run wires in the rest
(``shared.section``).
Data whose ``seed`` is None unless given are drawn by the run's.
``tiny`` holds the overrides of a quick run, merged deep. ``compare`` holds, by name, the overrides of each way that
``omniadapt compare`` trains by default. Where ``tiny`` or a command line changes a section's ``type``,
the section starts empty: settings of one class never leak into another.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shared import catalog
from shared.errors import RequestError
from shared.section import ONLY, Section
from shared.section import check as section_of

REQUIRED = ("task", "data", "backbone", "method")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. name: path below the recipes folder.  tree: the resolved YAML values.

    variants: what ``compare`` trains by default, overrides by name.
    """

    name: str
    source: Path
    tree: dict[str, Any]
    sections: dict[str, Section]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.tree["seed"]

    def build(self, section: str, **wired: Any) -> Any:
        """The section's object, None where it is absent; its positional arguments are taken from ``wired`` by name."""
        if section not in self.sections:
            return None
        chosen = self.sections[section]
        kind = chosen.entry.load()
        wants = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if lacking := [name for name in wants if wired.get(name) is None]:
            what = f"{chosen.entry.name} needs {lacking[0]}, which neither the data's settings nor the backbone state"
            raise RequestError(f"{self.source}: {section}: {what}")
        try:
            return chosen.build(*(wired[name] for name in wants))
        except RequestError as error:
            where = "" if str(error).startswith(section) else f"{section}: "
            raise RequestError(f"{self.source}: {where}{error}") from error

    def outline(self) -> SimpleNamespace:
        """The data's ``bands`` and ``classes`` as far as its settings or its class state them (``Section.outline``)."""
        return self.sections["data"].outline()

    def replaced(self, **sections: Any) -> Recipe:
        """The same recipe with other settings, checked again; the rule for a changed ``type`` holds here too."""
        return check(merge(self.tree, sections), self.name, self.source)

    def text(self, *, variants: bool = False) -> str:
        """The resolved recipe as YAML: running it repeats the run; with ``variants``, comparing it the comparison."""
        import yaml

        tree = self.tree | ({"compare": self.variants} if variants and self.variants else {})
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def load(name: str, overrides: Iterable[str] = (), *, tiny: bool = False, files: bool = True) -> Recipe:
    """Find, read, override and check a recipe.

    name: a path, or a name below the recipes folder ("quickstart").  overrides: "section.key=value", values in YAML.
    tiny: merge the recipe's ``tiny`` section.  files: whether the files it names must exist.

    Raises RequestError with one line for each thing that is wrong.
    """
    source = locate(name)
    tree = read(source)
    if not isinstance(tree.get("tiny", {}), Mapping):
        raise RequestError(f"{source}: tiny: wants sections to override, got {tree['tiny']!r}")
    small = tree.pop("tiny", None)
    if tiny and not small:
        raise RequestError(f"{source}: it has no 'tiny' section")
    tree = merge(tree, small if tiny else {})
    return check(merge(tree, parse(overrides)), recipe_name(source), source, files=files)


def folder() -> Path:
    """Where the project's recipes are: in the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "_recipes"
    return installed if installed.is_dir() else Path(__file__).resolve().parent.parent / "recipes"


def names() -> list[str]:
    """The project's recipes by name."""
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.yaml"))


def locate(name: str) -> Path:
    """The file of a recipe given by path or by name."""
    for path in (Path(name), folder() / f"{name}.yaml"):
        if path.is_file():
            return path
    have = ", ".join(names()) or "none"
    near = catalog.nearest(name, names())
    raise RequestError(f"no recipe {name!r}: neither a file nor one of the project's{near} (there are: {have})")


def recipe_name(source: Path) -> str:
    path = source.resolve()
    inside = path.is_relative_to(folder().resolve())
    return path.relative_to(folder().resolve()).with_suffix("").as_posix() if inside else path.stem


def summary(source: Path) -> str:
    """What a recipe says of itself: its first comment line."""
    first = source.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def read(source: Path) -> dict[str, Any]:
    """The YAML of a file; a syntax error or a key given twice is told with its line and column."""
    try:
        import yaml
    except ImportError as error:
        raise RequestError("recipes need pyyaml: pip install 'omniadapt[run]'") from error
    try:
        tree = yaml.load(source.read_text(encoding="utf-8"), Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown place"
        raise RequestError(f"{source}: bad YAML at {place}: {error.problem or error.context}") from error
    except OSError as error:
        raise RequestError(f"{source}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{source}: not a YAML text: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise RequestError(f"{source}: a recipe is a mapping of sections, got {type(tree).__name__}")
    return tree


def _loader() -> type:
    """YAML's safe loader, which also reads 1e-4 as a number and refuses a key given twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def parse(overrides: Iterable[str]) -> dict[str, Any]:
    """The tree that "section.key=value" items spell; of two for one key the later wins."""
    import yaml

    tree: dict[str, Any] = {}
    for item in overrides:
        path, equals, text = item.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise RequestError(f"override {item!r}: write key.path=value, such as method.rank=16")
        try:
            value = yaml.load(text, Loader=_loader())
        except yaml.YAMLError as error:
            raise RequestError(
                f"override {item!r}: the value is not YAML ({getattr(error, 'problem', error)})"
            ) from error
        for key in reversed(keys):
            value = {key: value}
        tree = merge(tree, value)
    return tree


def merge(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with the values of ``over``, mappings merged deep; a mapping whose ``type`` changes starts empty."""
    merged = dict(tree)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            changes = (
                "type" in value and "type" in old and catalog.fold(str(value["type"])) != catalog.fold(str(old["type"]))
            )
            merged[key] = merge({} if changes else old, value)
        else:
            merged[key] = value
    return merged


def check(tree: Mapping[str, Any], name: str, source: Path, *, files: bool = True) -> Recipe:
    """The recipe a resolved tree spells. Raises RequestError with one line for each problem found."""
    tree = {"seed": 0, **tree}
    variants, problems = tree.pop("compare", {}), []
    sections: dict[str, Section] = {}
    for key, value in tree.items():
        if key in catalog.KINDS:
            section = section_of(key, key, value, problems, files)
            sections |= {key: section} if section else {}
        elif key != "seed":
            problems.append(
                f"{key}: no such section{catalog.nearest(str(key), (*catalog.KINDS, 'seed', 'tiny', 'compare'))}"
            )
    problems += [f"{key}: this section is missing" for key in REQUIRED if key not in tree]
    if type(tree["seed"]) is not int or not 0 <= tree["seed"] < 2**32:
        problems.append(f"seed: wants an int from 0 to 2**32 - 1, got {tree['seed']!r}")
    if problems:
        many = f"{len(problems)} problems\n  " if len(problems) > 1 else ""
        raise RequestError(f"{source}: {many}" + "\n  ".join(problems))
    sections["data"].drawn_by(tree["seed"])
    for key in ("optimiser", "trainer"):
        sections.setdefault(key, Section(catalog.find(ONLY[key], key), {}))
    return Recipe(name, source, tree, sections, _variants(variants, tree, name, source, files))


def _variants(variants: Any, tree: Mapping[str, Any], name: str, source: Path, files: bool) -> dict[str, Any]:
    """The ``compare`` section, each of its entries checked as the recipe it makes."""
    if not isinstance(variants, Mapping) or not all(isinstance(over, Mapping) for over in variants.values()):
        raise RequestError(f"{source}: compare: wants a name with sections to override for each, got {variants!r}")
    for label, over in variants.items():
        if not re.fullmatch(r"[\w .-]+", str(label)):
            raise RequestError(f"{source}: compare: {label!r} is no name for a directory")
        try:
            check(merge(tree, over), name, source, files=files)
        except RequestError as error:
            raise RequestError(str(error).replace(f"{source}: ", f"{source}: compare.{label}: ", 1)) from error
    return {str(label): dict(over) for label, over in variants.items()}

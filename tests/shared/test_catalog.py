"""The catalogue: kinds and arguments as the source spells them are those Python sees."""

from __future__ import annotations

import inspect
import textwrap
import typing
from pathlib import Path

import pytest

from shared import catalog
from shared.errors import RequestError


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Writes files of a source tree of its own and makes the catalogue read that tree."""
    monkeypatch.setattr(catalog, "_ROOT", tmp_path)
    for function in (catalog._scan, catalog._catalogue):
        function.cache_clear()

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(textwrap.dedent(text))

    yield write
    for function in (catalog._scan, catalog._catalogue):
        function.cache_clear()


def kinds() -> dict[str, str]:
    return {entry.name: entry.kind for entry in catalog.entries()}


def test_every_entry_reads_as_python_sees_it():
    seen = catalog.entries()
    assert {"LoRA", "Probe", "Full", "CloudAdapter"} <= {entry.name for entry in seen}
    for entry in seen:
        kind = entry.load()
        assert kind.__name__ == entry.name
        hints = typing.get_type_hints(kind.__init__, include_extras=True)
        keywords = {n: p for n, p in inspect.signature(kind).parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert sorted(a.name for a in entry.arguments) == sorted(keywords), entry.name
        for argument in entry.arguments:
            parameter = keywords[argument.name]
            assert entry.annotation(argument) == hints[argument.name], f"{entry.name}.{argument.name}"
            assert argument.required == (parameter.default is parameter.empty), f"{entry.name}.{argument.name}"


def test_kinds_follow_from_what_a_class_is(source):
    source("shared/method.py", "class Method: ...\nclass WeightMethod(Method): ...")
    source("shared/methods/a.py", "class A(WeightMethod): ...\nclass _Hidden(Method): ...\nclass Helper: ...")
    source("modalities/x/backbones/b.py", "class B(shared.backbone.TokenBackbone): ...")
    source("modalities/x/task.py", "class T(Task): ...")
    loaders = "    def train(self): ...\n    def validation(self): ...\n    def test(self): ...\n"
    source("modalities/x/data/d.py", f"class Base:\n    def __init__(self, source, *, size): ...\n{loaders}")
    source("modalities/x/data/e.py", "class D(Base):\n    def __init__(self, *, root: str): ...\n")
    source("modalities/x/heads.py", "class H:\n    def loss(self): ...\n    def predict(self): ...\nclass Part: ...")
    source("shared/training/optimiser.py", "class Optimiser: ...\nclass Other: ...")
    source("shared/training/engine.py", "class Engine: ...")
    assert kinds() == {
        "A": "method", "B": "backbone", "T": "task", "D": "data", "H": "head",
        "Optimiser": "optimiser", "Engine": "trainer",
    }  # fmt: skip


def test_arguments_of_dataclasses_constructors_and_ancestors(source):
    source(
        "modalities/x/methods.py",
        '''
        Depth = str | int

        @dataclass(frozen=True, kw_only=True)
        class Low(Method):
            """Low.

            More."""
            fixed: ClassVar[bool] = True
            rank: int = 8
            depth: Depth = "all"

        @dataclass(frozen=True, kw_only=True)
        class Lower(Low):
            gate: float

        class Wired(Method):
            def __init__(self, site, *, size: tuple[int, int], rest: Sequence[str] = ()): ...

        class Passing(Wired):
            def __init__(self, site, *, more: bool = False, **rest): ...

        class Plain(Passing): ...
        ''',
    )
    spelled = {e.name: [(a.name, a.type, a.default) for a in e.arguments] for e in catalog.entries()}
    assert spelled["Low"] == [("rank", "int", "8"), ("depth", "Depth", "'all'")]
    assert spelled["Lower"] == [("gate", "float", None), *spelled["Low"]]
    assert spelled["Wired"] == [("size", "tuple[int, int]", None), ("rest", "Sequence[str]", "()")]
    assert spelled["Passing"] == [("more", "bool", "False"), *spelled["Wired"]] == spelled["Plain"]
    low = catalog.find("low")
    assert low.annotation(low.arguments[1]) == str | int
    assert low.summary == "Low."


def test_two_classes_of_one_name_are_refused(source):
    source("modalities/x/a.py", "class Same(Method): ...")
    source("modalities/y/a.py", "class Same(Method): ...")
    with pytest.raises(RequestError, match=r"two classes are called Same: modalities\.x\.a and modalities\.y\.a"):
        catalog.entries()


def test_find_forgives_case_and_underscores_and_names_the_nearest():
    assert catalog.find("cloud_adapter").name == "CloudAdapter"
    assert catalog.find("lora", "method").name == "LoRA"
    with pytest.raises(RequestError, match=r"no method is called 'LoRAA'; nearest: 'LoRA' \(there are: "):
        catalog.find("LoRAA", "method")
    with pytest.raises(RequestError, match="no head is called 'LoRA'"):
        catalog.find("LoRA", "head")


def test_each_file_is_read_once(monkeypatch):
    parse, read = catalog.ast.parse, []
    monkeypatch.setattr(catalog.ast, "parse", lambda text, *a, **k: read.append(text) or parse(text, *a, **k))
    for function in (catalog._scan, catalog._catalogue):
        function.cache_clear()
    catalog.entries()
    catalog.entries("method")
    root = Path(catalog.__file__).parent.parent
    files = [path for top in ("shared", "modalities") for path in (root / top).rglob("*.py")]
    whole = [text for text in read if "\n" in text]  # annotations are parsed too, each a single line
    assert 100 < len(whole) == len(files)

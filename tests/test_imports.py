"""What importing costs, and which way it goes: recipes name modalities, modalities import shared, none in a circle.

``import shared`` loads torch and no other heavy library, ``omniadapt --help`` not even torch; each such check runs in a
fresh interpreter. Directions are read from the sources, so that imports inside functions count. Checks can fail.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

HEAVY = (
    "timm", "open_clip", "segment_anything", "diffusers", "transformers", "tokenizers", "lightning", "torchmetrics",
    "torchvision", "rasterio", "matplotlib", "PIL", "scipy", "pydantic", "yaml", "rich",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
MODALITIES = {"diffusion", "images", "language", "remote_sensing", "vision_language"}
EVERYTHING_OF_SHARED = "import shared\nfor name in shared.__all__: getattr(shared, name)"
HELP = "import shared.cli\ntry: shared.cli.main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0"


def loaded_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of the libraries ``names`` a fresh interpreter has loaded after ``code``."""
    report = f"\nimport sys\nprint(*[n for n in {names!r} if n in sys.modules], sep=',', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [name for name in done.stderr.strip().split(",") if name]


def test_shared_loads_torch_and_nothing_else_that_is_heavy():
    assert loaded_by(EVERYTHING_OF_SHARED, ("torch", *HEAVY)) == ["torch"]


def test_help_does_not_even_load_torch():
    assert loaded_by(HELP, ("torch", "numpy", *HEAVY)) == []


@pytest.mark.parametrize("command", ["list methods", "show LoRA", "list recipes"])
def test_what_only_reads_source_does_not_load_torch(command):
    code = f"import shared.cli\nassert shared.cli.main({command.split()!r}) == 0"
    assert loaded_by(code, ("torch", *HEAVY)) == []


def test_the_check_can_fail():
    assert loaded_by(EVERYTHING_OF_SHARED + "\nimport yaml", ("torch", *HEAVY)) == ["torch", "yaml"]
    with pytest.raises(AssertionError, match="boom"):
        loaded_by("raise RuntimeError('boom')", HEAVY)


# -- directions --------------------------------------------------------------------------------------------------------


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports, wherever it does, or names in a text that begins with ``modalities.``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{file}: a relative import"
            assert node.level == 0, f"{file}: a relative import"
            yield from ([f"modalities.{a.name}" for a in node.names] if node.module == "modalities" else [node.module])
        elif isinstance(node, ast.Constant) and re.match(r"modalities\.\w", str(node.value)):
            yield str(node.value)


def others(modality: Path) -> set[str]:
    """Which other modalities the files of one import."""
    names = [name for file in modality.rglob("*.py") for name in imported(file)]
    return {name.split(".")[1] for name in names if name.startswith("modalities.")} - {modality.name}


def graph(folder: Path) -> dict[str, set[str]]:
    """The modalities of a folder, with those that each imports."""
    return {path.name: others(path) for path in sorted(folder.iterdir()) if (path / "__init__.py").is_file()}


def test_no_modalities_import_each_other_in_a_circle():
    found = graph(ROOT / "modalities")
    assert found.keys() == MODALITIES
    assert found["vision_language"] == {"images"}
    TopologicalSorter(found).prepare()  # raises a CycleError that names the circle


def test_a_modality_imports_only_the_face_of_another():
    inside = []
    for modality in graph(ROOT / "modalities"):
        files = list((ROOT / "modalities" / modality).rglob("*.py"))
        names = [(file.name, name) for file in files for name in imported(file) if name.startswith("modalities.")]
        inside += [found for found in names if found[1].split(".")[1] != modality and found[1].count(".") > 2]
    assert inside == []


def test_shared_imports_no_modality():
    files = list((ROOT / "shared").rglob("*.py"))
    assert len(files) > 100
    assert [file for file in files if any(name.startswith("modalities") for name in imported(file))] == []


@pytest.mark.parametrize(
    "back",
    [
        "import modalities.one.data",
        "def f():\n    from modalities.one.data import x",
        "def f():\n    from modalities import one",
        "def f(name):\n    return importlib.import_module(f'modalities.one.{name}')",
    ],
)
def test_a_circle_is_seen(tmp_path, back):
    chain = {"one": "from modalities.two import y", "two": "from modalities.three import z", "three": back}
    for name, text in chain.items():
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "data" / "x.py").write_text(text)
    with pytest.raises(CycleError):
        TopologicalSorter(graph(tmp_path)).prepare()


# -- light layers ------------------------------------------------------------------------------------------------------


def roots(statements: list[ast.stmt]) -> set[str]:
    """First names of the modules these statements import."""
    found: set[str] = set()
    for statement in statements:
        if isinstance(statement, ast.Import):
            found |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            found.add((statement.module or "").split(".")[0])
    return found


@pytest.mark.parametrize(
    ("package", "least", "inside"),
    [
        ("modalities/remote_sensing/data", 10, {"rasterio", "scipy"}),
        ("shared/rasters", 5, {"rasterio"}),
        ("shared/mapping", 5, {"rasterio", "rich"}),
    ],
)
def test_rasters_need_torch_and_numpy_alone_until_a_function_runs(package, least, inside):
    trees = {file.name: ast.parse(file.read_text()) for file in (ROOT / package).glob("*.py")}
    light = {*sys.stdlib_module_names, "numpy", "torch", "shared", "modalities"}
    assert len(trees) > least
    assert {name: heavy for name, tree in trees.items() if (heavy := roots(tree.body) - light)} == {}
    everything = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert roots(everything) - light >= inside

"""Importing the data layer needs torch and numpy alone: heavier libraries are imported by what uses them."""

import ast
import sys
from pathlib import Path

import modalities.remote_sensing.data as package

FILES = sorted(Path(package.__file__).parent.glob("*.py"))
LIGHT = {*sys.stdlib_module_names, "numpy", "torch", "shared", "modalities"}


def roots(statements: list[ast.stmt]) -> set[str]:
    """First names of the modules these statements import."""
    found: set[str] = set()
    for statement in statements:
        if isinstance(statement, ast.Import):
            found |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            found.add((statement.module or "").split(".")[0])
    return found


def test_modules_import_light_libraries_only():
    assert len(FILES) > 10
    assert {path.name: heavy for path in FILES if (heavy := roots(ast.parse(path.read_text()).body) - LIGHT)} == {}


def test_functions_do_import_the_heavy_ones():
    everything = [
        node for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.stmt)
    ]
    assert roots(everything) - LIGHT >= {"rasterio", "scipy"}

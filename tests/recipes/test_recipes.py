"""Every recipe of the project: complete, counted as published, and its tiny run goes end to end on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared import cli, recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
NAMES = recipe.names()
AT_LEAST = {"quickstart", "remote_sensing/cloud_adapter", "remote_sensing/landsat_biome", "language/quickstart_text"}


def test_the_recipes_found_are_the_files_there_are():
    assert len(NAMES) == len(list(FOLDER.rglob("*.y*ml"))) >= 3
    assert set(NAMES) >= AT_LEAST


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_opens_with_what_it_is_how_to_run_it_and_what_to_expect(name):
    comment = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert recipe.summary(FOLDER / f"{name}.yaml").endswith(".")
    for word in (f"omniadapt run {name}", "Cost:", "Expected:"):
        assert any(word in line for line in comment), f"{name}: no {word!r} in its header"
    assert "TODO" not in "\n".join(comment)


def before(name: str) -> list[list[str]]:
    """The commands its header asks for first; in their tiny form they make their own data."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    commands = [line.partition("omniadapt ")[2].split() for line in lines if line.startswith("#   Before:")]
    return [[word for word in command if not word.startswith("data.")] for command in commands]


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_recipe_is_valid_and_can_be_counted(name, capsys):
    assert cli.main(["count", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_its_tiny_run_goes_end_to_end(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in before(name):
        assert cli.main([*line, "--tiny", "trainer.device=cpu", "--debug"]) == 0
    capsys.readouterr()
    assert cli.main(["run", name, "--tiny", "trainer.device=cpu", "--debug"]) == 0
    (folder,) = (tmp_path / "runs" / name).iterdir()
    out = capsys.readouterr().out
    assert f"page: {folder.relative_to(tmp_path)}/report.html" in out
    found = json.loads((folder / "metrics.json").read_text())
    assert found["steps"] > 0
    assert all(value is None or value == value for value in found["test"].values())
    assert (folder / "adapter.safetensors").stat().st_size == found["file_bytes"] > 0
    assert cli.main(["inspect", str(folder / "adapter.safetensors")]) == 0

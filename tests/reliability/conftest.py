"""One trained run for all tests of this folder, and a world of good files for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.world import World


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The directory of a finished run of the world's recipe."""
    world = World(tmp_path_factory.mktemp("trained"))
    assert world.main("run {recipe} --output {run}") == 0
    return world.run


@pytest.fixture
def world(tmp_path, trained, monkeypatch) -> World:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, trained)
    text = (world.run / "recipe.yaml").read_text(encoding="utf-8")
    (world.run / "recipe.yaml").write_text(text.replace(str(trained.parent), str(tmp_path)), encoding="utf-8")
    return world

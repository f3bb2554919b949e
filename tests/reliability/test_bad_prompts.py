"""Bad input to Segment Anything: one clear line, the right exit status, and everything as it was (``bad_prompts``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modalities.images.data import read_image
from tests.reliability.bad_prompts import PROMPTS
from tests.reliability.test_bad_input import refused
from tests.reliability.world import World

SAM = """
task: {{type: PromptedSegmentation, clicks: 0, objects: 1, measured: 1, prompts: [box]}}
data: {{type: FolderScenes, images: {images}, masks: {masks}, classes: [clear, shadow, cloud], batch_size: 4}}
backbone: {{type: SAM, size: tiny, weights: random}}
method: {{type: LoRA, rank: 2}}
trainer: {{steps: 1, device: cpu}}
"""
SHADOW = """
task: {type: ShadowSegmentation}
data: {type: GeneratedShadows, count: 3, side: 32, size: 48, batch_size: 1}
backbone: {type: SAM, size: tiny, weights: random}
method: {type: AdapterShadow, grid: 4, subsample: 2, detector: test_efficientnet, detector_weights: random}
trainer: {steps: 1, device: cpu}
"""


@pytest.fixture(scope="module")
def asked_runs(tmp_path_factory) -> tuple[Path, Path]:
    """The directories of a run that answers prompts about the world's scenes, and of one that finds shadows."""
    world = World(tmp_path_factory.mktemp("asked"))
    world.recipe.write_text(SAM.format(images=world.images, masks=world.masks))
    assert world.main("run {recipe} --output {run}") == 0
    world.recipe.write_text(SHADOW)
    assert world.main("run {recipe} --output {out}") == 0
    return world.run, world.out


@pytest.fixture
def asked_world(tmp_path, asked_runs, monkeypatch) -> World:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, asked_runs[0])
    world.shadow, world.photograph = asked_runs[1], tmp_path / "photograph.png"  # type: ignore[attr-defined]
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(world.photograph)  # type: ignore[attr-defined]
    return world


@pytest.mark.parametrize("case", PROMPTS.values(), ids=PROMPTS)
def test_bad_prompts_are_one_line_and_change_nothing(asked_world, case, capsys):
    refused(asked_world, case, capsys)


def test_good_ones_are_answered(asked_world, capsys):
    (asked_world.root / "asked.json").write_text('[{"points": [[44, 40]]}, {"box": [0, 0, 44, 40]}]')
    assert asked_world.main("predict {run} {scene} -o {out}.tif --prompts {root}/asked.json") == 0
    assert "2 objects asked for by" in capsys.readouterr().out
    assert asked_world.main("predict {run} {images} -o {out} --generator points_per_side=2") == 0
    assert len(list(asked_world.out.iterdir())) == 6
    assert asked_world.main("predict {shadow} {photograph} -o {out}.png") == 0
    assert read_image(f"{asked_world.out}.png", bands=1).shape == (1, 20, 30)


def test_the_table_is_long():
    assert len(PROMPTS) >= 40

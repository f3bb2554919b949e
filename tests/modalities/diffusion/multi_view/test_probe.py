"""Whether sampled views agree: what is measured and compared, and from a base to the table as the recipes say."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from modalities.diffusion.multi_view import probe
from modalities.diffusion.multi_view.data import GeneratedSolids
from shared import cli, run
from shared.errors import RequestError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers


def test_true_views_agree_and_views_of_several_objects_do_not():
    data = GeneratedSolids(size=12, maps="geometry", plain=True, checks=4)
    sample = data.sample("test", 0, None)
    true = (sample["image"] + 1) / 2
    agreement, contrast = probe.measured(true, sample)
    assert agreement == pytest.approx(0, abs=1e-6)
    assert contrast == pytest.approx(float((true - 0.5).abs().mean(1)[sample["alpha"] > 0.5].mean()))
    mixed = true.clone()
    mixed[::2] = 1 - mixed[::2]
    assert probe.measured(mixed, sample)[0] > 0.2
    assert probe.measured(torch.full_like(true, 0.5), sample) == (0.0, 0.0)  # pale views agree: contrast tells
    with pytest.raises(RequestError, match="test/0: no point that two views see"):
        probe.measured(true, sample | {"alpha": torch.zeros_like(sample["alpha"])})


def test_disagreement_grows_with_the_views_of_another_colour():
    data = GeneratedSolids(size=12, maps="geometry", plain=True, checks=4)
    for index in range(3):
        sample = data.sample("test", index, None)
        true, found = (sample["image"] + 1) / 2, []
        for views in ([], [1], [1, 3]):  # none, right, right and left
            images = true.clone()
            for view in views:
                images[view] = torch.where(sample["alpha"][view] > 0.5, 1 - true[view], true[view])
            found.append(probe.measured(images, sample)[0])
        assert found[0] == pytest.approx(0, abs=1e-6)
        assert 0.05 < found[1] < found[2]


def test_a_sheet_shows_every_row_of_every_object():
    views = [{"true views": torch.full((6, 3, 2, 2), 0.25), "base": torch.zeros(6, 3, 2, 2)} for _ in range(4)]
    found = probe.sheet(views, columns=3, zoom=2)
    assert found.shape == (3, 2 * 2 * (2 * 2 + 2), 2 * 3 * (6 * 2 + 2))
    assert found[0, 2, 2] == 0.25
    assert found[0, 6, 2] == 0
    assert found[0, 0, 0] == found[0, -4, -4] == 1


def test_differences_are_of_the_same_object():
    base = torch.tensor([[0.1, 0.3], [0.3, 0.3], [0.5, 0.3]])
    rows = probe.table({"base": base, "one": base - torch.tensor([0.05, 0.0])})
    assert rows[0] == ["base", "0.300 ± 0.115", "", "0.050 ± 0.000", "0.300 ± 0.000", "1.000 ± 0.385", "0.167 ± 0.000"]
    assert rows[1] == ["one", "0.250 ± 0.115", "-0.050 ± 0.000", "", "0.300 ± 0.000", "0.833 ± 0.385", ""]


def do(*words: str) -> None:
    assert cli.main([*words, "--debug"]) == 0


def test_from_a_base_of_ones_own_to_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    do("run", "diffusion/solids", "--tiny", "--output", "base")
    do("export", "base", "-o", "base_unet", "--as", "diffusers")
    views = ("run", "diffusion/mv_solids", "--tiny", "backbone.pretrained=base_unet")
    do(*views, "--output", "views")
    do(*views, "task.apart=true", "--output", "apart")
    capsys.readouterr()
    assert probe.main(["views", "apart", "--objects", "2", "--steps", "2", "--sheet", "sheet.png"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["disagreement", "less", "base"]
    assert [row.partition("  ")[0] for row in rows] == ["true views", "base", "views", "apart"]
    assert [row.count("±") for row in rows] == [6, 5, 6, 4]
    with Image.open("sheet.png") as picture:
        assert picture.size == (3 * 4 * (6 * 12 + 2), 4 * (4 * 12 + 2))
    assert probe.main(["base", "--objects", "2"]) == 2
    assert "base: trains Denoising, no MultiViewDenoising" in capsys.readouterr().err
    first, other = (run.load("views").task for _ in range(2))
    probe._check("views", other, first)
    with torch.no_grad():
        other.unet.unet.conv_in.bias.add_(1)
    with pytest.raises(RequestError, match="other: another base than that of the first run"):
        probe._check("other", other, first)

"""Change detection: metrics against torchmetrics, refusals, what the exchange is for, and a run from pairs to a map."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio import Affine
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_f1_score,
    binary_jaccard_index,
    binary_precision,
    binary_recall,
)

from modalities.remote_sensing.change_detection import ChangeDetection, measure_change
from modalities.remote_sensing.data import GeneratedPairs
from modalities.remote_sensing.data.generated_pairs import generate
from modalities.remote_sensing.heads import LightDecoder, SSBiFPNDecoder, change
from modalities.remote_sensing.segmentation import Segmentation
from shared import cli, recipe, run
from shared.adapted import Adapted, adapt
from shared.backbone import Features
from shared.errors import RequestError
from shared.methods import Probe
from shared.rasters import read_image, write_raster
from shared.sites import describe
from shared.training import Optimiser

DATA = SimpleNamespace(classes=("unchanged", "change"), bands=3, ignore_index=255)


class Blocks(nn.Module):
    """A frozen backbone: the mean colour of every block of 16 pixels, mixed into four maps."""

    channels = (6,) * 4

    def __init__(self):
        super().__init__()
        self.mix = nn.ModuleList(nn.Conv2d(3, 6, 1) for _ in range(4))

    def forward(self, image: Tensor) -> Features:
        means = nn.functional.avg_pool2d(image, 16)
        maps = tuple(mix(means) for mix in self.mix)
        return Features(maps, maps[-1].mean((2, 3)))


def model(head: Any = None) -> Adapted:
    torch.manual_seed(0)
    backbone = Blocks()
    head = head or SSBiFPNDecoder(backbone.channels, 2, width=16)
    return adapt(backbone, Probe(), head=head, sites=describe(backbone))


def task(head: Any = None) -> ChangeDetection:
    return ChangeDetection(model(head), DATA, Optimiser())


def batch(count: int = 2, size: int = 32) -> dict[str, Any]:
    mask = torch.randint(0, 2, (count, size, size))
    mask[0, :3] = 255
    return {"image": torch.randn(count, 6, size, size), "mask": mask, "name": [f"pair{i}" for i in range(count)]}


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_measures_are_those_of_torchmetrics() -> None:
    made, one = task(), batch()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # so that about half of the pixels are said to have changed
        made.model.train()(torch.cat(one["image"].chunk(2, 1)))
        made.eval()
        before, after = made(one["image"]).chunk(2)
        made.head.head[1].bias[0] += ((before + after) / 2).diff(dim=1).median()
    made.evaluate(one)
    found = made.results()
    assert 0.1 < found["recall"] < 0.9
    truth, said = one["mask"], made.predict(one["image"])
    for name, metric in (
        ("iou", binary_jaccard_index), ("f1", binary_f1_score), ("precision", binary_precision),
        ("recall", binary_recall), ("oa", binary_accuracy),
    ):  # fmt: skip
        assert found[name] == pytest.approx(float(metric(said, truth, ignore_index=255)), abs=1e-6), name
    assert found["support/change"] == int((truth == 1).sum())
    assert found["support/unchanged"] == int((truth == 0).sum())
    made.evaluate(one)
    assert made.results() == found


def test_what_is_undefined_is_none_and_splits_are_pooled_by_pixels() -> None:
    nothing = measure_change(torch.tensor([[9, 0], [0, 0]]), DATA.classes)
    assert (nothing["iou"], nothing["f1"], nothing["precision"], nothing["recall"]) == (None,) * 4
    assert nothing["oa"] == 1
    counts = torch.tensor([[[80, 10], [10, 0]], [[0, 5], [0, 5]]])
    splits = [{"loss": loss, **measure_change(c, DATA.classes)} for loss, c in zip((1.0, 2.0), counts, strict=True)]
    assert ChangeDetection.pooled(splits) == {"loss": 1.5, **measure_change(counts.sum(0), DATA.classes)}
    assert ChangeDetection.pooled(splits)["iou"] == pytest.approx(5 / 30)


def test_results_do_not_depend_on_the_order_of_the_dates() -> None:
    made, one = task().eval(), batch()
    swapped = {**one, "image": one["image"].roll(3, 1)}
    torch.testing.assert_close(made.scores(one["image"]), made.scores(swapped["image"]))
    found = []
    for each in (one, swapped):
        made.evaluate(each)
        found.append(made.results())
    assert found[0]["confusion"] == found[1]["confusion"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"])


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_head_that_reads_one_image_is_refused_and_one_of_two_by_segmentation() -> None:
    with pytest.raises(RequestError, match="head LightDecoder: ChangeDetection needs one that reads two dates"):
        task(LightDecoder(Blocks.channels, 2, width=8))
    with pytest.raises(RequestError, match="head SSBiFPNDecoder: Segmentation needs one that reads one image"):
        Segmentation(model(), DATA, Optimiser())
    three = SimpleNamespace(classes=("a", "b", "c"), bands=3, ignore_index=255)
    with pytest.raises(RequestError, match="change detection has two classes"):
        ChangeDetection(model(SSBiFPNDecoder(Blocks.channels, 3, width=8)), three, Optimiser())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b.update(image=b["image"][:, :3]), "do not fit 6 bands"),
        (lambda b: b.update(mask=b["mask"][:, :16]), r"masks \(2, 16, 32\) do not fit"),
        (lambda b: b["image"].__setitem__((1, 4, 3, 3), float("nan")), "samples pair0, pair1: an image holds NaN"),
        (lambda b: b["mask"].__setitem__((1, 3, 3), 2), "mask value 2"),
    ],
)
def test_batches_that_would_train_wrongly_are_refused(spoil, message) -> None:
    one = batch()
    spoil(one)
    with pytest.raises(RequestError, match=message):
        task().on_before_batch_transfer(one, 0)


# -- what the exchange is for ------------------------------------------------------------------------------------------


def squares(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images (count, 6, 64, 64) of two dates, masks, and the kinds (count, 4, 4) of their blocks: 0 empty, 1 a square
    at both dates, 2 one of the first, 3 one of the second. Of squares at a date a third has changed, and so of the
    places without one."""
    kinds = torch.tensor([0, 0, 1, 1, 2, 3])[torch.randint(6, (count, 4, 4), generator=generator)]
    dates = [(kinds == 1) | (kinds == only) for only in (2, 3)]
    up = [date.float().repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None] for date in dates]
    image = torch.cat([2 * date.repeat(1, 3, 1, 1) - 1 for date in up], 1)
    image = image + 0.2 * torch.randn(image.shape, generator=generator)
    mask = (kinds > 1).long().repeat_interleave(16, 1).repeat_interleave(16, 2)
    return image, mask, kinds


def area_under_curve(steps: int = 50) -> float:
    """Of change against what stands at both dates, after a short training on squares."""
    made, generator = task(), torch.Generator().manual_seed(1)
    made.model.train()
    optimiser = torch.optim.Adam(made.head.parameters(), lr=2e-2)
    for _ in range(steps):
        image, mask, _ = squares(16, generator)
        loss = made.head.loss(made(image), mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    image, mask, kinds = squares(48, generator)
    share = nn.functional.avg_pool2d(made.scores(image)[:, 1:], 16)[:, 0]
    there = kinds > 0
    return float(binary_auroc(share[there], (kinds[there] > 1).long()))


def test_without_the_exchange_change_is_told_no_better_than_by_chance(monkeypatch) -> None:
    """Each branch then sees one date alone, where a square that stays and one that goes look the same."""
    monkeypatch.setattr(change, "doubled", lambda x: x)  # the blocks' own grid is enough here
    assert area_under_curve() > 0.9
    monkeypatch.setattr(change, "exchange", lambda before, after: (before, after))
    assert area_under_curve() < 0.6


# -- from pairs to a map -----------------------------------------------------------------------------------------------

SMALL = """
task: {type: ChangeDetection}
data: {type: GeneratedPairs, count: 6, size: 64, tile: 32, batch_size: 4}
backbone:
  type: TimmViT
  name: vit_small_patch16_dinov3
  weights: random
  image_size: 32
  depths: [0, 1, 2, 3]
  model_args: {depth: 4, embed_dim: 24, num_heads: 2}
method: {type: PeftCD, width: 4}
head: {type: SSBiFPNDecoder, width: 8}
optimiser: {learning_rate: 1.0e-3}
trainer: {steps: 4, device: cpu}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """(run directory, folder of two pairs of 80 pixels)"""
    folder = tmp_path_factory.mktemp("change")
    (folder / "small.yaml").write_text(SMALL)
    run.run(recipe.load(str(folder / "small.yaml")), folder / "run")
    GeneratedPairs(count=2, size=80, seed=9, validation=0.0, test=0.5).write(folder / "pairs")
    return folder / "run", folder / "pairs"


def predict(folder: Path, *words: Any) -> int:
    return cli.main(["predict", str(folder), *map(str, words)])


def test_a_run_tests_what_its_file_predicts(trained) -> None:
    folder, _ = trained
    found, data = run.load(folder), recipe.load(str(folder / "recipe.yaml")).build("data")
    with torch.no_grad():
        for one in data.test():
            found.task.evaluate(one)
    assert found.task.results()["confusion"] == json.loads((folder / "metrics.json").read_text())["test"]["confusion"]
    assert "before, true colour" in (folder / "report.html").read_text()


def test_two_rasters_become_a_georeferenced_map_of_change(trained, tmp_path, capsys) -> None:
    folder, pairs = trained
    before, after = pairs / "A" / "00000.tif", pairs / "B" / "00000.tif"
    options = ("--as", "probabilities", "--window", "128")
    assert predict(folder, before, after, "-o", tmp_path / "p.tif", *options) == 0
    found, made = run.load(folder), generate(9, 0, 80)
    scale = found.described["normalisation"]
    mean, std = (np.array(2 * scale[key], np.float32)[:, None, None] for key in ("mean", "std"))
    image = (np.concatenate([made.before, made.after]) - mean) / std
    image = np.pad(image, ((0, 0), (16, 32), (16, 32)), mode="reflect")  # one window, an eighth beyond the edges
    expected = found.task.scores(torch.from_numpy(image)[None])[0, :, 16:96, 16:96].numpy()
    with rasterio.open(tmp_path / "p.tif") as result, rasterio.open(before) as source:
        np.testing.assert_allclose(result.read(), expected, atol=1e-5)
        assert (result.crs, result.transform) == (source.crs, source.transform)
        assert result.descriptions == ("unchanged", "change")
    assert predict(folder, after, before, "-o", tmp_path / "q.tif", *options) == 0  # the order says nothing
    with rasterio.open(tmp_path / "p.tif") as one, rasterio.open(tmp_path / "q.tif") as other:
        np.testing.assert_allclose(one.read(), other.read(), atol=1e-5)
    capsys.readouterr()
    assert predict(folder, before, after, "-o", tmp_path / "p.tif", *options) == 0  # nothing to be done again
    assert "done before" in capsys.readouterr().out
    assert predict(folder, before, pairs / "B" / "00001.tif", "-o", tmp_path / "p.tif", *options) == 2


def test_folders_are_mapped_by_name_and_invalid_pixels_of_either_date_stay_so(trained, tmp_path, capsys) -> None:
    folder, pairs = trained
    for part in ("A", "B"):
        (tmp_path / part).mkdir()
        for name in ("00000.tif", "00001.tif"):
            raster = read_image(pairs / part / name)
            raster.image[:, 10 if part == "A" else 20] = np.nan
            write_raster(tmp_path / part / name, raster.image, georeference=raster.georeference)
    assert predict(folder, tmp_path / "A", tmp_path / "B", "-o", tmp_path / "maps", "--bands", "1,2,3") == 0
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["00000.tif", "00001.tif"]
    with rasterio.open(tmp_path / "maps" / "00001.tif") as dataset:
        classes = dataset.read(1)
    assert (classes[[10, 20]] == 255).all()
    assert (classes == 255).sum() == 160
    (tmp_path / "B" / "00001.tif").unlink()
    capsys.readouterr()
    assert predict(folder, tmp_path / "A", tmp_path / "B", "-o", tmp_path / "more") == 2
    assert "A/00001.tif has no second date" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_dates_on_other_grids_are_refused_or_brought_together(trained, tmp_path, capsys) -> None:
    folder, pairs = trained
    before, after = pairs / "A" / "00000.tif", read_image(pairs / "B" / "00000.tif")
    assert after.georeference is not None
    a, b, c, d, e, f = after.georeference.transform[:6]
    finer = replace(after.georeference, transform=Affine(a / 2, b, c, d, e / 2, f))
    image = after.image.repeat(2, 1).repeat(2, 2)[:, :, :120]  # and it ends after 60 of 80 columns
    write_raster(tmp_path / "after.tif", image, georeference=finer, band_names=("red", "green", "blue"))
    for words, message in (
        ([before, tmp_path / "after.tif"], "after.tif: 160 x 120 pixels"),
        ([before], "1 inputs: give two files or two folders, before and after"),
        ([before, pairs / "B"], "2 inputs: give two files or two folders"),
    ):
        assert predict(folder, *words, "-o", tmp_path / "map.tif") == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert message in err
        assert not (tmp_path / "map.tif").exists()
    assert predict(folder, before, tmp_path / "after.tif", "-o", tmp_path / "after.tif", "--reproject") == 2
    assert "would overwrite its own input" in capsys.readouterr().err
    assert predict(folder, before, tmp_path / "after.tif", "-o", tmp_path / "map.tif", "--reproject") == 0
    with rasterio.open(tmp_path / "map.tif") as dataset:
        classes = dataset.read(1)
    assert classes.shape == (80, 80)
    assert (classes[:, :59] != 255).all()
    assert (classes[:, 61:] == 255).all()

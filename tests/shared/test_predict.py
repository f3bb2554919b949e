"""Prediction with a finished run: the model that was trained, from its directory alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from modalities.remote_sensing.data import GeneratedScenes
from shared import cli, recipe, run
from shared.errors import RequestError
from shared.rasters import quiet, read_image
from tests.shared.test_run import SMALL

BANDS = ("red", "green", "blue", "nir")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run directory, folder of three scenes of 50 pixels)"""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "small.yaml").write_text(SMALL)
    run.run(recipe.load(str(folder / "small.yaml"), ["trainer.epochs=1"]), folder / "run")
    GeneratedScenes(count=3, size=50, bands=BANDS, seed=9).write(folder / "scenes")
    return folder / "run", folder / "scenes" / "images"


def test_a_loaded_run_is_the_model_that_was_tested(trained):
    """Its score on the test split is the one of the run."""
    folder, _ = trained
    found = run.load(folder)
    data = recipe.load(str(folder / "recipe.yaml")).build("data")
    with torch.no_grad():
        for batch in data.test():
            found.task.evaluate(batch)
    measured = json.loads((folder / "metrics.json").read_text())["test"]
    again = found.task.results()
    assert again["confusion"] == measured["confusion"]
    assert again["loss"] == pytest.approx(measured["loss"], rel=1e-5)
    assert not found.task.training
    assert found.described["window"] == 32
    assert found.described["file_bands"] == list(BANDS)


def test_the_command_maps_a_folder_and_a_file(trained, tmp_path, capsys):
    folder, scenes = trained
    assert cli.main(["predict", str(folder), str(scenes), "-o", str(tmp_path / "maps")]) == 0
    out, err = capsys.readouterr()
    assert (len(out.splitlines()), err) == (3, "")
    names = sorted(path.name for path in scenes.iterdir())
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == names

    source = scenes / names[0]
    words = ["-o", str(tmp_path / "p.tif"), "--as", "probabilities", "--window", "80", "--bands", "1,2,3,4"]
    assert cli.main(["predict", str(folder), str(source), *words]) == 0
    model = run.load(folder)
    image, valid, _ = read_image(source)
    mean, std = (np.array(model.described["normalisation"][key], np.float32)[:, None, None] for key in ("mean", "std"))
    image = np.where(valid, (image - mean) / std, 0).astype(np.float32)
    image = np.pad(image, ((0, 0), (10, 20), (10, 20)), mode="reflect")  # one window, an eighth beyond the edges
    expected = model.task.scores(torch.from_numpy(image)[None])[0, :, 10:60, 10:60].numpy()
    with quiet() as rasterio, rasterio.open(tmp_path / "p.tif") as dataset:
        np.testing.assert_allclose(dataset.read()[:, valid], expected[:, valid], atol=1e-5)
        assert dataset.descriptions == tuple(model.described["classes"])

    words = [str(tmp_path / "c.geojson"), "--window", "32", "--overlap", "16", "--overwrite"]
    assert cli.main(["predict", str(folder), str(source), "-o", *words]) == 0
    features = json.loads((tmp_path / "c.geojson").read_text())["features"]
    assert sum(feature["properties"]["pixels"] for feature in features) == valid.sum()


def test_a_failure_among_several_is_status_1_and_a_wrong_request_2(trained, tmp_path, capsys):
    folder, scenes = trained
    (tmp_path / "bad.tif").write_bytes(b"")
    good = sorted(scenes.iterdir())[0]
    status = cli.main(["predict", str(folder), str(tmp_path / "bad.tif"), str(good), "-o", str(tmp_path / "maps")])
    out, err = capsys.readouterr()
    assert (status, len(out.splitlines())) == (1, 1)
    assert err.splitlines()[-1] == f"omniadapt: 1 of 2 rasters failed: {tmp_path / 'bad.tif'}"
    for words, message in (
        ([str(tmp_path / "bad.tif"), "-o", str(tmp_path / "c.tif")], "bad.tif: empty (0 bytes)"),
        ([str(good), "-o", str(tmp_path / "c.tif"), "--window", "40"], "no multiple of its patch of 16"),
        ([str(good)], "the following arguments are required: -o/--output"),
        ([str(good), "-o", str(good)], "would overwrite its own input"),
    ):
        assert cli.main(["predict", str(folder), *words]) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert message in err
    assert not (tmp_path / "c.tif").exists()


def test_what_is_no_finished_run_is_refused(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(RequestError, match=r"it is no run directory: it holds no recipe.yaml"):
        run.load(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes((folder / "recipe.yaml").read_bytes())
    with pytest.raises(RequestError, match=r"the run has not finished: it holds no adapter.safetensors"):
        run.load(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes((folder / "adapter.safetensors").read_bytes()[:-9])
    with pytest.raises(RequestError, match="cut short"):
        run.load(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes((folder / "adapter.safetensors").read_bytes())
    text = (folder / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(
        text.replace("\nseed: 0", "\nseed: 1").replace("weights: random", "weights: random\n  seed: 7")
    )
    with pytest.raises(RequestError, match="made for backbone .* with fingerprint"):
        run.load(tmp_path)

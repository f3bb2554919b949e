"""Maps: equal to the model on the whole raster at once, whatever the windows, and complete as georeferenced files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rasterio import Affine
from rasterio.crs import CRS

from shared.errors import RequestError, WorkError
from shared.mapping import map_raster, raster
from shared.rasters import Georeference, read_image
from tests.shared.mapping.conftest import CLASSES, REACH, opened


def whole(scores, feed, source) -> tuple[np.ndarray, np.ndarray]:
    """The scores (classes, H, W) of the raster at once, continued by its mirror image, and what is valid (H, W)."""
    image, valid, _ = read_image(source, bands=feed.bands)
    image = np.pad(feed.normalisation.apply(image, valid), ((0, 0), (REACH, REACH), (REACH, REACH)), mode="reflect")
    return scores(torch.from_numpy(image)[None])[0, :, REACH:-REACH, REACH:-REACH].numpy(), valid


@pytest.mark.parametrize(
    ("height", "width", "window", "overlap"),
    [
        (70, 95, 32, 16), (70, 95, 50, 16), (70, 95, 64, 30), (70, 95, 200, 100), (33, 32, 32, 16), (64, 70, 64, 16),
        (95, 40, 40, 20), (57, 25, 32, 16), (1, 1, 32, 16), (1, 50, 40, 17), (50, 1, 32, 16), (7, 9, 100, 40),
        (7, 9, 32, 16), (3, 80, 64, 16),
    ],
)  # fmt: skip
def test_a_model_that_sees_no_further_than_a_quarter_overlap_gives_what_it_gives_on_the_whole(
    tmp_path, made, scores, feed, height, width, window, overlap
):
    assert overlap // 4 >= REACH
    source = made(height, width, hole=height > 30)
    expected, valid = whole(scores, feed, source)
    options = {"window": window, "overlap": overlap, "batch": 3}
    map_raster(scores, source, tmp_path / "p.tif", feed, output="probabilities", **options)
    shares = opened(tmp_path / "p.tif")[0]
    assert np.abs(shares - expected)[:, valid].max() < 1e-6
    assert np.isnan(shares[:, ~valid]).all()
    found = map_raster(scores, source, tmp_path / "c.tif", feed, **options)
    classes = opened(tmp_path / "c.tif")[0][0]
    best = np.sort(expected, 0)
    sure = valid & (best[-1] - best[-2] > 1e-5)
    np.testing.assert_array_equal(classes[sure], expected.argmax(0)[sure])
    np.testing.assert_array_equal(classes == 255, ~valid)
    assert found.pixels == {name: int((classes == index).sum()) for index, name in enumerate(CLASSES)}
    assert found.nodata == (~valid).sum()


def test_with_a_further_reach_windows_differ_only_near_their_seams(tmp_path, made, scores, feed):
    source = made(60, 90, hole=False)
    map_raster(scores, source, tmp_path / "p.tif", feed, output="probabilities", window=30, overlap=0)
    away = np.abs(opened(tmp_path / "p.tif")[0] - whole(scores, feed, source)[0]).max(0)
    assert away[14:16, 14:16].max() < 1e-6
    assert away[:, 28:32].max() > 0.05


def test_panels_and_batches_change_nothing(tmp_path, made, scores, feed, monkeypatch):
    source = made(60, 1300)
    map_raster(scores, source, tmp_path / "one.tif", feed, output="probabilities")
    monkeypatch.setattr(raster, "BUFFER", 4 * 3 * 32 * 1024)
    map_raster(scores, source, tmp_path / "two.tif", feed, output="probabilities", batch=5)
    one, two = opened(tmp_path / "one.tif")[0], opened(tmp_path / "two.tif")[0]
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_windows_without_a_valid_pixel_are_not_run(tmp_path, made, scores, feed):
    seen = []

    def watched(image):
        seen.append(len(image))
        return scores(image)

    source = made(128, 128)  # a hole of 32 rows by 42 columns
    map_raster(watched, source, tmp_path / "c.tif", feed, window=16, overlap=0)
    assert sum(seen) == 64 - 2 * 2
    assert max(seen) == 8


@pytest.mark.parametrize(
    "transform",
    [Affine(30, 0, 5e5, 0, -30, 5e6), Affine(30, 0, 5e5, 0, 30, 4e6), Affine(20, 8, 5e5, 8, -20, 5e6)],
    ids=["north up", "south up", "rotated"],
)
def test_the_place_on_earth_is_kept_as_it_is(tmp_path, made, scores, feed, transform):
    source = made(40, 50, place=Georeference(CRS.from_epsg(32719), transform))
    map_raster(scores, source, tmp_path / "c.tif", feed)
    pixels, profile, *_ = opened(tmp_path / "c.tif")
    assert profile["crs"] == CRS.from_epsg(32719)
    assert profile["transform"] == transform
    plain = made(40, 50, name="plain.tif", place=None)
    map_raster(scores, plain, tmp_path / "plain_c.tif", feed)
    again, profile, *_ = opened(tmp_path / "plain_c.tif")
    assert profile["crs"] is None
    np.testing.assert_array_equal(pixels, again)


def test_a_class_map_is_complete(tmp_path, made, scores, feed):
    map_raster(scores, made(300, 530), tmp_path / "c.tif", feed, window=96)
    pixels, profile, tags, colours, overviews, names = opened(tmp_path / "c.tif")
    wanted = {"driver": "GTiff", "dtype": "uint8", "count": 1, "nodata": 255, "tiled": True, "compress": "deflate"}
    assert wanted.items() <= profile.items()
    assert {tags[f"CLASS_{index}"]: index for index in range(3)} == {"clear": 0, "shadow": 1, "cloud": 2}
    assert len({colours[index][:3] for index in range(3)}) == 3
    assert (overviews, names) == ([2, 4], ("class",))
    with raster.quiet() as rasterio, rasterio.open(tmp_path / "c.tif", OVERVIEW_LEVEL=0) as half:
        assert half.shape == (150, 265)
        assert set(np.unique(half.read())) <= set(np.unique(pixels))  # nearest: no value in between


def test_probabilities_are_complete(tmp_path, made, scores, feed):
    map_raster(
        lambda image: 5 * scores(image), made(300, 530), tmp_path / "p.tif", feed, output="probabilities", window=96
    )
    pixels, profile, _, _, overviews, names = opened(tmp_path / "p.tif")
    assert (profile["dtype"], profile["count"], names, overviews) == ("float32", 3, CLASSES, [2, 4])
    assert np.isnan(profile["nodata"])
    np.testing.assert_allclose(pixels[:, 200:].sum(0), 1, atol=1e-6)
    with raster.quiet() as rasterio, rasterio.open(tmp_path / "p.tif", OVERVIEW_LEVEL=0) as half:
        means = pixels[:, 200:, :530].reshape(3, 50, 2, 265, 2).mean((2, 4))
        np.testing.assert_allclose(half.read()[:, 100:], means, atol=1e-6)


def test_bands_go_by_name_where_both_name_them(tmp_path, made, scores, feed):
    from dataclasses import replace

    named = replace(feed, file_bands=("Blue", "Green", "Red"), bands=(3, 2, 1))
    straight = made(40, 40, names=("blue", "green", "red"))
    map_raster(scores, straight, tmp_path / "a.tif", named)
    image, valid, place = read_image(straight)
    image[:, ~valid] = np.nan
    raster_names = ("nir", "red", "blue", "green")
    from shared.rasters import write_raster

    mixed = np.stack([image[0], image[2], image[0], image[1]])
    write_raster(tmp_path / "mixed.tif", mixed, georeference=place, band_names=raster_names)
    map_raster(scores, tmp_path / "mixed.tif", tmp_path / "b.tif", named)
    np.testing.assert_array_equal(opened(tmp_path / "a.tif")[0], opened(tmp_path / "b.tif")[0])
    other = made(40, 40, name="other.tif", names=("B2", "B3", "B4"))
    with pytest.raises(RequestError, match=r"other.tif: no band is called 'Red' but B2, B3, B4"):
        map_raster(scores, other, tmp_path / "c.tif", named)
    map_raster(scores, other, tmp_path / "c.tif", named, bands=[3, 2, 1])
    np.testing.assert_array_equal(opened(tmp_path / "a.tif")[0], opened(tmp_path / "c.tif")[0])


def test_a_finished_target_is_left_alone_and_another_one_refused(tmp_path, made, scores, feed):
    source, target = made(40, 50), tmp_path / "c.tif"
    first = map_raster(scores, source, target, feed, identity={"adapter": "a"})
    before = target.stat().st_mtime_ns
    assert (
        map_raster(scores, source, target, feed, identity={"adapter": "a"})._replace(
            pixels=first.pixels, nodata=first.nodata
        )
        == first
    )
    assert target.stat().st_mtime_ns == before
    for other in ({"identity": {"adapter": "b"}}, {"identity": {"adapter": "a"}, "window": 20}):
        with pytest.raises(RequestError, match=r"c.tif exists and is another prediction or none"):
            map_raster(scores, source, target, feed, **other)
    map_raster(scores, source, target, feed, identity={"adapter": "b"}, overwrite=True)
    assert target.stat().st_mtime_ns > before


def test_what_the_model_gives_is_checked(tmp_path, made, feed):
    source = made(40, 50)
    for scores, words in (
        (lambda image: image * torch.nan, "in.tif: the class scores are not finite"),
        (lambda image: image[:, :2], r"scores of shape \(.*2, 32, 32\) for 3 classes at 32 pixels"),
    ):
        with pytest.raises(WorkError, match=words):
            map_raster(scores, source, tmp_path / "c.tif", feed)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tif"]


def test_progress_is_told(tmp_path, made, scores, feed):
    said = []
    map_raster(
        scores, made(60, 60), tmp_path / "c.geojson", feed, output="polygons", tick=lambda *step: said.append(step)
    )
    stages = [stage for stage, *_ in said]
    assert sorted(set(stages), key=stages.index) == ["predicting", "writing", "tracing"]
    assert said[0] == ("predicting", 0, 16)
    assert ("predicting", 16, 16) in said
    assert all(0 <= done <= total for _, done, total in said)

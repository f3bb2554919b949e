"""Generated scenes: repeatable, each unlike the others, and with the physics that tells their classes apart."""

import sys

import numpy as np
import pytest

from modalities.remote_sensing.data import FolderScenes, GeneratedScenes
from modalities.remote_sensing.data.atmosphere import CLOUD, MARGIN, SHADOW, THIN, Clouds, Sun, look
from modalities.remote_sensing.data.generated import BANDS, CLASSES, generate
from modalities.remote_sensing.data.landscape import BIOMES, Landscape, landscape
from modalities.remote_sensing.data.noise import above, fractal
from shared.errors import RequestError


def test_a_scene_is_the_same_whenever_it_is_made():
    one, again, other, next_seed = generate(3, 5, 64), generate(3, 5, 64), generate(3, 6, 64), generate(4, 5, 64)
    np.testing.assert_array_equal(one.image, again.image)
    np.testing.assert_array_equal(one.mask, again.mask)
    assert (one.name, one.epsg, one.corner) == (again.name, again.epsg, again.corner)
    assert not np.array_equal(one.image, other.image)
    assert not np.array_equal(one.image, next_seed.image)
    np.testing.assert_array_equal(generate(3, 5, 64, ("nir", "red")).image, one.image[[3, 2]])


def test_values_are_those_of_a_satellite():
    made = [generate(0, index, 96) for index in range(16)]
    for scene in made:
        assert scene.image.dtype == np.float32
        assert scene.image.shape == (8, 96, 96)
        assert scene.image[:6, scene.valid].min() > 0
        assert scene.image[:7].max() < 1.5
        assert scene.image[7, scene.valid].min() > 200
        assert scene.image[7].max() < 340
        assert (scene.mask[~scene.valid] == 255).all()
        assert set(np.unique(scene.mask[scene.valid])) <= {0, 1, 2, 3}
    means = np.array([scene.image[:, scene.valid].mean(1) for scene in made])
    assert (means.std(0) / means.mean(0) > [0.1] * 7 + [0.01]).all()  # scenes differ


def test_class_shares_are_those_of_real_scenes():
    count = np.zeros(256)
    for index in range(48):
        count += np.bincount(generate(1, index, 96).mask.ravel(), minlength=256)
    clear, shadow, thin, cloud = count[:4] / count[:4].sum()
    assert 0.35 < clear < 0.7
    assert 0.03 < shadow < 0.15
    assert 0.1 < thin < 0.3
    assert 0.08 < cloud < 0.35
    assert 0 < count[255] / count.sum() < 0.1


def plain(size: int = 96, height: float = 0.0) -> Landscape:
    return Landscape(
        np.full((6, size, size), 0.2, np.float32), np.full((size, size), height, np.float32), np.zeros((size, size))
    )


def one_cloud(depth: float, base: float = 900.0, high: float = 0.0) -> Clouds:
    low = np.zeros((96 + 2 * MARGIN,) * 2, np.float32)
    low[MARGIN + 40 : MARGIN + 56, MARGIN + 40 : MARGIN + 56] = depth
    return Clouds(low, np.full_like(low, high), base, 9000.0)


def centre(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(0)


@pytest.mark.parametrize(("azimuth", "away"), [(90, (0, -1)), (180, (-1, 0)), (135, (-(0.5**0.5), -(0.5**0.5)))])
def test_a_shadow_lies_away_from_the_sun_as_far_as_the_cloud_is_high(azimuth, away):
    sun = Sun(np.radians(45), np.radians(azimuth))
    sky = look(np.random.default_rng(0), plain(), sun, one_cloud(30.0))
    shadow = (sky.mask == SHADOW) | False
    far = centre(shadow) - centre(sky.mask == CLOUD)
    expected = (900 + 0.075 * 900 + 40) / 30  # midway between foot and body, in pixels at 45 degrees
    assert np.dot(far, away) == pytest.approx(expected, abs=3)
    assert abs(np.cross(np.append(far, 0), np.append(away, 0))[2]) < 2
    assert sky.optical[3][shadow].max() < 0.6 * sky.optical[3][sky.mask == 0].min()
    # Skylight is blue, so shadows are.
    assert sky.optical[0][shadow].mean() / sky.optical[0][0, 0] > sky.optical[4][shadow].mean() / sky.optical[4][0, 0]


def test_higher_ground_lies_nearer_to_the_shadow_of_its_cloud():
    sun = Sun(np.radians(45), np.radians(180))
    far = []
    for height in (0.0, 300.0):
        mask = look(np.random.default_rng(0), plain(height=height), sun, one_cloud(30.0, base=900)).mask
        far.append(centre(mask == CLOUD)[0] - centre(mask == SHADOW)[0])
    assert far[0] - far[1] == pytest.approx(300 / 30, abs=1)


def test_clouds_are_bright_and_cold_and_cirrus_shows_in_its_band():
    sun, random = Sun(np.radians(40), np.radians(140)), np.random.default_rng
    thick, thin, cirrus = (
        look(random(0), plain(), sun, clouds) for clouds in (one_cloud(30.0), one_cloud(1.5), one_cloud(0.0, high=1.5))
    )
    middle = (48, 48)
    assert (thick.mask[middle], thin.mask[middle], cirrus.mask[middle]) == (CLOUD, THIN, THIN)
    assert thick.optical[2][middle] > thin.optical[2][middle] > thin.optical[2][0, 0]
    assert thick.thermal[middle] < thin.thermal[middle] < thin.thermal[0, 0]
    assert thick.optical[2][middle] > 0.6
    assert cirrus.cirrus[middle] > 5 * thin.cirrus[middle]
    assert cirrus.thermal[middle] < thin.thermal[middle]


def test_slopes_that_face_the_sun_are_brighter():
    height = np.broadcast_to(np.abs(np.arange(96.0) - 48) * 6, (96, 96)).astype(
        np.float32
    )  # a valley from north to south
    sky = look(
        np.random.default_rng(0),
        plain()._replace(elevation=height),
        Sun(np.radians(50), np.radians(90)),
        one_cloud(0.0),
    )
    west, east = sky.optical[3][:, :40].mean(), sky.optical[3][:, 56:].mean()
    assert west > 1.2 * east  # the western side falls towards the sun in the east


@pytest.mark.parametrize("name", BIOMES)
def test_every_biome_makes_a_landscape(name):
    ground = landscape(np.random.default_rng(1), 64, BIOMES[name])
    assert ground.reflectance.shape == (6, 64, 64)
    assert ground.reflectance.min() > 0
    assert np.isfinite(ground.reflectance).all()
    assert ground.reflectance.std((1, 2)).min() > 0.001
    assert ground.elevation.min() == 0
    assert BIOMES[name].relief[0] <= ground.elevation.max() <= BIOMES[name].relief[1]


def test_fractal_fields_have_the_spectrum_asked_for():
    field = fractal(np.random.default_rng(0), 256, 3.0)
    assert field.std() == pytest.approx(1, abs=1e-4)
    assert field.mean() == pytest.approx(0, abs=1e-4)
    power = np.abs(np.fft.fft2(field)) ** 2
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
    band = (frequency > 0.02) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert slope == pytest.approx(-3, abs=0.1)
    assert (above(field, 0.2) > 0).mean() == pytest.approx(0.2, abs=1e-3)


def test_written_scenes_are_read_back_the_same(tmp_path):
    from rasterio.crs import CRS

    made = GeneratedScenes(count=10, size=48, bands=("red", "green", "nir", "tir1"), seed=2)
    made.write(tmp_path)
    read = FolderScenes(images=tmp_path / "images", masks=tmp_path / "masks", classes=CLASSES, seed=2)
    assert read.band_names == made.band_names
    for one, other in zip(
        (made.train(), made.validation(), made.test()), (read.train(), read.validation(), read.test()), strict=True
    ):
        for a, b in zip(one, other, strict=True):
            assert a["name"] == b["name"]
            assert a["image"].equal(b["image"])
            assert a["mask"].equal(b["mask"])
    from shared.rasters import read_header

    scene = generate(2, 0, 48)
    for part in ("images", "masks"):
        place = read_header(tmp_path / part / f"{scene.name}.tif").georeference
        assert place is not None
        assert place.crs == CRS.from_epsg(scene.epsg)
        assert place.at(0, 0) == scene.corner
        assert place.at(1, 1) == (scene.corner[0] + 30, scene.corner[1] - 30)


def test_generated_scenes_are_what_a_task_is_fed():
    data = GeneratedScenes(count=10, size=64, tile=32, batch_size=4)
    batch = next(iter(data.train()))
    assert batch["image"].shape == (4, 8, 32, 32)
    splits = data.describe()["splits"]
    assert [splits[part]["images"] for part in splits] == [6, 2, 2]
    assert [splits[part]["tiles"] for part in splits] == [24, 8, 8]
    assert data.band_names == BANDS
    assert data.display(batch["image"][0]).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"count": 0}, "count 0 and size 32"),
        ({"size": 8}, "size 8"),
        ({"bands": ["red", "ir"]}, "out of blue, green"),
        ({"bands": ["red", "red"]}, "each once"),
        ({"count": 2}, "no scene is left to train on"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_impossible_requests_are_refused(change, reason):
    with pytest.raises(RequestError, match=reason):
        GeneratedScenes(**{"count": 5, "size": 32, **change})


def test_without_scipy_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(RequestError, match=r"pip install 'omniadapt\[remote-sensing\]'"):
        generate(0, 0, 32)

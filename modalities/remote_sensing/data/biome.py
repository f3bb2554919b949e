"""Landsat-8 Biome: cloud, thin cloud and cloud shadow in eight bands (Foga et al., RSE 2017)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from modalities.remote_sensing.data.folders import FolderScenes, FolderSource
from modalities.remote_sensing.data.splits import deal_scenes, scene_of
from shared.errors import RequestError
from shared.rasters import Labels

# Reflectance at the top of the atmosphere; tir1 in kelvin. The tiles in circulation are described as red, green, blue,
# but store Landsat's own order (bands 2 3 4 5 6 7 9 10): over dark ground the first band is the brightest and the third
# the darkest, as Rayleigh scattering has it for blue and red, and only so is bare soil brown.
BANDS = ("blue", "green", "red", "nir", "swir1", "swir2", "cirrus", "tir1")
CLASSES = ("clear", "cloud shadow", "thin cloud", "cloud")
VALUES, FILL = (128, 64, 192, 255), 0
SCENE = r"(?P<scene>[^/]+)_[^_/]+$"


class LandsatBiome(FolderScenes):
    """Tiles ``root/images/<scene>_<tile>.tif`` and ``root/masks/<scene>_<tile>.tif``, split by Landsat scene.

    root: the folder.  bands: names out of ``BANDS``, in the order wanted.
    fold, folds: scenes are dealt into ``folds`` parts that share out the rarest class (cloud shadow); part ``fold``
        tests, the next one validates, the rest trains. Test scores over all folds cover every scene once.
    validation, test: fractions or names of scenes; given both, they take the place of the folds.
    The other arguments are those of ``FolderScenes``.
    """

    classes = CLASSES

    def __init__(
        self,
        *,
        root: str | Path,
        bands: Sequence[str] = BANDS,
        fold: int = 0,
        folds: int = 5,
        validation: float | Sequence[str] | None = None,
        test: float | Sequence[str] | None = None,
        tile: int | None = None,
        overlap: int = 0,
        normalisation: str | Mapping[str, Sequence[float]] = "measured",
        batch_size: int = 8,
        workers: int = 0,
        seed: int = 0,
        augment: bool = True,
    ):
        if (validation is None) != (test is None):
            raise RequestError("validation and test: give both, or neither to split by fold")
        if validation is None or test is None:
            validation, test = _fold(Path(root), fold, folds)
        super().__init__(
            images=Path(root) / "images",
            masks=Path(root) / "masks",
            classes=CLASSES,
            label_values=VALUES,
            ignore_value=FILL,
            bands=bands,
            band_names=BANDS,
            fill=FILL,
            tile=tile,
            overlap=overlap,
            group=SCENE,
            validation=validation,
            test=test,
            normalisation=normalisation,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            augment=augment,
        )


def _fold(root: Path, fold: int, folds: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Scenes of the validation and of the test part."""
    if not 0 <= fold < folds:
        raise RequestError(f"fold {fold}: use 0 to {folds - 1}, or more folds")
    source = FolderSource(root / "images", root / "masks", Labels(CLASSES, VALUES, FILL), band_names=BANDS)
    pixels: dict[str, np.ndarray] = {}
    for index, name in enumerate(source.names):
        scene = scene_of(name, SCENE)
        count = np.bincount(source.labels(index).ravel(), minlength=256)[: len(CLASSES)]
        pixels[scene] = pixels.get(scene, 0) + count
    parts = deal_scenes({scene: count.tolist() for scene, count in pixels.items()}, folds)
    return parts[(fold + 1) % folds], parts[fold]

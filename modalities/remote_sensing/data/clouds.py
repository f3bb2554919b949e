"""Cloud scenes of several sensors, in the folders they are published in: RGB pictures and class maps, or band files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from modalities.remote_sensing.data.folders import FolderScenes
from shared.errors import RequestError
from shared.rasters import rasters_below

SPLITS = {"train": "train", "validation": "val", "test": "test"}
SCENE = r"^(?:.*?_(?=L[COTEM]\d\d_))?(?P<scene>.+)$"  # the Landsat scene that a patch's name ends with, or all of it
# Of red, green and blue in 0 to 255, as the backbones were pretrained.
RGB: Mapping[str, Sequence[float]] = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}


class _RGBClouds(FolderScenes):
    """``folder/img_dir/{train,val,test}/NAME.png`` in RGB and ``folder/ann_dir/…`` with the number of the class.

    folder: the published one.  tile: pixels of a side (``side`` of the data set if not given).
    validation, test: the folders ``val`` and ``test`` if not given; else fractions of the scenes of all folders, or
        their names, as in ``FolderScenes``.
    label_values, ignore_value: as in ``FolderScenes``, for class maps as colours or other numbers.
    The other arguments are those of ``FolderScenes``.
    """

    bands = 3
    side: ClassVar[int]

    def __init__(
        self,
        *,
        folder: str | Path,
        label_values: Sequence[int | str | Sequence[int | str]] | None = None,
        ignore_value: int | str | Sequence[int | str] | None = None,
        tile: int | None = None,
        overlap: int = 0,
        group: str | None = None,
        validation: float | Sequence[str] | None = None,
        test: float | Sequence[str] | None = None,
        normalisation: str | Mapping[str, Sequence[float]] = RGB,
        batch_size: int = 4,
        workers: int = 0,
        seed: int = 0,
        augment: bool = True,
    ):
        images, masks = _published(Path(folder))
        if (validation is None) != (test is None):
            raise RequestError("validation and test: give both, or neither to split by the folders")
        if validation is None or test is None:
            lacking = [name for name in SPLITS.values() if not (images / name).is_dir()]
            if lacking or group is not None:
                what = f"{images} has no folder {lacking[0]}" if lacking else "group is for a split of one's own"
                raise RequestError(f"{what}; state validation and test as fractions or names of scenes")
            group, validation, test = r"^(?P<scene>train|val|test)/", [SPLITS["validation"]], [SPLITS["test"]]
        super().__init__(
            images=images, masks=masks, classes=self.classes, label_values=label_values, ignore_value=ignore_value,
            band_names=("red", "green", "blue"), tile=tile or self.side, overlap=overlap, group=group,
            validation=validation, test=test, normalisation=normalisation, batch_size=batch_size, workers=workers,
            seed=seed, augment=augment,
        )  # fmt: skip


class CloudSEN12(_RGBClouds):
    """Sentinel-2, L1C or L2A, of CloudSEN12-High (Aybar et al., 2022) as 8-bit RGB of 512 pixels.

    ``folder/img_dir/{train,val,test}/NAME.png`` and ``folder/ann_dir/…``, split by these folders unless validation and
    test are stated. label_values: where class maps are colours or other numbers.
    """

    classes = ("clear", "thick cloud", "thin cloud", "cloud shadow")
    side = 512


class LandsatClouds(_RGBClouds):
    """Landsat-8 Biome (Foga et al., 2017) as 8-bit RGB of 512 pixels, in folders as ``CloudSEN12``.

    Eight bands: ``LandsatBiome``.
    """

    classes = ("clear", "cloud shadow", "thin cloud", "cloud")
    side = 512


class BinaryClouds(_RGBClouds):
    """Cloud or not in 8-bit RGB of 256 pixels: Gaofen-1, Gaofen-2 (GF12MS-WHU) and Google Earth (HRC-WHU).

    Zhu et al., 2024, and Li et al., 2019; folders as of ``CloudSEN12``.
    """

    classes = ("clear sky", "cloud")
    side = 256


class Cloud38(FolderScenes):
    """38-Cloud (Mohajerani et al., 2018): Landsat-8 patches of 384 pixels, a file for each of four bands and the mask.

    folder: ``38-Cloud_training``; the files ``red_NAME``, ``green_NAME``, ``blue_NAME``, ``nir_NAME`` and ``gt_NAME``
        are found wherever they lie below it. Thin clouds are clouds; a mask is cloud from 128 on, as it may be a JPEG.
    bands: out of red, green, blue, nir.  validation, test: fractions or names of Landsat scenes.
    The other arguments are those of ``FolderScenes``.
    """

    classes = ("clear", "cloud")

    def __init__(
        self,
        *,
        folder: str | Path,
        bands: Sequence[str] = ("red", "green", "blue", "nir"),
        tile: int | None = None,
        overlap: int = 0,
        validation: float | Sequence[str] = 0.2,
        test: float | Sequence[str] = 0.2,
        normalisation: str | Mapping[str, Sequence[float]] = "measured",
        batch_size: int = 8,
        workers: int = 0,
        seed: int = 0,
        augment: bool = True,
    ):
        super().__init__(
            images=folder, masks=folder, classes=self.classes, label_values=["0-127", "128-255"], bands=bands,
            band_files={band: f"{band}_*" for band in ("red", "green", "blue", "nir")}, mask_files="gt_*", fill=0,
            tile=tile, overlap=overlap, group=SCENE, validation=validation, test=test,
            normalisation=normalisation, batch_size=batch_size, workers=workers, seed=seed, augment=augment,
        )  # fmt: skip


def _published(folder: Path) -> tuple[Path, Path]:
    """Folders of images and of masks."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    images, masks = folder / "img_dir", folder / "ann_dir"
    if lacking := [each.name for each in (images, masks) if not each.is_dir()]:
        pictures = len(rasters_below(folder))
        raise RequestError(
            f"{folder}: holds no folder {lacking[0]}, so nothing to train on; its {pictures} rasters can be mapped: "
            "omniadapt predict RUN FOLDER -o MAPS"
        )
    return images, masks

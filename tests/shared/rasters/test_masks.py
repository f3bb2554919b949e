"""Masks: numbers, ranges and colours to classes; the values themselves are in ``test_rasters``."""

import numpy as np
import pytest
from PIL import Image

from shared.errors import RequestError
from shared.rasters import Labels, read_mask


def index(labels: Labels, *values: int) -> list[int]:
    return labels.index("m.png", np.array([values]), np.ones((1, len(values)), bool))[0].tolist()


def test_ranges_lists_and_single_values():
    labels = Labels(["clear", "cloud"], ["0-127", [128, "130-255"]], 129)
    assert index(labels, 0, 127, 128, 129, 130, 255) == [0, 0, 1, 255, 1, 1]
    with pytest.raises(
        RequestError, match="values .256. stand for no class; label_values and ignore_value have 256 val"
    ):
        index(labels, 256)
    with pytest.raises(RequestError, match="a value stands for one class only"):
        Labels(["clear", "cloud"], ["0-128", "128-255"])
    for bad in ("128", "9-1", "-3", "#12345", "#12345g", "1-2-3"):
        with pytest.raises(RequestError, match=r"is no value: give a number, a range '128-255' or '#rrggbb'"):
            Labels(["a", "b"], ["#000000" if bad[0] == "#" else 0, bad])


def test_colours_of_rgb_and_palette_and_grey_pictures(tmp_path):
    labels = Labels(["clear", "cloud", "shadow"], ["#000000", ["#ffffff", "#00ff00"], "#dd35df"], "#0000ff")
    rgb = np.zeros((2, 3, 3), np.uint8)
    rgb[0, 1], rgb[0, 2], rgb[1, 0], rgb[1, 1] = 255, (0, 255, 0), (221, 53, 223), (0, 0, 255)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    mask = read_mask(tmp_path / "rgb.png", colours=labels.colours)
    assert labels.index("rgb.png", *mask).tolist() == [[0, 1, 1], [2, 255, 0]]
    palette = Image.fromarray(np.array([[0, 1, 3], [2, 1, 0]], np.uint8), "P")
    palette.putpalette([0, 0, 0, 221, 53, 223, 255, 255, 255, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    mask = read_mask(tmp_path / "palette.png", colours=True)
    assert labels.index("palette.png", *mask).tolist() == [[0, 2, 1], [1, 2, 0]]
    assert read_mask(tmp_path / "palette.png").labels.tolist() == [[0, 1, 3], [2, 1, 0]]
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "grey.png")
    assert labels.index("grey.png", *read_mask(tmp_path / "grey.png", colours=True)).tolist() == [[0, 1]]
    with pytest.raises(RequestError, match=r"colours \[#010203\] stand for no class"):
        index(labels, 0x010203)
    with pytest.raises(RequestError, match="colours, or numbers, not both"):
        Labels(["a", "b"], [0, "#ffffff"])


def test_grey_in_rgb_counts_as_one_band_and_colours_must_be_asked_for(tmp_path, save):
    grey = np.repeat(np.array([[[0, 3], [255, 3]]], np.uint8), 3, 0)
    assert read_mask(save(tmp_path / "grey.png", grey)).labels.tolist() == [[0, 3], [255, 3]]
    grey[2, 0, 0] = 9
    with pytest.raises(
        RequestError, match=r"has 3 that differ; where colours are classes, state them: label_values: \["
    ):
        read_mask(save(tmp_path / "colour.png", grey))
    with pytest.raises(RequestError, match="holds 0 to 300; colours go from 0 to 255"):
        read_mask(save(tmp_path / "deep.tif", np.array([[[0, 300]]], np.uint16)), colours=True)

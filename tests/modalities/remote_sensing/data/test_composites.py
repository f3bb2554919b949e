"""Band combinations: chosen by name, in threes where names say nothing, stretched over valid pixels alone."""

from __future__ import annotations

import numpy as np
import pytest

from modalities.remote_sensing.data.composites import composites, pictures


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ("blue", "green", "red", "nir", "swir1", "swir2", "cirrus", "tir1"),
            {"true colour": (2, 1, 0), "NIR, red, green": (3, 2, 1), "SWIR, NIR, red": (5, 3, 2)},
        ),
        (
            ("coastal", "Blue", "Green", "Red", "nir08", "swir16", "swir22"),
            {"true colour": (3, 2, 1), "NIR, red, green": (4, 3, 2), "SWIR, NIR, red": (6, 4, 3)},
        ),
        (("red", "green", "nir"), {"NIR, red, green": (2, 0, 1)}),
        (("red", "green", "blue"), {"true colour": (0, 1, 2)}),
        (("VV", "VH"), {"VV": (0, 0, 0), "VH": (1, 1, 1)}),
        (("1", "2", "3"), {"1, 2, 3": (0, 1, 2)}),
        (("1", "2", "3", "4"), {"1, 2, 3": (0, 1, 2), "2, 3, 4": (1, 2, 3)}),
        (
            tuple("abcdefghijklm"),
            {"a, b, c": (0, 1, 2), "d, e, f": (3, 4, 5), "g, h, i": (6, 7, 8)},
        ),
    ],
)
def test_combinations(names, expected):
    assert composites(names) == expected


def test_pictures_show_their_bands_stretched_together_over_what_is_valid():
    values = np.random.default_rng(0).uniform(0.1, 0.4, (4, 20, 20))
    values[3] += 1  # near infrared is brighter
    valid = np.ones((20, 20), bool)
    valid[:, :5] = False
    values[:, ~valid] = -9999
    found = pictures(values, valid, ("red", "green", "blue", "nir"))
    assert list(found) == ["true colour", "NIR, red, green"]
    true, infrared = found.values()
    assert true.dtype == np.uint8
    assert not true[:, :5].any()
    assert (true[:, 5:].min(), true[:, 5:].max()) == (0, 255)
    low, high = np.percentile(values[[0, 1, 2]][:, valid], (1, 99))
    expected = np.clip((values[[0, 1, 2], 3, 9] - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(true[3, 9], expected, atol=0.51)
    assert infrared[:, 5:, 0].min() > infrared[:, 5:, 1:].max()
    assert not pictures(values, np.zeros((20, 20), bool), ("red", "green", "blue"))["true colour"].any()

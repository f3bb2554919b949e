"""Normalisation: moments the same as numpy's over all pixels at once, in whatever parts they are read."""

import numpy as np
import pytest
from hypothesis import given as given_by
from hypothesis import strategies as st

from shared.errors import RequestError
from shared.normalisation import Moments, Normalisation, given


@given_by(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.floats(-1e4, 1e4))
def test_moments_add_up(lengths, offset):
    random = np.random.default_rng(0)
    parts = [random.normal(offset, 2, (3, n)).astype(np.float32) for n in lengths]
    everything = np.concatenate(parts, 1).astype(np.float64)
    total = Moments.of(parts[0])
    for part in parts[1:]:
        total += Moments.of(part)
    assert total.count == everything.shape[1]
    if total.count:
        np.testing.assert_allclose(total.mean, everything.mean(1), rtol=1e-9)
        np.testing.assert_allclose(total.squares / total.count, everything.var(1), rtol=1e-6, atol=1e-9)


def test_normalised_pixels_have_mean_0_and_deviation_1_and_invalid_ones_are_0():
    image = np.random.default_rng(0).normal(280, 5, (2, 50, 50)).astype(np.float32)
    valid = np.ones((50, 50), bool)
    valid[:10] = False
    normalisation = Moments.of(image[:, valid]).normalisation(["a", "b"])
    normal = normalisation.apply(image, valid)
    assert normal.dtype == np.float32
    assert (normal[:, ~valid] == 0).all()
    np.testing.assert_allclose(normal[:, valid].mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(normal[:, valid].std(1), 1, atol=1e-4)
    np.testing.assert_allclose(normalisation.undo(normal)[:, valid], image[:, valid], rtol=1e-5)


def test_a_band_that_never_varies_is_named():
    image = np.stack([np.arange(9.0), np.full(9, 4.0)])
    with pytest.raises(RequestError, match="band 'cirrus' is 4 on every training pixel"):
        Moments.of(image).normalisation(["red", "cirrus"])


def test_stated_numbers_are_checked():
    assert given({"mean": [1, 2], "std": [3, 4]}, ["a", "b"]) == Normalisation((1.0, 2.0), (3.0, 4.0))
    for stated, reason in [
        ({"mean": [1], "std": [1, 2]}, "1 means and 2 deviations for 2 bands"),
        ({"mean": [1, 2], "std": [1, 0]}, "deviations finite numbers above 0"),
        ({"mean": [1, np.nan], "std": [1, 1]}, "means are finite"),
        ({"mean": [1, 2]}, "use 'measured' or"),
        ("imagenet", "normalisation 'imagenet': use 'measured'"),
    ]:
        with pytest.raises(RequestError, match=reason):
            given(stated, ["a", "b"])

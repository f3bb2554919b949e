"""The antimeridian and the poles: polygons cut there cover what they covered, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio import Affine
from rasterio.features import rasterize, shapes

from shared.mapping.meridian import area, within


def box(west: float, south: float, east: float, north: float) -> list[tuple[float, float]]:
    return [(west, south), (east, south), (east, north), (west, north), (west, south)]


def test_a_box_in_two():
    assert area(box(0, 0, 2, 3)) == 6
    parts = within([box(179, 10, 183, 20)])
    assert sorted(sorted(set(part[0])) for part in parts) == [
        [(-180, 10), (-180, 20), (-177, 10), (-177, 20)],
        [(179, 10), (179, 20), (180, 10), (180, 20)],
    ]
    assert sorted(area(part[0]) for part in parts) == [10, 30]
    wrapped = [(x - 360 if x > 180 else x, y) for x, y in box(179, 10, 183, 20)]
    assert sorted(area(part[0]) for part in within([wrapped])) == [10, 30]
    assert within([box(3, 4, 5, 6)[::-1]]) == [[box(3, 4, 5, 6)[::-1][::-1]]]


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, -360.0, 360.0]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_areas_with_holes_cover_the_same_pixels(seed, turn, wrap):
    random = np.random.default_rng(seed)
    mask = (random.random((12, 14)) < 0.65).astype(np.uint8)
    transform = Affine(1, 0, 172.4, 0, -1, 30)  # the cut runs through the middle of pixels
    found = [shape["coordinates"] for shape, value in shapes(mask, transform=transform) if value]
    moved = [[[(x + turn, y) for x, y in ring] for ring in rings] for rings in found]
    if wrap:
        moved = [[[((x + 180) % 360 - 180, y) for x, y in ring] for ring in rings] for rings in moved]
    parts = [part for rings in moved for part in within(rings)]
    total = 0.0
    for part in parts:
        signs = [area(ring) for ring in part]
        assert signs[0] > 0
        assert all(sign < 0 for sign in signs[1:])
        assert all(-180 <= x <= 180 for ring in part for x, _ in ring)
        assert all(ring[0] == ring[-1] for ring in part)
        total += sum(signs)
    assert total == pytest.approx(mask.sum())
    # Back on a grid four times as fine, beyond 180 degrees again.
    fine = [[[(x + 360 if x < 0 else x, y) for x, y in ring] for ring in part] for part in parts]
    fine = [[[(180.0 if x == 540 else x, y) for x, y in ring] for ring in part] for part in fine]
    geometries = [{"type": "Polygon", "coordinates": part} for part in fine]
    back = (
        rasterize(geometries, (48, 56), transform=Affine(0.25, 0, 172.4, 0, -0.25, 30))
        if geometries
        else np.zeros((48, 56))
    )
    np.testing.assert_array_equal(back, np.kron(mask, np.ones((4, 4))))


@pytest.mark.parametrize("pole", [90, -90])
def test_a_ring_around_a_pole_reaches_it(pole):
    longitudes = np.arange(-175, 185, 10.0)
    ring = [(float(x), pole * 0.8) for x in longitudes]
    parts = within([[*ring, ring[0]]])
    assert sorted(area(part[0]) for part in parts) == pytest.approx([5 * 18, 355 * 18])
    assert all(y == pole or abs(y) == 72 for part in parts for _, y in part[0])
    assert {x for part in parts for x, y in part[0] if y == pole} == {-180, -175, 180}

"""The antimeridian: polygons in longitude and latitude, cut there and at the poles they surround (RFC 7946, 3.1.9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Ring = list[tuple[float, float]]  # closed: the last point is the first
Polygon = list[Ring]  # an outer ring, counterclockwise, then its holes, clockwise


def area(ring: Ring) -> float:
    """Signed area of a ring, positive where it runs counterclockwise in (x, y)."""
    x, y = ring[0]  # near the ring, so that no digits are lost
    return sum((a[0] - x) * (b[1] - y) - (b[0] - x) * (a[1] - y) for a, b in pairwise(ring)) / 2


def within(rings: Polygon) -> list[Polygon]:
    """The parts of a polygon between 180 degrees west and east, rings turned as RFC 7946 has them.

    rings: longitudes in any turn of the globe, neighbouring points less than half a turn apart.
    """
    if not any(abs(x) > 180 for ring in rings for x, _ in ring) and not any(
        abs(b[0] - a[0]) > 180 for ring in rings for a, b in pairwise(ring)
    ):
        return [_turned(rings)]
    rings = _turned([_unrolled(ring) for ring in rings])
    west, east = min(x for x, _ in rings[0]), max(x for x, _ in rings[0])
    middle = (west + east) / 2
    rings = [_shifted(ring, -360 * round((ring[0][0] - middle) / 360)) for ring in rings]
    parts: list[Polygon] = []
    for turn in range(math.floor((west + 180) / 360), math.ceil((east + 180) / 360)):
        inside = _clipped(_clipped([rings], 360 * turn - 180, 1), 360 * turn + 180, -1)
        parts += [[_shifted(ring, -360 * turn) for ring in part] for part in inside]
    return parts


def _turned(rings: Polygon) -> Polygon:
    return [ring if (area(ring) > 0) == (i == 0) else ring[::-1] for i, ring in enumerate(rings)]


def _shifted(ring: Ring, by: float) -> Ring:
    return [(x + by, y) for x, y in ring]


def _unrolled(ring: Ring) -> Ring:
    """The ring without jumps in longitude; one around a pole is closed along the pole."""
    x = ring[0][0]
    unrolled = [ring[0]]
    for (a, _), (b, y) in pairwise(ring):
        x += (b - a + 180) % 360 - 180
        unrolled.append((x, y))
    if abs(x - ring[0][0]) > 180:
        pole = math.copysign(90, sum(y for _, y in ring))
        return [*unrolled, (x, pole), (ring[0][0], pole), ring[0]]
    return [*unrolled[:-1], ring[0]]


def _clipped(polygons: Sequence[Polygon], line: float, side: int) -> list[Polygon]:
    """What lies east (``side`` 1) or west (-1) of the longitude ``line``."""
    return [part for rings in polygons for part in _half(rings, line, side)]


def _half(rings: Polygon, line: float, side: int) -> list[Polygon]:
    whole, pieces = [], []
    for ring in rings:
        if all(side * (x - line) > 0 for x, _ in ring):
            whole.append(ring)
        else:
            pieces += _pieces(ring, line, side)
    # Going along the line, pieces begin and end in turn: the n-th beginning and the n-th end bound one stretch inside.
    begins = sorted(range(len(pieces)), key=lambda i: pieces[i][0][1])
    ends = sorted(range(len(pieces)), key=lambda i: pieces[i][-1][1])
    following, outer = dict(zip(ends, begins, strict=True)), []
    while following:
        first, then = following.popitem()
        ring = list(pieces[first])
        while then != first:
            ring += pieces[then]
            then = following.pop(then)
        outer.append([*ring, ring[0]])
    outer += [ring for ring in whole if area(ring) > 0]
    return [[ring, *(hole for hole in whole if area(hole) < 0 and _holds(ring, hole))] for ring in outer]


def _pieces(ring: Ring, line: float, side: int) -> list[Ring]:
    """The stretches of a ring beyond a line, each from the line to the line."""
    inside = [side * (x - line) > 0 for x, _ in ring[:-1]]
    if not any(inside):
        return []
    start = next(i for i, now in enumerate(inside) if not now)
    points = [*ring[start:-1], *ring[: start + 1]]
    pieces: list[Ring] = []
    for a, b in pairwise(points):
        now, then = (side * (x - line) > 0 for x, _ in (a, b))
        if now != then:
            crossing = (line, a[1] + (b[1] - a[1]) * (line - a[0]) / (b[0] - a[0]))
            pieces += [[crossing]] if then else []
            if now:
                pieces[-1].append(crossing)
        if then:
            pieces[-1].append(b)
    return pieces


def _holds(ring: Ring, hole: Ring) -> bool:
    """Whether a hole lies within a ring: a ray to the east crosses the ring an odd number of times. It starts in the
    middle of a side, since corners may touch the ring."""
    (x, y), (to_x, to_y) = hole[:2]
    x, y = (x + to_x) / 2, (y + to_y) / 2
    crossed = False
    for (ax, ay), (bx, by) in pairwise(ring):
        if (ay > y) != (by > y) and x < ax + (bx - ax) * (y - ay) / (by - ay):
            crossed = not crossed
    return crossed

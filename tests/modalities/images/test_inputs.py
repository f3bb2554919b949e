"""What a token backbone is asked for: where its maps are taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modalities.images.backbones.inputs import evenly_spaced


@given(st.integers(1, 80), st.integers(1, 8))
def test_depths_rise_evenly_to_the_last_block(total, count):
    depths = evenly_spaced(total, count)
    assert len(depths) == min(count, total)
    assert depths[-1] == total - 1
    steps = [b - a for a, b in zip((-1, *depths), depths, strict=False)]
    assert min(steps) >= 1
    assert max(steps) - min(steps) <= 1

"""Stratified draws: disjoint, complete, and of every class the share asked for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from modalities.images.data.splits import draw


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(5, 30), min_size=2, max_size=4), st.floats(0, 0.4), st.floats(0, 0.4), st.integers(0, 9),
)  # fmt: skip
def test_drawn_splits_are_disjoint_and_hold_their_share_of_every_class(sizes, validation, test, seed):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    found = draw(labels, "abcd"[: len(sizes)], validation=validation, test=test, per_class=None, seed=seed)
    assert sorted(i for members in found.values() for i in members) == list(range(len(labels)))
    for label, size in enumerate(sizes):
        for part, share in (("validation", validation), ("test", test)):
            count = sum(labels[i] == label for i in found[part])
            assert count == (max(1, round(share * size)) if share else 0)

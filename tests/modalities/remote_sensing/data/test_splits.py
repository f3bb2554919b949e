"""Splits: a scene in one split only, whatever the request; the same seed gives the same split."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from modalities.remote_sensing.data.splits import deal_scenes, scene_of, split_scenes
from shared.errors import RequestError

scene_sets = st.sets(st.text("abcxyz_012", min_size=1, max_size=6), min_size=1, max_size=40)
fractions = st.floats(0, 0.6)


@given(scenes=scene_sets, validation=fractions, test=fractions, seed=st.integers(0, 9))
def test_splits_are_disjoint_complete_and_repeatable(scenes, validation, test, seed):
    wanted = sum(max(1, round(f * len(scenes))) if f else 0 for f in (validation, test))
    if wanted >= len(scenes):
        with pytest.raises(RequestError, match="no scene is left to train on"):
            split_scenes(scenes, validation=validation, test=test, seed=seed)
        return
    split = split_scenes(scenes, validation=validation, test=test, seed=seed)
    assert sorted(split.train + split.validation + split.test) == sorted(scenes)
    assert len(split.validation) == (max(1, round(validation * len(scenes))) if validation else 0)
    assert split == split_scenes(sorted(scenes, reverse=True), validation=validation, test=test, seed=seed)


@given(scenes=scene_sets, data=st.data())
def test_one_scene_can_be_left_out_by_name(scenes, data):
    assume(len(scenes) > 2)
    left_out = data.draw(st.sampled_from(sorted(scenes)))
    split = split_scenes(scenes, validation=0.3, test=[left_out], seed=1)
    assert split.test == (left_out,)
    assert sorted(split.train + split.validation) == sorted(scenes - {left_out})


def test_seeds_give_different_splits():
    scenes = [f"s{i}" for i in range(20)]
    assert len({split_scenes(scenes, validation=0.2, test=0.2, seed=seed) for seed in range(5)}) == 5


def test_impossible_splits_are_refused():
    for arguments, reason in [
        ({"validation": ["a"], "test": ["a", "b"]}, "'a' is named for both"),
        ({"validation": 0, "test": ["Forest_9"]}, "test names 'Forest_9', which is no scene; nearest: 'Forest_1'"),
        ({"validation": 1.5, "test": 0}, "validation 1.5: a fraction"),
        ({"validation": -0.1, "test": 0}, "validation -0.1: a fraction"),
        ({"validation": ["a"], "test": ["b", "Forest_1"]}, "no scene is left to train on: 3 in all"),
    ]:
        with pytest.raises(RequestError, match=reason):
            split_scenes(["a", "b", "Forest_1"], **arguments)


def test_the_scene_is_found_in_the_name():
    assert scene_of("Barren_01_0213", r"^(?P<scene>[A-Za-z]+_\d+)_") == "Barren_01"
    assert scene_of("val/tile_7", r"^(\w+)/") == "val"
    assert scene_of("S2A_x", "S2[AB]") == "S2A"
    assert scene_of("anything", None) == "anything"
    with pytest.raises(RequestError, match="does not match 'x'"):
        scene_of("x", r"\d")
    with pytest.raises(RequestError, match="not a regular expression"):
        scene_of("x", "(")


@given(
    counts=st.dictionaries(
        st.text("abcdef", min_size=1, max_size=5), st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=2
    ),
    data=st.data(),
)
def test_dealt_folds_share_out_the_rarest_class(counts, data):
    folds = data.draw(st.integers(2, len(counts)))
    parts = deal_scenes(counts, folds)
    assert sorted(scene for part in parts for scene in part) == sorted(counts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    rarest = min(range(2), key=lambda c: sum(count[c] for count in counts.values()))
    holders = [sum(counts[scene][rarest] > 0 for scene in part) for part in parts]
    assert max(holders) - min(holders) <= 1


def test_folds_beyond_the_scenes_are_refused():
    with pytest.raises(RequestError, match="folds 3: use 2 to 2"):
        deal_scenes({"a": (1, 2), "b": (3, 4)}, 3)

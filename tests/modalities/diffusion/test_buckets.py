"""Sizes obey step, range and ratio; a batch never mixes them; seed and epoch decide all, ranks share the work."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities.diffusion.buckets import BucketSampler, Size, buckets, cover, squares, weights
from shared.errors import RequestError


@st.composite
def ranges(draw):
    step = draw(st.sampled_from([8, 32, 64]))
    low = draw(st.integers(1, 6))
    high = draw(st.integers(low, 16))
    ratio = (draw(st.floats(0.2, 1.0)), draw(st.floats(1.0, 5.0)))
    return low * step, high * step, step, ratio


@given(ranges())
@settings(max_examples=60, deadline=None)
def test_every_size_is_a_multiple_within_range_and_ratio(given):
    low, high, step, ratio = given
    sizes = buckets(*given)
    assert len(sizes) == len(set(sizes))
    assert set(squares(low, high, step)) <= set(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert low <= min(height, width) <= max(height, width) <= high
        assert ratio[0] <= width / height <= ratio[1]


@given(ranges())
@settings(max_examples=40, deadline=None)
def test_the_shorter_side_brings_the_area_nearest_to_an_anchor(given):
    low, high, step, _ = given
    areas = [size.height**2 for size in squares(low, high, step)]
    for size in buckets(*given):
        short, long = sorted(size)
        gaps = {side: [abs(side * long - area) for area in areas] for side in range(low, long + 1, step)}
        assert any(gaps[short][i] == min(g[i] for g in gaps.values()) for i in range(len(areas)))


def test_the_published_ranges():
    sizes = buckets(128, 1024, 64, (0.5, 2.0))
    assert len(sizes) == 87
    assert Size(512, 1024) in sizes
    assert Size(512, 512) in sizes
    assert Size(256, 1024) not in sizes
    assert Size(256, 832) in buckets(128, 1024, 64, (0.28, 3.5))
    assert len(buckets(256, 1536, 64, (0.5, 2.0))) == 177


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 1024, 64, (0.5, 2)), "sizes 100 to 1024 pixels by 64: both ends must be multiples of the step"),
        ((1024, 512, 64, (0.5, 2)), "sizes 1024 to 512"),
        ((64, 128, 0, (0.5, 2)), "by 0"),
        ((64, 128, 64, (1.5, 2)), "ratio 1.5 to 2 .* must include 1"),
    ],
)
def test_impossible_ranges_are_named(arguments, message):
    with pytest.raises(RequestError, match=message):
        buckets(*arguments)


def test_probabilities():
    sizes = [Size(16, 16), Size(32, 32), Size(64, 32)]
    assert weights(sizes, "uniform", 32).tolist() == pytest.approx([1 / 3] * 3)
    assert weights(sizes, "area", 32).tolist() == pytest.approx([1 / 13, 4 / 13, 8 / 13])
    assert weights(sizes, "distance", 32).tolist() == pytest.approx([3 / 6, 1 / 6, 2 / 6])


def test_sizes_are_drawn_as_often_as_they_should():
    sizes = [Size(16, 16), Size(32, 32)]
    sampler = BucketSampler(8000, sizes, batch_size=2, weights=weights(sizes, "area", 32))
    share = Counter(batch[0].size for batch in sampler)[Size(32, 32)] / len(sampler)
    assert share == pytest.approx(0.8, abs=0.03)


@given(images=st.integers(0, 60), batch_size=st.integers(1, 7), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_batches_have_one_size_and_no_image_twice(images, batch_size, seed, epoch):
    sampler = BucketSampler(images, buckets(16, 64, 16, (0.5, 2.0)), batch_size=batch_size, seed=seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == images // batch_size
    for batch in batches:
        assert len(batch) == batch_size
        assert len({draw.size for draw in batch}) == 1
    seen = [draw.index for batch in batches for draw in batch]
    assert len(seen) == len(set(seen)) == len(sampler) * batch_size
    assert all(0 <= index < images for index in seen)
    assert list(sampler) == batches


def test_epochs_and_seeds_differ():
    sizes = buckets(16, 64, 16, (0.5, 2.0))
    sampler = BucketSampler(40, sizes, batch_size=2)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(BucketSampler(40, sizes, batch_size=2, seed=1)) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), size=st.tuples(st.integers(8, 1024), st.integers(8, 1024))
)
@settings(max_examples=100, deadline=None)
def test_an_image_is_covered_and_the_crop_is_inside(height, width, size):
    for seed in (None, 3):
        (tall, wide), (top, left) = cover(height, width, Size(*size), seed)
        assert tall == size[0] or wide == size[1]
        assert 0 <= top <= tall - size[0]
        assert 0 <= left <= wide - size[1]
        assert abs(tall / height - wide / width) <= 1 / min(height, width)

"""Shapes and order: a clip loses as little as it can; every sample is met once per pass, in batches of one shape."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.data.buckets import ASPECTS, Bucket, Order, buckets, fitting
from kinema.errors import UsageError


def wan(frames, height, width):
    if (frames - 1) % 4:
        raise UsageError(f"{frames} frames cannot be encoded")


def test_shapes_have_the_area_and_nearly_the_aspects_asked_for():
    made = buckets((49, 81), 480, 832, ASPECTS, 16, wan)
    sizes = {(b.height, b.width) for b in made}
    assert len(made) == 2 * len(sizes) and (480, 832) in sizes
    for aspect in ASPECTS:
        height, width = min(sizes, key=lambda size: abs(size[1] / size[0] - aspect))
        assert abs(width / height / aspect - 1) < 0.06 and 0.85 * 480 * 832 < height * width <= 480 * 832
        assert height % 16 == width % 16 == 0
    with pytest.raises(UsageError, match="50 frames"):
        buckets((50,), 480, 832, (), 16, wan)


def test_a_clip_takes_the_shape_that_loses_least_and_is_not_enlarged():
    choice = buckets((5, 9), 64, 64, (9 / 16, 16 / 9), 16, wan)
    assert {(b.height, b.width) for b in fitting(choice, 1920, 1080)} == {(80, 48)}
    assert fitting(choice, 1080, 1920)[0] == Bucket(9, 48, 80) and fitting(choice, 1080, 1920)[-1].frames == 5
    assert {(b.height, b.width) for b in fitting(choice, 500, 500)} == {(64, 64)}
    assert fitting(choice, 40, 40) == [] and fitting(choice, 40, 40, upscale=1.7)


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    group=st.integers(1, 8),
    seed=st.integers(0, 3),
    skip=st.integers(0, 50),
)
@settings(max_examples=30, deadline=None)
def test_every_sample_is_met_once_per_pass_of_its_bucket(counts, group, seed, skip):
    order = Order(seed, tuple(counts), group)
    numbers = range(group * sum(counts) + sum(counts) * 2)
    met = [order(n) for n in numbers]
    for begin in range(0, len(met) - group + 1, group):
        assert len({bucket for bucket, _ in met[begin : begin + group]}) == 1, "a group is of one bucket"
    for bucket, count in enumerate(counts):
        mine = [place for b, place in met if b == bucket]
        for begin in range(0, len(mine) - count + 1, count):
            assert sorted(mine[begin : begin + count]) == list(range(count))
    assert [Order(seed, tuple(counts), group)(n) for n in numbers[skip : skip + 9]] == met[skip : skip + 9]


def test_buckets_are_met_as_often_as_they_have_samples_and_in_another_order_each_time():
    order = Order(0, (700, 200, 100), 10)
    met = [order(n) for n in range(0, 10_000, 10)]
    assert Counter(bucket for bucket, _ in met) == {0: 700, 1: 200, 2: 100}
    passes = [tuple(bucket for bucket, _ in met[i : i + 100]) for i in range(0, 1000, 100)]
    assert len(set(passes)) == 10
    assert [Order(1, (700, 200, 100), 10)(n) for n in range(0, 1000, 10)] != met[:100]

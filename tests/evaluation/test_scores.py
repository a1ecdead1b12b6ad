import json
import math
from dataclasses import replace

import pytest
import torch

from kinema.data.sprites import World, render, render_story
from kinema.evaluation import frechet, oracle, scores
from kinema.seeds import keys

WORLD = World(one=1, two=1, behind=1, frames=9)


def gaussian(n: int, dim: int, name: str = "gaussian") -> torch.Tensor:
    return keys(0, name, range(n)).normal(dim).double()


def test_rendered_videos_score_full_marks_and_wrong_captions_do_not():
    videos, scenes = render(WORLD, range(48)), WORLD.scenes(range(48))
    right = scores.score(videos, scenes)
    for name in ("shape", "colour", "size", "motion", "background", "count", "all three", "everything", "occlusion"):
        assert right[name].value >= 0.95 and right[name].low <= right[name].value <= right[name].high, name
    assert right["two: shape"].n + right["one: shape"].n + right["behind: shape"].n == right["shape"].n == 48
    assert right["steadiness"].value > 0.9 and right["drift of colour"].value < 0.05 and right["flicker"].value < 0.01
    wrong = scores.score(videos, WORLD.scenes(range(100, 148)))
    assert wrong["shape"].value < 0.4 and wrong["all three"].value < 0.1 < wrong["background"].value


def test_objects_are_matched_to_the_caption_in_either_order():
    world = replace(WORLD, one=0, behind=0)
    videos, scenes = render(world, range(12)), world.scenes(range(12))
    turned = [replace(scene, sprites=scene.sprites[::-1]) for scene in scenes]
    assert scores.score(videos, turned)["everything"] == scores.score(videos, scenes)["everything"]


def test_one_right_object_of_two_is_not_enough():
    world = replace(WORLD, one=0, behind=0)
    videos, scenes = render(world, range(8)), world.scenes(range(8))
    half = [replace(s, sprites=(s.sprites[0], replace(s.sprites[1], motion="none"))) for s in scenes]
    judged = scores.score(videos, half)
    assert judged["motion"].value == 0 and judged["shape"].value > 0.9
    blank = scores.score(torch.zeros_like(videos), scenes)
    assert blank["shape"].value == blank["count"].value == 0 and math.isnan(blank["misfit"].value)


def test_scores_can_be_saved_and_shown():
    judged = scores.score(torch.zeros(2, 3, 3, 32, 32), WORLD.scenes(range(2)))
    saved = json.loads(judged.to_json())
    assert saved["count"]["n"] == 2 and saved["misfit"]["value"] is None
    assert len(judged.table().splitlines()) == len(saved)


def test_wilson_intervals_are_the_published_ones():
    for outcomes, low, high in (
        ([True] * 8 + [False] * 2, 0.4902, 0.9433),
        ([False] * 10, 0.0, 0.2775),
        ([True] * 81 + [False] * 182, 0.2553, 0.3662),  # Newcombe 1998, table I
    ):
        interval = scores.rate(outcomes)
        assert interval.low == pytest.approx(low, abs=1e-4) and interval.high == pytest.approx(high, abs=1e-4)
    assert scores.rate([]).n == 0 and math.isnan(scores.rate([]).value)


def test_bootstrap_intervals_are_the_same_again_and_shrink_with_samples():
    few, many = gaussian(40, 1).flatten().tolist(), gaussian(1000, 1).flatten().tolist()
    assert scores.mean(few) == scores.mean(few)
    interval = scores.mean(many)
    assert interval.low < interval.value < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 1000**0.5, rel=0.15)
    assert scores.mean(few).high - scores.mean(few).low > interval.high - interval.low


def test_distance_to_itself_is_nothing_and_it_is_symmetric():
    a, b = gaussian(300, 8, "a"), gaussian(200, 8, "b") * 2 + 1
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet.distance(a, b) == pytest.approx(frechet.distance(b, a), rel=1e-9)


def test_distance_of_gaussians_has_its_closed_form():
    a = gaussian(200, 6)
    a = a - a.mean(0)
    white = a @ torch.linalg.inv(torch.linalg.cholesky(a.T @ a / 199)).T  # mean 0 and covariance 1 exactly
    spread, shift = torch.arange(1.0, 7).double(), torch.full((6,), 0.5).double()
    expected = 6 * 0.25 + (spread - 1).square().sum()
    assert frechet.distance(white, white * spread + shift) == pytest.approx(float(expected), rel=1e-9)


def test_distance_grows_with_a_shift():
    a = gaussian(100, 5)
    distances = [frechet.distance(a, a + shift) for shift in (0, 0.1, 0.5, 2)]
    assert distances == sorted(distances) and distances[2] == pytest.approx(5 * 0.25, rel=1e-6)


def test_few_samples_give_a_finite_distance_and_one_none():
    assert math.isfinite(frechet.distance(gaussian(3, 34, "a"), gaussian(3, 34, "b")))
    with pytest.raises(ValueError, match="covariance"):
        frechet.distance(gaussian(1, 4), gaussian(9, 4))


def test_distance_tells_worlds_apart_and_its_interval_holds_it():
    other = replace(WORLD, seed=1)
    red = replace(WORLD, one=1, two=0, behind=0, colours=("red",))
    real, alike, unlike = (oracle.features(render(world, range(80))) for world in (WORLD, other, red))
    near, far = frechet.score(real, alike), frechet.score(real, unlike)
    assert near.low <= near.value <= near.high < far.low <= far.value <= far.high


def test_stories_persist_unless_the_last_scene_is_another():
    world = World(frames=9)
    stories = [world.story(n, 3) for n in range(8)]
    videos = render_story(world, range(8), scenes=3)
    right = scores.score_stories(videos, stories)
    assert right["persistence"].value == 1 and right["persistence"].n == 8 and right["everything"].value > 0.9
    swapped = torch.cat([videos[:, :18], videos.roll(1, 0)[:, 18:]], dim=1)
    wrong = scores.score_stories(swapped, stories)
    assert wrong["persistence"].value < 0.3 and wrong["return colour"].value > right["return colour"].value

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kinema.data.scenes import COLOURS, SHAPES, Scene, Sprite
from kinema.data.sprites import World, render, render_scenes, render_story
from kinema.evaluation import oracle
from kinema.evaluation.looking import look
from kinema.evaluation.measuring import blurred
from kinema.seeds import keys

WORLD = World(one=1, two=1, behind=1, split="all", shapes=SHAPES)
ATTRIBUTES = ("shape", "colour", "size", "motion")


def named(readings, scenes) -> Counter:
    """How many readings are right in each attribute; objects are told apart by colour."""
    right = Counter(total=len(scenes))
    for reading, scene in zip(readings, scenes, strict=True):
        seen = sorted(reading.objects, key=lambda o: o.colour)
        asked = sorted(scene.sprites, key=lambda s: s.colour)
        right["background"] += reading.background == scene.background
        right["occlusion"] += (reading.wall and reading.hidden) == (scene.kind == "behind")
        for name in ATTRIBUTES:
            right[name] += [getattr(o, name) for o in seen] == [getattr(s, name) for s in asked]
    return right


def noisy(videos: Tensor, width: float) -> Tensor:
    noise = keys(0, "noise", range(len(videos))).normal(videos[0].numel())
    return videos + width * noise.view_as(videos)


def sure(readings) -> float:
    values = [min(o.confidence.values()) for reading in readings for o in reading.objects]
    return sum(values) / max(1, len(values))


def test_rendered_videos_are_read_right():
    right = Counter()
    world = replace(WORLD, frames=9)
    for start in range(0, 600, 50):
        indices = range(start, start + 50)
        right += named(oracle.read(render(world, indices)), world.scenes(indices))
    for name in ("background", "occlusion", *ATTRIBUTES):
        assert right[name] >= 0.99 * right["total"], (name, right)


@pytest.mark.parametrize("size, frames", [(64, 33), (32, 17), (96, 9)])
def test_any_resolution_and_length_is_read(size, frames):
    world = replace(WORLD, size=size, frames=frames)
    right = named(oracle.read(render(world, range(24))), world.scenes(range(24)))
    assert all(right[name] >= 23 for name in ("background", "occlusion", *ATTRIBUTES)), right


def test_blurred_faded_and_half_sharp_videos_are_read_right():
    world = replace(WORLD, frames=9)
    videos, scenes = render(world, range(40)), world.scenes(range(40))
    halved = torch.nn.functional.interpolate(videos.flatten(0, 1), scale_factor=0.5, mode="area")
    halved = torch.nn.functional.interpolate(halved, scale_factor=2, mode="bilinear").view_as(videos)
    for spoiled in (blurred(videos, 1.2), videos * 0.8 - 0.1, halved, noisy(videos, 0.2)):
        right = named(oracle.read(spoiled), scenes)
        assert all(right[name] >= 38 for name in ("background", "occlusion", *ATTRIBUTES)), right


def test_noise_makes_readings_worse_and_less_sure():
    world = replace(WORLD, frames=9)
    videos, scenes = render(world, range(40)), world.scenes(range(40))
    read = [oracle.read(noisy(videos, width)) for width in (0, 1, 2.5, 6)]
    right = [named(r, scenes)["shape"] for r in read]
    assert right == sorted(right, reverse=True) and right[0] >= 39 and right[-1] <= 10, right
    confidence = [sure(r) for r in read]
    assert confidence == sorted(confidence, reverse=True) and confidence[0] > 0.6 and confidence[-1] < 0.2, confidence


def test_blank_or_broken_videos_show_no_object():
    for value in (-1.0, 0.0, 1.0, torch.nan, torch.inf):
        reading = oracle.read(torch.full((1, 5, 3, 64, 64), value))[0]
        assert not reading.objects and not reading.hidden
    assert torch.isfinite(oracle.features(torch.zeros(2, 5, 3, 64, 64))).all()
    assert oracle.read(torch.zeros(0, 5, 3, 64, 64)) == []


def test_a_reading_does_not_depend_on_its_batch():
    videos = render(replace(WORLD, frames=9), range(6))
    alone, together = oracle.read(videos[3:4])[0], oracle.read(videos)[3]
    assert [(o.shape, o.colour, o.motion) for o in alone.objects] == [
        (o.shape, o.colour, o.motion) for o in together.objects
    ]
    torch.testing.assert_close(oracle.features(videos[3:4])[0], oracle.features(videos)[3], atol=1e-4, rtol=1e-4)


def test_only_known_shapes_are_named():
    world = World(shapes=("heart",), split="all", frames=9)
    known = tuple(s for s in SHAPES if s != "heart")
    assert all(o.shape in known for r in oracle.read(render(world, range(16)), known) for o in r.objects)


def test_a_motion_outside_the_world_is_other():
    world = World(split="all", shapes=("circle",), motions=("right",))
    video = render(world, range(8))
    there_and_back = torch.cat([video[:, ::2], video.flip(1)[:, ::2]], dim=1)
    assert {r.objects[0].motion for r in oracle.read(there_and_back)} == {oracle.OTHER}


def test_tracks_and_radii_are_measured_in_64ths_of_the_frame():
    scene = Scene("black", (Sprite("circle", "red", "big", "still"),))
    world = World(size=96, frames=3)
    own = world.keys([0])
    (reading,) = oracle.read(render_scenes(world, [scene], own, radius=torch.full((1, 2), 0.5)))
    assert abs(reading.objects[0].radius - 10) < 0.2
    assert reading.objects[0].misfit < 0.1 and reading.objects[0].steadiness > 0.98
    red = torch.tensor(COLOURS["red"]) / 255
    assert torch.allclose(torch.tensor(reading.objects[0].rgb), red, atol=0.01)


def test_features_are_a_fixed_number_of_finite_numbers():
    world = replace(WORLD, frames=9)
    values = oracle.features(render(world, range(40)))
    assert values.shape == (40, 34) and values.dtype == torch.float64 and torch.isfinite(values).all()
    assert values.abs().max() < 5 and (values.std(0) > 0).sum() >= 33


def test_a_returning_character_persists_and_a_swapped_one_does_not():
    world = World(frames=9)
    story = world.story(0, 3)
    mine, other = render_story(world, [0, 1], scenes=3).unflatten(1, (3, -1))
    (back,) = oracle.persistence(oracle.read(mine), story)
    assert back.same and back.scene == 2 and max(back.colour, back.size, back.shape) < 0.05
    swapped = torch.cat([mine[:2], other[2:]])
    (back,) = oracle.persistence(oracle.read(swapped), story)
    assert not back.same and max(back.colour, back.size, back.shape) > 0.1
    (back,) = oracle.persistence(oracle.read(torch.cat([mine[:2], torch.zeros_like(mine[2:])])), story)
    assert not back.same


@pytest.mark.slow
def test_processes_that_share_the_work_see_what_one_sees():
    videos = render(World(frames=9), range(40))
    (alone, features), (shared, others) = look(videos), look(videos, jobs=2)
    assert torch.equal(features, others) and torch.equal(features, oracle.features(videos))
    for one, other in zip(alone, shared, strict=True):
        assert one.background == other.background and len(one.objects) == len(other.objects)
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(one.objects, other.objects, strict=True))

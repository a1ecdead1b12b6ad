from collections import Counter
from dataclasses import replace

import pytest
import torch

from kinema.data import captions
from kinema.data.scenes import COLOURS, MOTIONS, NOVEL_SHAPES, SHAPES, heldout
from kinema.data.sprites import World, render, render_scenes, render_story

MIXED = World(one=1, two=1, behind=1)
ANY = replace(MIXED, split="all", shapes=SHAPES)


def test_a_clip_is_the_same_alone_and_in_a_batch():
    batch = render(ANY, range(24))
    for index in (0, 5, 17, 23):
        assert torch.equal(render(ANY, [index])[0], batch[index])


def test_a_clip_is_the_same_again_and_differs_from_others():
    assert torch.equal(render(MIXED, [3, 4]), render(MIXED, [3, 4]))
    assert not torch.equal(render(MIXED, [3]), render(MIXED, [4]))
    assert not torch.equal(render(MIXED, [3]), render(replace(MIXED, seed=1), [3]))


def test_videos_have_the_shape_and_range_promised():
    for world in (MIXED, replace(MIXED, size=32, frames=9), replace(MIXED, frames=1)):
        video = render(world, range(6))
        assert video.shape == (6, world.frames, 3, world.size, world.size) and video.dtype == torch.float32
        assert video.min() >= -1 and video.max() <= 1


def test_motion_is_smooth_below_a_pixel():
    world = World(motions=("right",), split="all", shapes=("circle",))
    video = render(world, range(8))
    ground = video[:, :, :, :1, :1]
    weight = (video - ground).abs().sum(2).sum(-2)
    x = (weight * torch.arange(64)).sum(-1) / weight.sum(-1)
    step = x.diff(dim=1)
    assert (step - step.mean(1, keepdim=True)).abs().max() < 0.05


def test_sprites_stay_inside_the_frame():
    video = render(replace(ANY, behind=0), range(60))
    border = torch.ones(64, 64, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert (video - video[:, :1, :, :1, :1])[..., border].abs().max() < 0.02


def test_two_sprites_differ_and_rarely_overlap():
    world = replace(ANY, one=0, behind=0)
    scenes = world.scenes(range(300))
    assert all(a.shape != b.shape and a.colour != b.colour for a, b in (scene.sprites for scene in scenes))
    both = render_scenes(world, scenes[:60], world.keys(range(60)))
    covered = ((both - both[:, :, :, :1, :1]).abs().sum(2) > 0.1).sum((-1, -2))
    assert (covered < 0.8 * covered.amax(1, keepdim=True)).float().mean() < 0.05


def test_training_and_heldout_combinations_are_disjoint_and_cover_all_pairs():
    train = [sprite for scene in MIXED.scenes(range(6000)) for sprite in scene.sprites]
    held = [sprite for scene in replace(MIXED, split="heldout").scenes(range(2000)) for sprite in scene.sprites]
    assert not any(heldout(s.shape, s.colour, s.motion) for s in train)
    assert all(heldout(s.shape, s.colour, s.motion) for s in held)
    assert not set(NOVEL_SHAPES) & {s.shape for s in train}
    shapes = len(SHAPES) - len(NOVEL_SHAPES)
    for pair, possible in (
        (lambda s: (s.shape, s.colour), shapes * len(COLOURS)),
        (lambda s: (s.shape, s.motion), shapes * len(MOTIONS)),
        (lambda s: (s.colour, s.motion), len(COLOURS) * len(MOTIONS)),
    ):
        count = Counter(map(pair, train))
        assert len(count) == possible and min(count.values()) > 20
    assert 0.1 < sum(heldout(s, c, m) for s in SHAPES for c in COLOURS for m in MOTIONS) / (7 * 8 * 7) < 0.15


def test_a_caption_reads_back_as_its_scene():
    scenes = ANY.scenes(range(6000))
    words = set(captions.vocabulary())
    for index, scene in enumerate(scenes):
        said = ANY.caption(scene, index)
        assert captions.parse(said) == scene and captions.parse(captions.canonical(scene)) == scene, said
        assert said.isascii() and said == said.lower() and set(said.split()) <= words, said
    assert len({ANY.caption(scenes[0], n) for n in range(2000)}) > 300


def test_captions_of_users_are_read_leniently_or_not_at_all():
    scene = captions.parse("A huge  orange heart rests, against gray.")
    assert (
        scene
        and scene.background == "grey"
        and scene.sprites[0].shape == "heart"
        and scene.sprites[0].motion == "still"
    )
    for other in (
        "",
        "a cat sits on a mat",
        "a big red circle moves left",
        "a big red circle moves left on a red background",
    ):
        assert captions.parse(other) is None


def test_every_word_is_known():
    words = captions.vocabulary()
    assert {"heart", "an", "a", "fourth", "wall"} <= set(words) and len(words) == len(set(words)) < 128


def test_a_story_begins_and_ends_with_its_character():
    words = set(captions.vocabulary())
    for index in range(40):
        for scenes in (1, 2, 3, 7, 21):
            story = MIXED.story(index, scenes)
            assert len(story.scenes) == scenes and story.characters[0] == story.characters[-1] == 0
            looks = {
                (c, s.sprites[0].shape, s.sprites[0].colour, s.sprites[0].size)
                for c, s in zip(story.characters, story.scenes, strict=True)
            }
            assert len(looks) == len(set(story.characters))
            said = MIXED.story_captions(story, index)
            assert {word for caption in said for word in caption.split()} <= words
            plain = MIXED.story_captions(story, index, recall=False)
            assert [captions.parse(caption) for caption in plain] == list(story.scenes)
            if scenes > 2:
                assert 1 in story.characters and captions.parse(said[-1]) is None


def test_stories_render_scene_after_scene():
    world = replace(MIXED, frames=5)
    video = render_story(world, [2, 7], scenes=4)
    assert video.shape == (2, 20, 3, 64, 64)
    assert torch.equal(render_story(world, [7], scenes=4)[0], video[1])


def test_mistakes_in_a_world_are_named():
    with pytest.raises(ValueError, match="hexagon"):
        World(shapes=("hexagon",))
    with pytest.raises(ValueError, match="split"):
        World(split="test")
    with pytest.raises(ValueError, match="weights"):
        World(one=0)
    with pytest.raises(ValueError, match="wall"):
        World(behind=1, motions=("up",))
    with pytest.raises(ValueError, match="colours"):
        World(one=0, two=1, colours=("red",)).scene(0)

"""Stories that change their prompt and change it back: what is told when, and by what it is judged."""

import pytest
import torch

from kinema.data.sprites import render_scenes
from kinema.errors import UserError
from kinema.evaluation import switched
from kinema.evaluation.evaluate import HELD_OUT, held_out
from kinema.pretrained import load

A, B = "a big red circle moves left on a black background", "a small green star falls on a navy background"


def test_a_chapter_hears_its_own_prompt_and_the_first_is_that_of_a_plain_video(monkeypatch):
    monkeypatch.setattr(switched, "CHUNKS", 1)
    model = load("sprites-wan-4step", torch.device("cpu"))
    (told, length), (plain, _), (again, _) = (
        switched.tell(model, [[A], [middle], [A]], anew=anew) for middle, anew in ((B, False), (A, False), (B, True))
    )
    assert length == 3 and told.shape == (1, 33, 3, 64, 64)
    assert torch.equal(told[:, :9], plain[:, :9]) and torch.equal(again[:, :9], plain[:, :9])
    assert (told[:, 12:21] - plain[:, 12:21]).abs().max() > 0.3
    assert not torch.equal(told[:, 12:], again[:, 12:])


def test_windows_are_judged_by_the_chapter_they_end():
    _, scenes = held_out(4)
    videos = render_scenes(HELD_OUT, scenes[:2], HELD_OUT.keys(range(2)))
    told = torch.cat([videos, videos, render_scenes(HELD_OUT, scenes[2:], HELD_OUT.keys(range(2)))], dim=1)
    first, second, third, fourth = switched.judged(told, [66, 99], [scenes[:2], scenes[2:]])
    assert [w["first"] for w in (first, second, third, fourth)] == [0, 33, 33, 66]
    asked = [w["scores"]["all three"]["value"] for w in (first, second, fourth)]
    assert asked == [1, 1, 1] and third["scores"]["all three"]["value"] < 1


def test_a_model_that_does_not_stream_is_refused():
    with pytest.raises(UserError, match="sprites-wan does not stream, so its prompt cannot change; give a causal Wan"):
        switched.tell(load("sprites-wan", torch.device("cpu")), [[A], [B]])

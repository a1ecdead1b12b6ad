"""The benchmark of samplers at a size of nothing: its passes and tokens are those of the clip."""

import json

import pytest

from kinema.bench import tokens
from kinema.errors import UsageError


def test_one_step_is_one_pass_and_guided_steps_are_two(capsys):
    words = "--size tiny --clip 9x32x32 --steps 2 --repeats 1 --device cpu --dtype float32"
    tokens.main(words.split())
    one, two = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (one["passes"], two["passes"]) == (1, 4) and one["tokens"] == two["tokens"] == 3 * 4 * 4
    assert 0 < one["seconds"] < one["seconds_with_tokenizer"] and one["guidance"] == 1 and two["guidance"] == 7


def test_clips_are_frames_height_and_width():
    assert tokens.clip_of("17x256x320") == (17, 256, 320)
    with pytest.raises(UsageError, match="--clip is 17x256"):
        tokens.clip_of("17x256")

"""What mixers remember of a first scene depends on groups and rates; the recipe's choice lasts for long videos."""

from dataclasses import replace

import pytest

from kinema.errors import UsageError
from kinema.evaluation.retention import main, retained
from kinema.models.ttt.lact import LaCT
from kinema.models.ttt.ttt_layer import TTTMLP
from kinema.recipes.sprites_ttt import KINDS, STAGES


def test_one_scene_is_there_and_none_without_a_step():
    for mixer in (LaCT(1, base_lr=0.1), LaCT(1, group="segment", base_lr=0.1), TTTMLP(base_lr=4.0, spread=1.0)):
        assert retained(mixer, 32, 48, 1, pairs=2).all > 0.8
        assert max(retained(replace(mixer, base_lr=1e-9), 32, 48, 6, pairs=2)) < 0.5


def test_a_step_for_each_scene_overwrites_the_first_and_one_for_the_video_does_not():
    lact = KINDS["lact"]
    assert isinstance(lact, LaCT) and lact.group == "video"
    longest = STAGES["21x"].scenes
    assert retained(lact, 160, 168, longest, videos=2).first > 0.8
    assert retained(replace(lact, group="segment"), 160, 168, longest, videos=2).first < 0.1


def test_the_table_has_a_line_for_each_rate_and_way(capsys):
    main(["--width", "16", "--tokens", "16", "--rates", "0.1", "0.2", "--scenes", "1", "2"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 5 and lines[0].endswith("1 scenes        2 scenes") and all("%" in line for line in lines[1:])
    main(["--mixer", "ttt_linear", "--width", "16", "--tokens", "16", "--scenes", "2", "--spread", "0.2"])
    assert "1     64 tokens" in capsys.readouterr().out.splitlines()[2]
    with pytest.raises(UsageError, match="2 tokens cannot say 8 pairs"):
        main(["--tokens", "2"])
    with pytest.raises(UsageError, match="lact has no spread"):
        main(["--spread", "1"])
    with pytest.raises(UsageError, match="--rates and --spread must be above 0"):
        main(["--rates", "nan"])

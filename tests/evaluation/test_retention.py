"""What a `lact` remembers of a first scene depends on its groups; the recipe's choice lasts for its longest videos."""

import pytest

from kinema.errors import UsageError
from kinema.evaluation.retention import main, retained
from kinema.models.ttt.lact import LaCT
from kinema.recipes.sprites_ttt import KINDS, STAGES


def test_one_scene_is_there_and_none_without_a_step():
    assert retained(32, 48, 0.1, 1, pairs=2) == retained(32, 48, 0.1, 1, whole=True, pairs=2) == 1
    assert retained(32, 48, 0.0, 6, pairs=2) < 0.5


def test_a_step_for_each_scene_overwrites_the_first_and_one_for_the_video_does_not():
    lact = KINDS["lact"]
    assert isinstance(lact, LaCT) and lact.group == "video"
    longest = STAGES["21x"].scenes
    assert retained(160, 208, lact.base_lr, longest, whole=True, videos=2) > 0.8
    assert retained(160, 208, lact.base_lr, longest, videos=2) < 0.1


def test_the_table_has_a_line_for_each_rate_and_way(capsys):
    main(["--width", "16", "--tokens", "16", "--rates", "0.1", "0.2", "--scenes", "1", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].endswith("1 scenes    2 scenes") and all("%" in line for line in lines[1:])
    with pytest.raises(UsageError, match="2 tokens cannot say 8 pairs"):
        main(["--tokens", "2"])

"""What a wrong word costs: nothing where captions are not heard, something where they are; one word is exchanged."""

from dataclasses import replace

import pytest
import torch

from kinema.data.captions import parse
from kinema.evaluation.evaluate import HELD_OUT
from kinema.evaluation.wording import WORDS, _misworded, costs, main
from kinema.pretrained import load


@pytest.fixture(scope="module")
def wan():
    return load("sprites-wan", torch.device("cpu"))


@pytest.mark.parametrize("word", WORDS)
def test_one_word_is_another_one_and_the_others_stay(word):
    for index in range(32):
        (scene, right), wrong = HELD_OUT.clip(index), _misworded(HELD_OUT, index, word)
        told = parse(wrong)
        assert told is not None and told.background == scene.background
        assert [w for w in WORDS if getattr(told.sprites[0], w) != getattr(scene.sprites[0], w)] == [word]
        if word != "motion":  # which is told in several words
            changed = [pair for pair in zip(right.split(), wrong.split(), strict=True) if pair[0] != pair[1]]
            assert len([pair for pair in changed if not {"a", "an"} >= {p.lower() for p in pair}]) == 1


def test_a_model_that_hears_pays_for_a_wrong_shape_while_it_is_drawn(wan):
    found = costs(wan, (0.6, 0.02), ("shape",), n=4, batch=3)
    drawn, seen = found["shape"]
    assert (
        drawn.n == 4 and drawn.low > 0.02 > seen.high > seen.low > 0 and all(score.low > 0 for score in found["right"])
    )
    assert costs(wan, (0.6,), ("shape",), n=4, batch=4)["shape"][0].value == pytest.approx(drawn.value, rel=1e-4)


def test_a_model_that_does_not_hear_pays_nothing(wan):
    class Deaf:
        def loss(self, x0, t, cond, draw):
            return wan.denoiser.loss(x0, t, {"text": torch.zeros_like(cond["text"])}, draw)

    found = costs(replace(wan, denoiser=Deaf()), (0.6,), ("colour",), n=2, batch=2)
    assert found["colour"][0].value == 0 < found["right"][0].value


def test_the_table_has_values_and_intervals(capsys):
    main(["sprites-wan", "--times", "1", "0.5", "--words", "size", "--n", "2", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert "(2 clips, 95 %)" in lines[0] and lines[1].split() == ["t", "1", "0.5"]
    assert [line.split()[0] for line in lines[2::2]] == ["right", "size"] and all("±" in line for line in lines[3::2])

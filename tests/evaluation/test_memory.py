"""Who comes back unchanged is remembered, whoever else comes is not; and what length costs can be measured."""

import torch

from kinema import pretrained
from kinema.data.sprites import World
from kinema.data.stories import stories_of
from kinema.evaluation import cost, memory
from kinema.models.ttt.full_attention import NoMixer
from kinema.models.ttt.lact import LaCT


def test_rendered_stories_are_remembered_and_mixed_ones_are_not():
    pixels, stories, _ = stories_of(World(seed=1), range(6), 3)
    scores = memory.remembered(memory.readings(pixels, stories))
    assert scores["persistence"].value == 1 and scores["asked for"].value == 1 and scores["colour distance"].value < 0.1
    frames = (pixels.shape[1] - 1) // 3
    other = torch.cat([pixels[:, :-frames], pixels.roll(1, 0)[:, -frames:]], dim=1)
    mixed = memory.remembered(memory.readings(other, stories))
    assert mixed["persistence"].value <= 1 / 3 and mixed["asked for"].value == 1


def test_the_shipped_model_remembers_who_opened_the_story(tmp_path):
    """With fewer steps than it is sampled with, as this is a test."""
    model = pretrained.load("sprites-ttt", torch.device("cpu"))
    folder = pretrained.find("sprites-ttt")
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 8 * 2**20
    scores = memory.probe(model.with_settings(steps=8), 6, 4, tmp_path, rendered=False)
    assert scores["colour"].value == 1 and scores["shape"].value >= 0.75  # by chance 1 in 8 and 1 in 7


def test_cost_is_measured_relative_to_attention_alone():
    rows = []
    for mixer in (NoMixer(), LaCT(heads=1)):
        row = cost.measure(mixer, 6, 1, repeats=1, device="cpu", heads=1, head_dim=32, grid=(13, 4, 4), time_dim=16)
        rows.append({"mixer": mixer.kind, "seconds": 6, **row})
    assert rows[0]["tokens"] == 25 * 4 + 2 * cost.TEXT
    lines = cost.table(rows).splitlines()
    assert len(lines) == 3 and "( 1.00)" in lines[1] and all(row["training seconds"] > 0 for row in rows)

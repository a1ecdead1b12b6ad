"""A figure of scores over time shows what the evaluations hold, and says what it cannot show."""

import json
from xml.etree import ElementTree

import pytest

from kinema.errors import UserError
from kinema.evaluation.drift import curve, figure


def evaluation(folder, values, score="shape"):
    windows = [
        {"first": 33 * i, "scores": {score: {"value": v, "low": v and v / 2, "high": v and (1 + v) / 2, "n": 8}}}
        for i, v in enumerate(values)
    ]
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps({"scores": {}, "windows": windows}))
    return folder


def test_a_curve_has_the_windows_that_have_a_value(tmp_path):
    made = curve("a", evaluation(tmp_path / "a", [1.0, None, 0.5]), "shape")
    assert made.x == [16.5, 82.5] and made.value == [1.0, 0.5] and made.low == [0.5, 0.25] and made.high == [1.0, 0.75]


def test_the_figure_is_a_document_with_a_line_and_a_band_for_each_curve(tmp_path):
    curves = [curve(name, evaluation(tmp_path / name[0], [1.0, 0.2]), "shape") for name in ("one <&>", "two")]
    tree = ElementTree.fromstring(figure(curves, "frame", "shape", mark=33))
    lines = [e.get("points").split() for e in tree.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in lines] == [2, 2]
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights[1] > heights[0]  # downwards as the score falls
    assert "one <&>" in [e.text for e in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_what_cannot_be_shown_is_said(tmp_path):
    with pytest.raises(UserError, match="has no windows to compare; evaluate with --frames"):
        curve("a", evaluation(tmp_path / "a", []), "shape")
    with pytest.raises(UserError, match="has no windows to compare"):
        curve("a", evaluation(tmp_path / "one", [1.0]), "shape")
    with pytest.raises(UserError, match="could not be read in any window"):
        curve("a", evaluation(tmp_path / "none", [None, None]), "shape")
    with pytest.raises(UserError, match="has no score 'colour'; choose among shape"):
        curve("b", evaluation(tmp_path / "b", [0.5, 0.5]), "colour")

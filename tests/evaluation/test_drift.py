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


def probed(folder, rates):
    for scenes, value in rates.items():
        (folder / f"{scenes:02d}").mkdir(parents=True)
        score = {"value": value, "low": value / 2, "high": value, "n": 8}
        (folder / f"{scenes:02d}" / "memory.json").write_text(
            json.dumps({"scenes": scenes, "scores": {"shape": score}})
        )
    return folder


def test_a_probe_is_a_curve_over_the_lengths_of_its_stories(tmp_path):
    made = curve("a", probed(tmp_path / "a", {3: 0.75, 121: 0.25, 21: 0.5}), "shape")
    assert made.x == [3, 21, 121] and made.value == [0.75, 0.5, 0.25] and made.across == "scenes of the story"
    with pytest.raises(UserError, match="has stories of one length; probe with --scenes of two"):
        curve("b", probed(tmp_path / "b", {3: 0.75}), "shape")
    with pytest.raises(UserError, match="has no score 'colour'; choose among shape"):
        curve("a", tmp_path / "a", "colour")
    windows = curve("w", evaluation(tmp_path / "w", [1.0, 0.2]), "shape")
    with pytest.raises(UserError, match="w is a curve over the frame of the video, a is not; draw them apart"):
        figure([windows, made], "shape")


def test_the_figure_is_a_document_with_a_line_and_a_band_for_each_curve(tmp_path):
    curves = [curve(name, evaluation(tmp_path / name[0], [1.0, 0.2]), "shape") for name in ("one <&>", "two")]
    tree = ElementTree.fromstring(figure(curves, "shape", mark=33))
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
    with pytest.raises(UserError, match="could not be read anywhere"):
        curve("a", evaluation(tmp_path / "none", [None, None]), "shape")
    with pytest.raises(UserError, match="has no score 'colour'; choose among shape"):
        curve("b", evaluation(tmp_path / "b", [0.5, 0.5]), "colour")

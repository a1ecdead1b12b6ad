"""Ablations end with one figure of what each student reached, beside the report."""

import json
import subprocess
from xml.etree import ElementTree

from kinema import ablations


def column(label, teacher=False, facts=True, **scores):
    found = {name: {"value": v, "low": v and v - 0.1, "high": v and v + 0.1, "n": 8} for name, v in scores.items()}
    return {"label": label, "teacher": teacher, "scores": found, "facts": {"folder": label} if facts else {}}


COMPARISON = {
    "columns": [
        column("base, 25 steps", teacher=True, **{"all three": 0.9, "diversity": 0.6, "Fréchet distance": 0.2}),
        column("kd, 1 step", **{"all three": 0.5, "diversity": 0.5, "Fréchet distance": None}),
        column("none, 1 step", **{"all three": 0.7, "diversity": 0.4, "Fréchet distance": 0.3}),
        column("rendered", facts=False, diversity=0.7),
    ]
}


def texts(svg: str) -> list[str | None]:
    return [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_figure_has_the_reference_first_then_the_other_students_and_no_truth():
    svg = ablations.drawn(COMPARISON)
    assert texts(svg)[:2] == ["none", "kd"] and "rendered" not in svg
    assert svg.count("<circle") == 5 and svg.count("stroke-dasharray") == 3  # what could not be read has no dot


def test_students_are_trained_compared_and_drawn(tmp_path, monkeypatch, capsys):
    def run(words, **how):
        commands.append(words[3:])
        if words[3] == "evaluate":
            folder = tmp_path / "compared"
            folder.mkdir()
            (folder / "comparison.json").write_text(json.dumps(COMPARISON), encoding="utf-8")
        return subprocess.CompletedProcess(words, 0)

    commands: list[list[str]] = []
    monkeypatch.setattr(ablations.subprocess, "run", run)
    ablations.ablate("sprites-ursa", tmp_path, ["none", "kd"], 1, 8, "cpu", [])
    assert [command[0] for command in commands] == ["train", "train", "evaluate"]
    assert capsys.readouterr().out.strip() == str(tmp_path / "compared" / "ablations.svg")
    assert (tmp_path / "compared" / "ablations.svg").read_text(encoding="utf-8") == ablations.drawn(COMPARISON)

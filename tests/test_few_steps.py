"""The second half of the demo distils and says what teacher and students cost and score."""

import io

import torch
from rich.console import Console

from kinema.evaluation import report
from kinema.few_steps import few_steps

OPTIONS = ("--steps", "2", "--batch_size", "1", "--clips", "2")


def test_the_demo_distils_and_compares_teacher_and_students(tmp_path):
    console = Console(file=io.StringIO())
    sections, cards = few_steps(tmp_path, torch.device("cpu"), 1, console, OPTIONS, teacher_steps=3)
    table = next(section for section in sections if isinstance(section, report.ScoreTable))
    assert list(table.columns) == ["teacher", "student before", "student after", "student shipped"]
    costs = next(section for section in sections if isinstance(section, report.Facts)).pairs
    # guided: both branches at each of 3 steps; by chunks: 4 steps each, and all but the last of 3 are remembered
    assert [name.split(", ")[1] for name in costs] == ["6 network evaluations"] + ["14 network evaluations"] * 3
    report.write(report.Report("few steps", "", sections, cards), tmp_path / "report.html")
    assert (tmp_path / "train" / "checkpoints" / "step-00000002").is_dir()

"""Exports say where they come from: every stage to the first, the data, the numbers; and conversions from elsewhere."""

from dataclasses import replace

import pytest
import torch
from world import run

from kinema import cli
from kinema.data import public_lmdb
from kinema.data.shards import Shards
from kinema.errors import UserError
from kinema.exporting import MARK, export, parents
from kinema.models.lora import FILE, LoRA
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Two runs, the second from the first, and adapters from nothing."""
    folder = tmp_path_factory.mktemp("stages")
    Trainer(run(steps=1), folder / "one", CPU).train()
    Trainer(run(steps=2, init_from=str(folder / "one")), folder / "two", CPU).train()
    role = run().objective.student
    tuned = Role(replace(role.spec, edits=(LoRA(rank=2, alpha=1.0),)), role.optim)
    Trainer(run(steps=1, objective=Denoising(tuned)), folder / "lora", CPU).train()
    return folder


def test_a_card_names_all_stages_and_numbers(stages, tmp_path):
    out = export(stages / "two", tmp_path / "out", layout="original")
    card = (out / "README.md").read_text()
    lines = [*parents(stages / "two")]
    assert [line.split(":")[0] for line in lines[:2]] == ["`two`", "`one`"] and "2 of 2 steps" in lines[0]
    assert lines[2] == "`student` began from random weights" and all(line in card for line in lines)
    assert "in the layout `wan`" in card and "| loss/student |" in card and "Waves" in card and "seed: 0" in card
    assert "averaged weights" in card and MARK in card
    again = export(stages / "two", tmp_path / "out", layout="kinema", ema=False)
    assert "averaged weights" not in (again / "README.md").read_text()
    assert not list(again.glob("diffusion_pytorch_model*"))


def test_a_parent_that_is_gone_is_said(stages, tmp_path):
    Trainer(run(steps=1, init_from=str(stages / "one")), tmp_path / "late", CPU).train()
    (stages / "one").rename(stages / "moved")
    try:
        assert [*parents(tmp_path / "late")][1].endswith("which is not there any more")
    finally:
        (stages / "moved").rename(stages / "one")


def test_adapters_have_a_card_and_what_is_not_ours_is_not_replaced(stages, tmp_path):
    out = export(stages / "lora", tmp_path / "lora", adapters=True)
    assert (out / FILE).exists() and "sha256" in (out / "README.md").read_text()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things than an export"):
        export(stages / "two", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_self_forcings_data_is_converted_by_a_command(tmp_path, capsys):
    rows = [(f"a red star {i}", torch.full((3, 2, 16, 4, 4), float(i))) for i in range(3)]
    public_lmdb.write(tmp_path / "lmdb", rows)
    words = ["prepare", str(tmp_path / "lmdb"), "--from", "self_forcing", "--model", "sprites-wan", "--device", "cpu"]
    assert cli.main([*words, "--times", "1,0.5", "-o", str(tmp_path / "pairs")]) == 0
    assert cli.main([*words, "-o", str(tmp_path / "latents")]) == 0
    capsys.readouterr()
    assert Shards(tmp_path / "pairs", "ode_pairs").header["times"] == [1.0, 0.5, 0.0]
    assert torch.equal(
        Shards(tmp_path / "latents", "latents").tensor(2, "clean"), torch.full((2, 16, 4, 4), 2.0).half()
    )
    for wrong, says in (
        (["prepare", str(tmp_path), "-o", str(tmp_path / "x")], "say with --for"),
        (["prepare", str(tmp_path / "none"), "--for", "wan", "--model", "sprites-wan"], "give it with -o"),
        (["prepare", str(tmp_path), "--for", "ursa", "--model", "sprites-wan", "-o", str(tmp_path / "x")], "is a Wan"),
        (["prepare", str(tmp_path), "--for", "wan", "--bucket", "3"], "no option --bucket"),
    ):
        assert cli.main(wrong) > 0
        assert says in capsys.readouterr().err
    size = ["--for", "wan", "--model", "sprites-wan", "-o", str(tmp_path / "x"), "--device", "cpu"]
    for option, value, says in (
        ("--frames", "10", "use 9 or 13"),
        ("--size", "60x64", "not a multiple of 16"),
        ("--size", "square", "not HEIGHTxWIDTH"),
        ("--aspects", "wide", "is no aspect"),
    ):
        assert cli.main(["prepare", str(tmp_path), *size, option, value]) == 2
        assert says in capsys.readouterr().err

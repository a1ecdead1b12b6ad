"""The benchmark's loop, and diffusers' network in it: the same numbers from the same weights, the same operations."""

from dataclasses import replace

import pytest
import torch

from kinema.bench import steps
from kinema.errors import UsageError
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.theirs import ADAPTED, DiffusersCogVideoX
from kinema.models.cogvideox.transformer import SIZES
from kinema.models.lora import LoRA, adapted
from kinema.models.ursa.transformer import URSASize
from kinema.recipes import bench
from kinema.training import budget

CPU = torch.device("cpu")


def tiny(name):
    size = replace(SIZES[name], heads=2, layers=2, head_dim=32, time_dim=16, text_dim=24, text_tokens=8, grid=(4, 4, 6))
    return CogVideoX(size)


@pytest.mark.parametrize("name", ["5B", "1.5-5B"])
def test_diffusers_network_from_the_same_seed_predicts_the_same(name):
    spec = tiny(name)
    theirs = DiffusersCogVideoX(spec)
    ours, other = spec.load(spec.build(), CPU), theirs.load(theirs.build(), CPU)
    there = dict(other.named_parameters())
    for n, (key, p) in enumerate(ours.named_parameters()):  # what starts at zero would hide the rest
        if "modulate" in key or key.startswith("proj_out"):
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(n))
            there[f"network.{spec.diffusers_name(key)}"].data.copy_(p)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 16, 4, 6, generator=generator), torch.randn(2, 8, 24, generator=generator)
    t = torch.tensor([[3.0], [900.0]])
    with torch.no_grad():
        made = ours(x, t, text=text)
        torch.testing.assert_close(other(x, t, text=text), made, atol=1e-5, rtol=1e-5)
    assert made.std() > 0.1


def test_both_networks_are_measured_by_the_same_loop_on_the_same_work(monkeypatch):
    spec = tiny("5B")
    monkeypatch.setattr(CogVideoX, "published", lambda *_, edits=(): replace(spec, edits=edits))
    rows, turns = [], []
    for network in ("kinema", "diffusers"):
        run = bench.cogvideox_lora(rank=2, frames=2, height=32, width=48, steps=2, network=network)
        planned = budget.budget(run, 1)
        rows.append(steps.measure(run, CPU, planned))
        turns += planned.turns
    unplanned = steps.measure(run, CPU, None)
    assert unplanned.keys() < rows[0].keys() and "tflop" not in unplanned
    assert rows[0].keys() == rows[1].keys() and all(0 < row["seconds"] <= row["slowest"] for row in rows)
    assert turns[0].tokens == turns[1].tokens == 2 * 2 * 3
    assert abs(turns[0].flops / turns[1].flops - 1) < 0.01
    edited = DiffusersCogVideoX(spec, edits=(LoRA(rank=2, targets=ADAPTED),)).build()
    assert len(adapted(edited)) == 8


def test_a_distillation_of_tokens_is_planned_and_then_measured():
    """Constants made without memory, for the plan, must not be taken for real ones, nor for those of the next plan."""
    size = URSASize(
        dim=32, ffn_dim=48, heads=4, kv_heads=2, layers=1, codes=12, words=20, bov=19, head_dim=16, text_len=4
    )
    run = bench.ursa_dimo(size, frames=2, height=16, width=16, steps=1, levels=(4, 3))
    planned = budget.budget(run, 1)
    assert [turn.role for turn in planned.turns] == ["student", "critic"]
    assert steps.measure(run, CPU, planned)["seconds"] > 0


def test_other_variants_of_diffusers_network_are_refused():
    with pytest.raises(UsageError, match=r"5B or 1\.5-5B"):
        DiffusersCogVideoX(CogVideoX("2B"))

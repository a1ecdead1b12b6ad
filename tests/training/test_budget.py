import contextlib
from dataclasses import replace

import pytest
import torch
from world import COGVIDEOX, Stories, game, run

from kinema.data.noise import Noise
from kinema.diffusion.schedule import ZeroSNR
from kinema.diffusion.times import Stratified
from kinema.errors import UsageError
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.lora import LoRA
from kinema.models.ttt.edit import TTT
from kinema.models.ttt.lact import LaCT
from kinema.models.wan.transformer import WanSize
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.optim import Optim
from kinema.recipes import bench, self_forcing
from kinema.run import Plan, Run
from kinema.training import budget
from kinema.training.parallel import local
from kinema.training.trainer import Trainer

WIDE = WanSize(
    dim=64, ffn_dim=512, heads=4, layers=4, in_channels=4, out_channels=4, text_dim=8, text_len=6, freq_dim=16
)


class Real(contextlib.nullcontext):
    """In the place of torch's mode of fake tensors: everything is computed."""

    def __enter__(self):
        return self

    def from_tensor(self, tensor):
        return tensor


def wide(**plan):
    """A run whose activations need more than its weights."""
    made = run(batch_size=2, micro_batch=1, data=Noise((8, 4, 16, 16), rows=6, width=8))
    student = replace(made.objective.student, spec=replace(made.objective.student.spec, size=WIDE))
    return replace(made, objective=replace(made.objective, student=student), plan=replace(made.plan, **plan))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_what_is_counted_without_memory_is_what_a_real_step_has(monkeypatch, recompute):
    planned = budget.budget(wide(recompute=recompute), 1)
    monkeypatch.setattr(budget, "FakeTensorMode", Real)
    assert planned == budget.budget(wide(recompute=recompute), 1)


def test_roles_are_counted_as_the_trainer_holds_them(tmp_path):
    trainer = Trainer(game(), tmp_path, torch.device("cpu"))
    planned = budget.budget(game(), 1)
    sizes = {name: sum(4 * p.numel() for p in a.module.parameters()) for name, a in trainer.actors.items()}
    for name, weights in sizes.items():
        learns = name != "teacher"
        role = planned.roles[name]
        assert (role.weights, role.gradients, role.moments) == (weights, weights * learns, 2 * weights * learns)
        assert role.average == weights * (name == "student")
    assert planned.checkpoint == sum(local(t).nbytes for a in trainer.actors.values() for t in a.state().values())


def test_shards_share_what_is_held_and_gather_a_block_at_a_time():
    alone, four = (budget.budget(wide(recompute="block"), n) for n in (1, 2))
    assert four.roles["student"].weights == pytest.approx(alone.roles["student"].weights / 2, rel=0.05)
    assert four.checkpoint == alone.checkpoint
    assert four.turns[0].tokens == alone.turns[0].tokens and four.turns[0].flops == alone.turns[0].flops
    assert four.held < four.peak < alone.peak


def test_recomputation_and_tensor_groups_save_memory():
    plain, saved = (budget.budget(wide(recompute=how), 1) for how in ("none", "block"))
    assert saved.peak < plain.peak and saved.turns[0].flops == plain.turns[0].flops
    split = budget.budget(wide(tensor=2), 2)
    assert split.peak < plain.peak and split.roles["student"].weights < 0.6 * plain.roles["student"].weights


def test_ranks_that_share_a_video_hold_a_part_of_it():
    role = Role(CogVideoX(COGVIDEOX, edits=(TTT(LaCT()),)), Optim())
    made = Run(Denoising(role), Stories(4, side=8), steps=1, batch_size=1)
    one, four = (budget.budget(replace(made, plan=Plan(context=n)), n) for n in (1, 4))
    assert four.peak < 0.5 * one.peak and four.held == pytest.approx(one.held / 4, rel=0.1)
    assert four.turns[0].flops == one.turns[0].flops and four.checkpoint == one.checkpoint


def test_operations_of_wan_are_those_of_its_formula():
    made = bench.wan_sft(frames=3, height=32, width=32)
    d, ffn, layers = 128, 256, 2
    spec = replace(made.objective.student.spec, size=WanSize(dim=d, ffn_dim=ffn, heads=2, layers=layers))
    student = replace(made.objective.student, spec=spec)
    turn = budget.budget(replace(made, objective=replace(made.objective, student=student)), 1).turns[0]
    tokens, rows = 3 * 2 * 2, 512
    inputs = tokens * 64 * d + rows * 4096 * d + 256 * d  # no gradient goes on to patches, texts and times
    block = tokens * (6 * d * d + 2 * d * ffn) + rows * 2 * d * d
    rest = rows * d * d + d * d + d * 6 * d + tokens * d * 64
    attention = 2 * d * tokens * (tokens + rows)  # scores and values
    assert turn.tokens == tokens
    expected = 2 * (2 * inputs + 3 * (layers * block + rest)) + 3.5 * 2 * layers * attention  # flash: 2.5 backward
    assert turn.flops == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "processes", "says"),
    [
        ({"replicate": 3}, 4, "replicate 3 × shard 1 × context 1 × tensor 1 is 3, but the job has 4 processes"),
        ({"tensor": 3}, 3, "does not divide the 4 heads of student"),
        ({"context": 2}, 2, "cannot split a video over ranks"),
        ({}, 4, "batch_size 2 is not a multiple of 1 samples a pass on 4 data-parallel ranks"),
        ({"shard": 0}, 1, "run.plan.shard is 0"),
    ],
)
def test_what_does_not_fit_together_is_said_before_weights_are_read(monkeypatch, changes, processes, says):
    monkeypatch.setattr(budget, "_fill", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match=says):
        budget.budget(wide(**changes), processes)


def test_a_card_is_said_to_fit_or_not():
    planned = budget.budget(wide(), 1)
    assert "\nfits: " in budget.table(planned, wide(), "H100")
    assert "\ndoes not fit: " in budget.table(planned, wide(), "0.0001")


def test_plans_of_different_networks_follow_each_other():
    """Tables of noise levels made without memory must not be taken for real ones, nor the reverse."""
    schedule = ZeroSNR()
    whole = schedule(torch.tensor([0.5]))
    for edits in ((), (LoRA(rank=2, alpha=1.0, base="bfloat16"),)):
        role = Role(CogVideoX(COGVIDEOX, edits=edits), Optim(lr=1e-3))
        data = Noise((3, 4, 4, 4), rows=3, width=8)
        made = budget.budget(Run(Denoising(role, times=Stratified()), data, steps=1, batch_size=1), 1)
        student, (turn,) = made.roles["student"], made.turns
        assert turn.flops > 0 and (student.learning < student.parameters / 10) == bool(edits)
    again = schedule(torch.tensor([0.5]))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_caches_of_a_rollout_are_counted():
    """Keys and values of every layer: for the frames before the last chunk, which is never cached, and for the text."""
    made = self_forcing.smoke("dmd")
    student, critic = budget.budget(made, 1).turns
    game = made.objective
    size, frames, (_, height, width) = game.student.spec.dimensions, game.frames[0], game.shape
    grid = height // size.patch[1] * (width // size.patch[2])
    assert student.tokens == made.batch_size * frames * grid
    for turn in (student, critic):
        of_frames = 2 * size.layers * made.batch_size * (frames - game.student.spec.chunk) * grid * size.dim * 4
        assert of_frames <= turn.caches <= 2 * of_frames and turn.caches < turn.peak

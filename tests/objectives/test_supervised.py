"""Objectives that learn from data (the forcings, ODE regression, consistency), and the discriminator."""

from dataclasses import replace

import pytest
import torch
from games import CPU, SIZE, Clips, LoudCausal, LoudWan

from kinema.data.batch import Batch
from kinema.diffusion.times import Below, PerChunk, Shifted, index_per_chunk, warped
from kinema.diffusion.weighting import Bell
from kinema.errors import UsageError
from kinema.models.discriminator import ClassifierBranch, Discriminator, from_release
from kinema.models.lora import LoRA
from kinema.models.weights import save
from kinema.objectives.consistency import ConsistencyDistillation
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.objectives.ode_regression import OdeRegression, regress, states_at
from kinema.objectives.reconstruction import Reconstruction
from kinema.optim import Ema, Optim
from kinema.run import Run
from kinema.seeds import keys
from kinema.training.trainer import Trainer

STEPS_AT = warped((1, 0.5), 3.0)
CAUSAL = LoudCausal(size=SIZE, seed=1, shift=3.0, chunk=2, steps_at=STEPS_AT)
TIMES = PerChunk(Shifted(3.0), chunk=2)


def opened(spec, samples=(0, 1), data=None):
    module = spec.load(spec.build(), CPU)
    batch = (data or Clips()).open(0, CPU)(list(samples), keys(0, "train", list(samples)))
    return spec.read(module), batch


OBJECTIVES = {
    "diffusion_forcing": Denoising(Role(CAUSAL, Optim(lr=1e-3)), TIMES, Bell(3.0)),
    "teacher_forcing": Denoising(Role(CAUSAL, Optim(lr=1e-3)), TIMES, Bell(3.0), Below(0.0)),
    "ode": OdeRegression(student=Role(CAUSAL, Optim(lr=1e-3), Ema(0.9))),
    "ode_image": OdeRegression(student=Role(CAUSAL, Optim(lr=1e-3)), image=True, clean_context=True),
    "consistency": ConsistencyDistillation(
        student=Role(CAUSAL, Optim(lr=1e-3)), teacher=Role(replace(CAUSAL, seed=2)), grid=8, guidance=2.0
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_trains(name, tmp_path):
    run = Run(objective=OBJECTIVES[name], data=Clips(), steps=3, batch_size=4, micro_batch=2, log_every=1)
    trainer = Trainer(run, tmp_path, CPU)
    before = {key: tensor.clone() for key, tensor in trainer._state().items() if ".model." in key}
    trainer.train()
    after = trainer._state()
    changed = [not torch.equal(before[key], after[key]) for key in before]
    assert sum(changed) > 0.9 * len(changed) and all(after[key].isfinite().all() for key in before)


def test_teacher_forcing_sees_earlier_chunks_clean_and_diffusion_forcing_does_not():
    """What the second chunk's error depends on: the first chunk's noise in diffusion forcing, its data in both."""
    student, batch = opened(CAUSAL)
    t = torch.tensor([[0.9, 0.9, 0.5, 0.5]]).expand(2, -1)

    def second(noise_of_first, context):
        noise = keys(0, "noise", [0, 1]).normal(4, 4, 4, 4)
        noise[:, :2] += noise_of_first
        x_t = student.path.mix(batch.video, noise, t)
        with torch.no_grad():
            return student(x_t, t, batch.cond, **({"clean": batch.video} if context else {}))[:, 2:]

    torch.testing.assert_close(second(0.0, True), second(3.0, True), atol=1e-6, rtol=0)
    assert (second(0.0, False) - second(3.0, False)).abs().max() > 1e-3


def test_noisy_context_is_near_the_clean_end_with_noise_of_its_own():
    objective = Denoising(Role(CAUSAL, Optim()), TIMES, context=PerChunk(Below(0.05), 2))
    student, batch = opened(CAUSAL, range(64))
    draw = batch.keys.fold("student")
    seen = objective._context(student, batch.video, draw.fold("context"))
    t = seen["clean_timestep"] / 1000
    assert t.shape == (64, 4) and 0.02 < t.mean() < 0.03 and t.max() < 0.05
    assert torch.equal(t[:, 0], t[:, 1]) and not torch.equal(t[:, 1], t[:, 2])
    left = seen["clean"] - (1 - t)[..., None, None, None] * batch.video
    noise = left / t[..., None, None, None]
    assert noise.std() == pytest.approx(1, abs=0.05)
    targets = draw.fold("noise").fold("noise").normal(4, 4, 4, 4)
    assert abs((noise * targets).mean()) < 0.02
    clean = replace(objective, context=Below(0.0))._context(student, batch.video, draw)
    assert torch.equal(clean["clean"], batch.video) and not clean["clean_timestep"].any()


def test_states_are_of_the_index_of_their_frame():
    y = torch.arange(2 * 3 * 4).view(2, 3, 4, 1, 1, 1).float()
    index = torch.tensor([[0, 0, 2, 2], [1, 1, 0, 0]])
    x, t = states_at(y, index, (1.0, 0.5, 0.0))
    assert x.flatten().tolist() == [0, 1, 10, 11, 16, 17, 14, 15]
    assert t.tolist() == [[1, 1, 0, 0], [0.5, 0.5, 1, 1]]


def test_index_is_one_for_each_chunk_and_takes_all_values():
    index = index_per_chunk(3, (1, 2, 2), keys(0, "index", range(200)))
    assert torch.equal(index[:, 1], index[:, 2]) and torch.equal(index[:, 3], index[:, 4])
    assert set(index.flatten().tolist()) == {0, 1, 2}
    assert not torch.equal(index[:, 0], index[:, 1]) and not torch.equal(index[:, 1], index[:, 3])


def test_a_student_that_knows_the_end_has_no_loss_and_clean_frames_do_not_count():
    student, batch = opened(CAUSAL)
    end = batch.trajectory[:, -1]
    knows = replace(student, backbone=lambda x, timestep, **_: (x - end) / (timestep / 1000)[..., None, None, None])
    for image in (False, True):
        loss, _ = regress(knows, batch, CAUSAL, batch.keys, image)
        assert loss < 1e-8 or image  # the clean frame divides 0 by 0 here, and is left out
    with pytest.raises(UsageError, match="trajectories of 3 states, but the data has 5"):
        opened_batch = Clips(states=5).open(0, CPU)([0], keys(0, "train", [0]))
        regress(student, opened_batch, CAUSAL, opened_batch.keys)
    with pytest.raises(UsageError, match="use OdePairs"):
        regress(student, replace(batch, trajectory=None), CAUSAL, batch.keys)


def test_consistency_is_reached_by_the_teachers_own_flow_map():
    """A teacher whose ODE goes straight to one video has that video as its flow map, which then has no loss."""
    student, batch = opened(CAUSAL)
    end = keys(0, "end", [0, 1]).normal(4, 4, 4, 4)

    def straight(x, timestep, clean=None, **_):
        return (x - end.repeat(len(x) // 2, 1, 1, 1, 1)) / (timestep / 1000)[..., None, None, None].clamp(min=1e-6)

    knows = replace(student, backbone=straight)
    objective = OBJECTIVES["consistency"]
    loss, _ = objective.loss({"student": knows, "teacher": knows}, batch, 0)
    assert loss < 1e-5
    worse, _ = objective.loss({"student": student, "teacher": knows}, batch, 0)
    assert worse > 0.1


# --- discriminator ---------------------------------------------------------------------------------------------------

TRUNK = LoudWan(size=SIZE, seed=2)
BRANCHED = Discriminator(TRUNK, ClassifierBranch((0,), classes=2, ffn_dim=16))


def test_a_discriminator_predicts_what_its_trunk_does_and_stops_after_its_last_block():
    judge, batch = opened(BRANCHED)
    trunk, _ = opened(replace(TRUNK))
    judge.backbone.load_state_dict(trunk.backbone.state_dict(), strict=False)
    t = torch.full((2, 1), 0.5)
    assert torch.equal(judge(batch.video, t, batch.cond), trunk(batch.video, t, batch.cond))
    logits = judge.logits(batch.video, t, batch.cond)
    assert logits.shape == (2, 2)
    logits.sum().backward()
    used = {name for name, p in judge.backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert "branch.tokens" in used and any(name.startswith("blocks.0.") for name in used)
    assert not any(name.startswith(("blocks.1.", "head.")) for name in used)


def test_detached_logits_move_the_branch_alone():
    judge, batch = opened(BRANCHED)
    judge.logits(batch.video, torch.full((2, 1), 0.5), batch.cond, detach=True).sum().backward()
    moved = {name for name, p in judge.backbone.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in judge.backbone.named_parameters() if name.startswith("branch.")}


def test_time_is_one_more_token():
    spec = replace(BRANCHED, branch=ClassifierBranch((0, 1), with_time=True, ffn_dim=16))
    judge, batch = opened(spec)
    assert judge.backbone.branch.hidden.in_features == 3 * SIZE.dim
    early, late = (judge.logits(batch.video, torch.full((2, 1), t), batch.cond) for t in (0.1, 0.9))
    assert not torch.equal(early, late)
    with pytest.raises(ValueError, match="one time"):
        judge.logits(batch.video, torch.full((2, 4), 0.5), batch.cond)


def test_weights_without_a_branch_get_a_new_one_and_those_with_keep_theirs(tmp_path):
    judge, _ = opened(BRANCHED)
    state = {name: tensor + 1 for name, tensor in judge.backbone.state_dict().items()}
    config = {"config.json": {"num_heads": SIZE.heads, "text_len": SIZE.text_len}}
    save(tmp_path / "whole", state.items(), config)
    save(tmp_path / "trunk", ((n, t) for n, t in state.items() if not n.startswith("branch.")), config)
    for folder, wanted in (("whole", state), ("trunk", judge.backbone.state_dict())):
        spec = replace(BRANCHED, trunk=replace(TRUNK, weights=str(tmp_path / folder)))
        module = spec.load(spec.build(), CPU)
        assert torch.equal(module.branch.tokens, wanted["branch.tokens"])
        assert torch.equal(module.blocks[1].ffn[0].weight, state["blocks.1.ffn.0.weight"])
    tokens = judge.backbone.branch.tokens
    assert 0.005 < tokens.std() < 0.04  # N(0, 0.02)


def test_released_names_of_a_branch_are_renamed():
    names = {
        "_register_tokens.register_tokens": "branch.tokens",
        "_gan_ca_blocks.2.cross_attn.q.weight": "branch.readers.2.cross_attn.q.weight",
        "_cls_pred_branch.3.bias": "branch.logits.bias",
        "head.head.bias": "head.head.bias",
    }
    renamed = [name for name, _ in from_release((name, torch.zeros(1)) for name in names)]
    assert renamed == list(names.values())


def test_branch_beyond_the_trunk_is_refused():
    with pytest.raises(UsageError, match="below 2"):
        replace(BRANCHED, branch=ClassifierBranch((0, 2))).build()
    with pytest.raises(UsageError, match="increasing"):
        ClassifierBranch((1, 0))


def test_a_discriminator_has_no_adapters():
    with pytest.raises(UsageError, match="without edits"):
        replace(BRANCHED, trunk=replace(TRUNK, edits=(LoRA(rank=2),)))


class _Mirror:
    """An autoencoder whose latents are the pixels times `loudness`, without a variance; it keeps what it decodes."""

    def __init__(self, loudness):
        self.loudness, self.seen = loudness, None

    def latent_shape(self, *_):
        return None

    def posterior(self, video):
        return video * self.loudness, torch.full_like(video, -60.0)

    def reconstruct(self, z):
        self.seen = z
        return z / self.loudness


def test_an_autoencoder_cannot_escape_noise_in_its_latents_by_making_them_louder():
    samples = list(range(16))
    video = torch.randn(16, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 5]).view(
        3, 1, 1
    )
    batch = Batch(video, keys(0, "train", samples))
    found = []
    for loudness in (1.0, 10.0):
        mirror = _Mirror(loudness)
        Reconstruction(Role(None), noise=0.5).loss({"student": mirror}, batch, 0)
        noise = mirror.seen / loudness - video
        found.append(noise)
        strength = noise.std((1, 3, 4)) / video.std((0, 1, 3, 4))  # of each clip and channel
        assert (strength.max(1).values / strength.min(1).values < 1.4).all() and strength.max() < 0.6
        assert strength.mean(1).max() > 0.35 and strength.mean(1).min() < 0.15, "each clip has a strength of its own"
    assert torch.allclose(*found, atol=1e-4)
    quiet = _Mirror(1.0)
    Reconstruction(Role(None)).loss({"student": quiet}, batch, 0)
    assert torch.allclose(quiet.seen, video, atol=1e-6)

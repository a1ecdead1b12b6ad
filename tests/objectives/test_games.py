"""Games on rollouts: identities of their losses, who moves in whose turn, and that a known distribution is reached."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from games import (
    CPU,
    MODES,
    SHARES,
    SIZE,
    Clips,
    Judged,
    LoudCausal,
    LoudWan,
    NoMemory,
    Points,
    TwoModes,
    far,
    share_of_first,
)

from kinema.data.batch import Batch
from kinema.diffusion.chunks import Chunks
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.rollout import Recompute, rollout
from kinema.diffusion.times import warped
from kinema.errors import UsageError
from kinema.models.discriminator import ClassifierBranch, Discriminator
from kinema.models.ursa.codec import FSQTraining
from kinema.models.ursa.tokenizer import FSQSize
from kinema.objectives import distribution_matching, dmd, gan, sid
from kinema.objectives.denoising import Denoising
from kinema.objectives.dmd import DMD, ScoreDifference
from kinema.objectives.gan import GAN, Adversarial
from kinema.objectives.objective import Role
from kinema.objectives.ode_regression import Anchor
from kinema.objectives.sid import SiD
from kinema.optim import Ema, Optim
from kinema.run import Run
from kinema.seeds import keys
from kinema.training.trainer import Trainer

STEPS_AT = warped((1, 0.5), 3.0)
CAUSAL = LoudCausal(size=SIZE, seed=1, shift=3.0, chunk=2, steps_at=STEPS_AT)
WAN = LoudWan(size=SIZE, seed=2, shift=3.0)
BRANCHED = Discriminator(replace(WAN, seed=3), ClassifierBranch((0, 1), ffn_dim=16))
SMALL = {"shape": (4, 4, 4), "frames": (4, 4), "scored": 4, "student_every": 2}


def game(kind, **changes):
    learns = Optim(lr=1e-3, betas=(0.0, 0.999), weight_decay=0.0)
    roles = {"student": Role(CAUSAL, learns, Ema(0.9)), "critic": Role(replace(WAN, seed=3), learns)}
    if kind is not GAN:
        roles["teacher"] = Role(WAN)
    if kind is GAN or any(isinstance(term, Adversarial) for term in changes.get("also", ())):
        roles["critic"] = Role(BRANCHED, learns)
    return kind(**{**roles, **SMALL, **({"guidance": 2.0} if kind is not GAN else {}), **changes})


def run(objective, **changes):
    given = {"data": Clips(), "steps": 4, "batch_size": 2, "log_every": 1, "save_every": 100}
    return Run(objective=objective, **given | changes)


def weights(trainer, role):
    return {name: p.detach().clone() for name, p in trainer.actors[role].module.named_parameters()}


def moved(trainer, role, before):
    return {name for name, p in trainer.actors[role].module.named_parameters() if not torch.equal(p, before[name])}


def opened(objective, data=None, seed=0, samples=(0, 1), folder=None):
    """A cast of fresh networks and the first batch, without a trainer."""
    cast = {}
    for name, role in objective.roles().items():
        module = role.spec.load(role.spec.build(), CPU)
        cast[name] = role.spec.read(module.requires_grad_(role.optim is not None))
    return cast, (data or Clips()).open(seed, CPU)(list(samples), keys(seed, "train", list(samples)))


# --- identities ------------------------------------------------------------------------------------------------------


def normal(*shape, name="x"):
    return keys(0, name, range(shape[0])).normal(*shape[1:])


def test_gradient_of_the_dmd_loss_is_its_direction_over_the_numbers():
    x = normal(2, 4, 3, 2, 2).requires_grad_()
    d, lost = dmd.direction(x.detach(), normal(2, 4, 3, 2, 2, name="real"), normal(2, 4, 3, 2, 2, name="fake"))
    distribution_matching.surrogate(x, d).backward()
    torch.testing.assert_close(x.grad, d / x.numel())
    assert lost == 0


def test_direction_is_normalised_for_each_sample_alone():
    x, real, fake = (normal(3, 2, 4, 2, 2, name=name) for name in ("x", "real", "fake"))
    together, _ = dmd.direction(x, real, fake)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], dmd.direction(*(v[i : i + 1] for v in (x, real, fake)))[0])


def test_directions_that_are_not_finite_are_zero_and_counted():
    x, real, fake = (normal(2, 2, 4, 2, 2, name=name) for name in ("x", "real", "fake"))
    real[0], fake[1, 0] = x[0], torch.nan  # 0 / 0 and a broken network
    fake[0] = x[0]
    d, lost = dmd.direction(x, real, fake)
    assert not d[0].any() and not d[1, 0].any() and d[1, 1].all()
    assert lost == 0.75


def test_sid_with_alpha_one_is_the_product_of_two_differences():
    x, real, fake = (normal(2, 2, 4, 2, 2, name=name) for name in ("x", "real", "fake"))
    scale = (x - real).abs().flatten(1).mean(1).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(sid.identity(x, real, fake, 1.0), (real - fake) * (fake - x) / scale)


def test_exchanging_real_and_fake_in_the_relativistic_critic_gives_the_students_loss():
    fake, real = normal(5, 1, name="fake"), normal(5, 1, name="real")
    assert gan.discriminator_loss(real, fake, True) == gan.generator_loss(fake, real)


def test_steepness_of_a_plane_is_its_mean_squared_slope():
    slope, x = normal(1, 12)[0], normal(4, 12, name="points")
    noise = normal(20000, 12, name="noise")
    here = x[:1] @ slope
    measured = gan.steepness(here, (x[:1] + 0.01 * noise) @ slope, 0.01)
    torch.testing.assert_close(measured, slope.square().sum(), rtol=0.05, atol=0)
    assert gan.steepness(here, here, 0.01) == 0


def test_a_perfect_critic_has_no_loss_even_close_to_the_data():
    video = normal(2, 4, 4, 4, 4)

    def knows(x_t, timestep, **_):
        t = (timestep / 1000).view(2, 1, 1, 1, 1)
        return ((x_t - video) / t).bfloat16()  # the output of a network that computes in bfloat16

    critic = replace(WAN.read(WAN.build()), backbone=knows)
    t = torch.full((2, 1), 0.02)
    draw = keys(0, "critic", range(2))
    sample = distribution_matching.Sample(video, 0, t, draw.fold("noise").normal(4, 4, 4, 4), Batch(video, draw), draw)
    loss, _ = distribution_matching.follow({"critic": critic}, sample)
    assert loss < 1e-4


# --- where the student is looked at ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exit_step, interval", [(0, (0.5, 1.0)), (1, (0.0, 0.5)), (None, (0.0, 1.0))])
def test_times_lie_between_the_steps_around_the_exit(exit_step, interval):
    objective = game(DMD, floor_at_exit=True, cap_at_exit=True)
    low, high = objective._interval(exit_step)
    assert (low, high) == pytest.approx(interval)
    video = normal(64, 4, 4, 4, 4)
    batch = Batch(video, keys(0, "train", range(64)))
    t = objective.look(video, 0, exit_step, batch, batch.keys, 3.0).t
    ends = [min(max(3 * u / (1 + 2 * u), 0.02), 0.98) for u in interval]
    assert t.min() >= ends[0] - 1e-6 and t.max() <= ends[1] + 1e-6 and t.shape == (64, 1)


def test_exit_and_length_are_alike_on_all_ranks_and_differ_between_micro_batches():
    objective = game(DMD)
    cast, _ = opened(objective)
    words = {}
    for rank in (0, 1):
        for micro in range(8):
            places = [16 * rank + 2 * micro, 16 * rank + 2 * micro + 1]
            samples = [32 * 5 + place for place in places]
            k = keys(0, "train", samples, places, 32)
            batch = replace(Clips().open(0, CPU)(samples, k), micro=micro)
            with torch.no_grad():
                words[rank, micro] = objective.make(cast, batch, k.fold("student"))[2]
    assert [words[0, m] for m in range(8)] == [words[1, m] for m in range(8)]
    assert len({words[0, m] for m in range(8)}) == 2


def test_noise_of_two_ranks_differs():
    objective = game(DMD)
    cast, _ = opened(objective)
    videos = []
    for samples in ([0, 1], [2, 3]):
        with torch.no_grad():
            batch = Clips().open(0, CPU)(samples, keys(0, "train", samples, samples, 4))
            videos.append(objective.make(cast, batch, batch.keys.fold("student"))[0])
    assert (videos[0] - videos[1]).abs().mean() > 0.1


# --- who moves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DMD, SiD, GAN])
def test_only_the_role_whose_turn_it_is_moves(kind, tmp_path):
    trainer = Trainer(run(game(kind)), tmp_path, CPU)
    before = {role: weights(trainer, role) for role in trainer.actors}
    student, critic = trainer.run.objective.turns()
    trainer.take(student)
    assert moved(trainer, "student", before["student"]) and not moved(trainer, "critic", before["critic"])
    assert all(p.grad is None for p in trainer.actors["critic"].module.parameters())
    between = weights(trainer, "student")
    trainer.take(critic)
    assert moved(trainer, "critic", before["critic"]) and not moved(trainer, "student", between)
    if kind is not GAN:
        assert not moved(trainer, "teacher", before["teacher"])


@pytest.mark.parametrize(
    "objective",
    [
        game(DMD),
        game(SiD),
        game(GAN, relativistic=True, r1=0.1, r2=0.1),
        game(DMD, on_data=True),
        game(DMD, share_rollout=True, exit="per_chunk", context_noise=0.1),
        game(DMD, also=(Adversarial(g_weight=0.1), Anchor(student=CAUSAL, weight=0.5))),
        replace(game(GAN), teacher=Role(WAN), also=(ScoreDifference(guidance=2.0),)),
    ],
    ids=["dmd", "sid", "gan", "on_data", "shared", "dmd_gan_anchor", "gan_dmd"],
)
def test_every_objective_trains(objective, tmp_path):
    trainer = Trainer(run(objective, steps=3), tmp_path, CPU)
    before = {role: weights(trainer, role) for role in ("student", "critic")}
    trainer.train()
    for role in before:
        unmoved = set(before[role]) - moved(trainer, role, before[role])
        assert unmoved <= ({"head.head.bias"} if role == "student" else set(before[role])), (role, unmoved)
        assert all(p.isfinite().all() for p in trainer.actors[role].module.parameters())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["skipped"] == 0 for row in rows)


@pytest.mark.parametrize("at_once", [2, 5, 8])
@pytest.mark.parametrize("exit", ["shared", "per_chunk"])
def test_gradients_at_once_are_those_of_each_chunk_for_itself(at_once, exit):
    found = []
    for way in (0, at_once):
        objective = game(DMD, exit=exit, frames=(8, 8), scored=8, graded_at_once=way)
        cast, batch = opened(objective)
        loss, _ = objective.turns()[0].loss(cast, batch, 0)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in cast["student"].backbone.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [DMD, GAN])
def test_resume_equals_straight_run(kind, tmp_path):
    def state(folder, **changes):
        trainer = Trainer(run(game(kind, share_rollout=True), steps=5, **changes), folder, CPU)
        trainer.train()
        return trainer._state()

    straight = state(tmp_path / "straight")
    killed = Trainer(run(game(kind, share_rollout=True), steps=5), tmp_path / "killed", CPU)
    for _ in range(4):
        for turn in killed.run.objective.turns():
            if turn.due(killed.step):
                killed.take(turn)
        killed.step += 1
        if killed.step == 3:
            killed.save()
    killed.checkpoints.wait()  # a real kill would end its writer, which else tidies up behind the next one
    resumed = state(tmp_path / "killed")
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("kind", [DMD, SiD, GAN])
def test_gradient_of_two_is_the_mean_of_those_of_one(kind):
    objective = game(kind, exit="last", **({"r1": 0.1, "relativistic": True} if kind is GAN else {}))

    def gradients(samples):
        total = {}
        cast, batch = opened(objective, samples=samples)
        for turn in objective.turns():
            module = cast[turn.role].backbone.requires_grad_(True)
            turn.loss(cast, batch, 0)[0].backward()
            total |= {(turn.role, name): p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            module.zero_grad()
        return total

    both, one, other = gradients([0, 1]), gradients([0]), gradients([1])
    for name in both:
        torch.testing.assert_close(both[name], (one[name] + other[name]) / 2, atol=2e-5, rtol=1e-3)


def test_the_critic_of_a_shared_rollout_sees_the_students_video():
    objective = game(DMD, share_rollout=True)
    cast, batch = opened(objective)
    student, critic = objective.turns()
    student.loss(cast, batch, 0)
    loss, _ = critic.loss(cast, batch, 0)
    with torch.no_grad():
        video, skip, exit_step = objective.make(cast, batch, batch.keys.fold("student"))
    sample = objective.look(video, skip, exit_step, batch, batch.keys.fold("critic").fold("look"), 3.0)
    torch.testing.assert_close(loss, objective.critic_loss(cast, sample)[0])
    again, _ = critic.loss(cast, batch, 1)  # nothing is kept for another step
    assert not torch.equal(again, loss)


def test_terms_add_up():
    anchor = Anchor(student=CAUSAL, weight=0.5)
    plain, mixed = game(DMD), game(DMD, also=(anchor,))
    cast, batch = opened(plain)
    alone, _ = plain.turns()[0].loss(cast, batch, 0)
    both, metrics = mixed.turns()[0].loss(cast, batch, 0)
    torch.testing.assert_close(both, alone + 0.5 * metrics["anchor"])


def test_branch_warm_up_moves_exactly_the_branch_and_then_starts_anew(tmp_path):
    objective = game(GAN, branch_warmup=2)
    trainer = Trainer(run(objective, steps=3), tmp_path, CPU)
    before = {role: weights(trainer, role) for role in trainer.actors}
    due = [[turn.role for turn in objective.turns() if turn.due(step)] for step in range(5)]
    assert due == [["critic"], ["critic"], ["student", "critic"], ["critic"], ["student", "critic"]]
    for _ in range(2):
        for turn in objective.turns():
            if turn.due(trainer.step):
                trainer.take(turn)
        trainer.step += 1
    branch = {name for name in before["critic"] if name.startswith("branch.")}
    assert moved(trainer, "critic", before["critic"]) == branch and not moved(trainer, "student", before["student"])
    assert trainer.actors["critic"].optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    for turn in objective.turns():
        if turn.due(trainer.step):
            trainer.take(turn)
    actor = trainer.actors["critic"]
    steps = {float(actor.optimizer.state[p]["step"]) for p in actor.module.parameters() if p in actor.optimizer.state}
    assert steps <= {0.0, 1.0} and actor.optimizer.param_groups[0]["betas"] == (0.0, 0.999)


def test_long_rollouts_score_the_last_frames_behind_an_image(tmp_path):
    from kinema.models.wan.vae import WanVAE

    size = replace(SIZE, in_channels=16, out_channels=16)
    objective = game(
        DMD,
        frames=(4, 8),
        shape=(16, 2, 2),
        codec=WanVAE("sprites-wan"),
        student=Role(replace(CAUSAL, size=size), Optim()),
    )
    cast, _ = opened(replace(objective, critic=Role(replace(WAN, size=size)), teacher=Role(replace(WAN, size=size))))
    lengths = set()
    for step in range(12):
        samples = [2 * step, 2 * step + 1]
        batch = Clips().open(0, CPU)(samples, keys(0, "train", samples))
        video, skip, _ = objective.make(cast, batch, batch.keys.fold("student"))
        assert video.shape[1] == 4 and skip in (0, 2)
        (gradient,) = torch.autograd.grad(video.sum(), cast["student"].backbone.head.head.bias)
        assert gradient.any()
        lengths.add(skip)
    assert lengths == {0, 2}  # 4 frames are scored whole; of longer rollouts the image's chunk is not


def test_rollouts_may_see_contexts_that_begin_with_an_image():
    from kinema.models.wan.vae import WanVAE

    size = replace(SIZE, in_channels=16, out_channels=16)
    plain = game(
        DMD,
        frames=(8, 8),
        scored=8,
        shape=(16, 2, 2),
        context=Recompute(2),
        student=Role(replace(CAUSAL, size=size), Optim()),
        critic=Role(replace(WAN, size=size)),
        teacher=Role(replace(WAN, size=size)),
    )
    imaged = {"context": Recompute(2, image_first=True)}
    with pytest.raises(UsageError, match="needs a codec that makes it; set codec"):
        replace(plain, **imaged)
    cast, _ = opened(plain)
    batch = Clips().open(0, CPU)([0, 1], keys(0, "train", [0, 1]))
    draw = batch.keys.fold("student")
    without, with_image = (
        objective.make(cast, batch, draw)[0]
        for objective in (plain, replace(plain, codec=WanVAE("sprites-wan"), **imaged))
    )
    assert torch.equal(with_image[:, :4], without[:, :4])  # until then the video's own first frame is there
    assert not torch.allclose(with_image[:, 4:], without[:, 4:], atol=1e-4)
    (gradient,) = torch.autograd.grad(with_image[:, 4:].sum(), cast["student"].backbone.head.head.bias)
    assert gradient.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher": Role(replace(WAN, shift=5.0))}, "different shifts"),
        ({"frames": (5, 5)}, "5 frames"),
        ({"scored": 6}, "score at most 4"),
        ({"frames": (4, 8)}, "need a codec"),
        ({"also": (Adversarial(),)}, "classifier branch"),
        ({"student_every": 0}, "student_every is 0"),
        ({"graded_at_once": 1}, "1, less than the 2 frames of a chunk; use so many or more, or 0"),
        ({"graded_at_once": 2, "context": Recompute(2)}, "keeps nothing to grade later; set graded_at_once to 0"),
        ({"student": Role(WAN, Optim())}, "the student is a LoudWan, which has no chunks; give the student a causal"),
        ({"teacher": Role(FSQTraining(FSQSize()))}, "the teacher is a FSQTraining, which has no shift"),
    ],
)
def test_casts_that_cannot_play_are_refused(changes, message):
    plain = game(DMD)
    with pytest.raises((UsageError, ValueError), match=message):
        replace(plain, **changes)


def test_a_gan_without_videos_is_refused():
    objective = game(GAN)
    cast, batch = opened(objective)
    with pytest.raises(UsageError, match="use Latents"):
        objective.turns()[0].loss(cast, replace(batch, video=torch.zeros(2, 0)), 0)[0]
        objective.turns()[1].loss(cast, replace(batch, video=torch.zeros(2, 0)), 0)


# --- what is reached -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A denoiser of points with equal shares, from which student and critic start."""
    folder = tmp_path_factory.mktemp("started")
    role = Role(Points(), Optim(lr=5e-3, anneal=300))
    made = Run(objective=Denoising(role), data=TwoModes(share=0.5), steps=300, batch_size=256, log_every=300)
    Trainer(made, folder, CPU).train()
    return str(folder)


def points_of(spec, module, n=4000):
    draw = keys(9, "test", range(n))
    noise = draw.fold("noise").normal(1, 2, 1, 1)
    denoise = partial(spec.read(module), cond={})
    with torch.no_grad():
        made = rollout(denoise, GaussianPath(), noise, spec.steps_at, NoMemory(), Chunks(1), draw.fold("rollout"))
        return torch.cat(list(made), dim=1)


@pytest.mark.parametrize("kind", [DMD, SiD, GAN])
def test_a_known_distribution_of_two_modes_is_matched(kind, started, tmp_path):
    slow = {"betas": (0.0, 0.999), "weight_decay": 0.0}
    roles = {
        "student": Role(Points(), Optim(lr=1.5e-3, anneal=500, **slow), Ema(0.98)),
        "critic": Role(Points(), Optim(lr=6e-3, **slow)),
        "teacher": Role(Points(known=True)),
    }
    own = {"guidance": 1.0}
    if kind is GAN:
        roles = {"student": roles["student"], "critic": Role(Judged(), Optim(lr=6e-3, **slow))}
        own = {"g_weight": 1.0, "d_weight": 1.0, "r1": 0.05, "r2": 0.05}
    objective = kind(**roles, shape=(2, 1, 1), frames=(1, 1), scored=1, student_every=1, **own)
    start = {"init_from": started, "init_roles": {} if kind is GAN else {"critic": "student"}}
    made = Run(objective=objective, data=TwoModes(), steps=500, batch_size=128, log_every=100, **start)
    trainer = Trainer(made, tmp_path, CPU)
    actor = trainer.actors["student"]
    before = points_of(actor.role.spec, actor.module)
    trainer.train()
    after = points_of(actor.role.spec, actor.average.module)
    assert abs(share_of_first(before) - SHARES[0]) > 0.15  # it starts elsewhere
    assert abs(share_of_first(after) - SHARES[0]) < 0.1
    spread = torch.stack([after.flatten(1).std(0), before.flatten(1).std(0)])
    mean = (SHARES[:, None] * MODES).sum(0)
    real = ((SHARES[:, None] * (MODES - mean) ** 2).sum(0) + 0.3**2).sqrt()
    assert ((spread[0] - real).abs() < 0.25).all() and ((spread[1] - real).abs() > 0.25).any()
    assert far(after) < 0.2

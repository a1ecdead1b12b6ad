"""Di[M]O: its directions are gradients of divergences, reach the student alone, and never need all logits at once."""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kinema import seeds
from kinema.data.batch import Batch
from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.guidance import Above, guided
from kinema.diffusion.times import NearData, Shifted
from kinema.diffusion.token_path import MetricPath, MixturePath, Start
from kinema.diffusion.token_sampling import Jumps
from kinema.errors import UsageError, UserError
from kinema.models.ursa.transformer import URSASize, URSATransformer, initial_weights
from kinema.objectives.denoising import Denoising
from kinema.objectives.dimo import Dimo, Frames, Mixed, flattening, jeffrey, mix
from kinema.objectives.reinforce import Reinforce, advantages, score

sys.path.append(str(Path(__file__).parents[1] / "diffusion"))
from heads import Largest

K, SHAPE = 24, (2, 2, 3)
SIZE = URSASize(
    dim=32, ffn_dim=48, heads=2, kv_heads=1, layers=1, codes=K, words=20, bov=19, head_dim=16, theta=100.0, text_len=4
)
NOBODY = (None, None, None)
METRIC = MetricPath(torch.randn(K, 5, generator=torch.Generator().manual_seed(0)), 0.9, 3.0)
PATHS = {"metric": METRIC, "uniform": MixturePath(K), "masked": MixturePath(K, "mask")}


def network(seed: int, size: URSASize = SIZE, spread: float = 8.0) -> URSATransformer:
    """Random weights whose logits differ between networks."""
    module = URSATransformer(size)
    module.load_state_dict({name: p * (spread if p.ndim > 1 else 1) for name, p in initial_weights(module, seed)})
    return module


def cast_of(path=METRIC, start: Start | None = None, same: bool = False) -> dict[str, Any]:
    size = replace(SIZE, masked=isinstance(path, MixturePath) and path.noise == "mask")
    modules = {name: network(0 if same else i, size) for i, name in enumerate(("student", "teacher", "critic"))}
    modules["teacher"].requires_grad_(False).eval()
    cast = {name: TokenDenoiser(m, m.lm_head, path, start or Start()) for name, m in modules.items()}
    return {**cast, "memory": dimo().memory()}


def batch(count: int = 3, first: int = 0) -> Batch:
    keys = seeds.keys(0, "batch", range(first, first + count))
    text = {name: {"text": keys.fold(name).integers(20, 4)} for name in ("cond", "uncond")}
    return Batch(keys.fold("video").integers(K, *SHAPE), keys, text["cond"], text["uncond"])


def dimo(**changes) -> Dimo:
    return Dimo(*NOBODY, **{"first": Shifted(3.0), "then": Shifted(1.0)} | changes)  # type: ignore[arg-type]


def reinforce(**changes) -> Reinforce:
    return Reinforce(*NOBODY, **{"first": Shifted(3.0), "then": Shifted(1.0)} | changes)  # type: ignore[arg-type]


def gradients(denoiser: TokenDenoiser) -> list:
    return [p.grad for p in denoiser.backbone.parameters()]


def rows(name: str, count: int = 9) -> torch.Tensor:
    return 2 * seeds.keys(0, name, range(count)).normal(K).double()


@pytest.mark.parametrize("reverse", [0.0, 0.5, 1.0, -0.2])
def test_the_direction_is_the_gradient_of_the_mixed_divergence_in_the_critics_logits(reverse):
    teacher, critic = rows("teacher"), rows("critic").requires_grad_()
    log_t, log_a = teacher.log_softmax(-1), critic.log_softmax(-1)
    forward = (log_t.exp() * (log_t - log_a)).sum(-1)
    backward = (log_a.exp() * (log_a - log_t)).sum(-1)
    wanted = torch.autograd.grad(((1 - reverse) * forward + reverse * backward).sum(), critic)[0]
    g, kl, kl_reverse = jeffrey(teacher, critic.detach(), reverse)
    torch.testing.assert_close(g, wanted)
    torch.testing.assert_close(kl, forward.detach())
    torch.testing.assert_close(kl_reverse, backward.detach())
    assert g.sum(-1).abs().max() < 1e-12
    assert jeffrey(teacher, teacher, reverse)[0].abs().max() < 1e-15


def test_flattening_is_minus_the_gradient_of_entropy():
    z = rows("z").requires_grad_()
    p = z.softmax(-1)
    wanted = torch.autograd.grad((p * p.log()).sum(), z)[0]
    torch.testing.assert_close(flattening(z.detach()), wanted)


def test_the_score_is_the_gradient_of_the_draws_likelihood():
    z = rows("z").requires_grad_()
    codes = [seeds.keys(0, f"code{g}", range(9)).integers(K) for g in range(4)]
    gains = [seeds.keys(0, f"gain{g}", range(9)).normal().double() for g in range(4)]
    loss = -sum(
        (gain * z.log_softmax(-1)[torch.arange(9), code]).sum() for code, gain in zip(codes, gains, strict=True)
    )
    wanted = torch.autograd.grad(loss / 4, z)[0]
    torch.testing.assert_close(score(z.detach(), codes, gains), wanted)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reverse": 0.3, "reduction": "mean"},
        {"guidance": 1.0, "count": "changed"},
        {"count": "noise", "entropy": 0.05},
        {"kd": 0.7},
    ],
    ids=str,
)
def test_a_student_turn_is_that_of_whole_tensors(name, options):
    """The same gradients as from logits of all tokens at once, formed by autograd."""
    objective, cast, twin, b = dimo(**options), cast_of(PATHS[name]), cast_of(PATHS[name]), batch()
    small = {role: Chunked(d.backbone, d.head, d.path, d.start) for role, d in cast.items() if role != "memory"}
    small["memory"] = cast["memory"]
    loss, metrics = objective.student_loss(small, b, 0)
    loss.backward()

    draws, path = b.keys.fold("student"), PATHS[name]
    x, _ = twin["student"].begin((3, *SHAPE), draws.fold("start"))
    hidden = twin["student"].backbone(x, **b.cond)
    z = hidden @ twin["student"].head.weight.T
    logits = twin["student"](x, torch.ones(3, 1), b.cond)
    u = draws.fold("sample").uniform(*SHAPE)
    cdf = z.detach().softmax(-1).cumsum(-1)
    tokens = (cdf <= u[..., None] * cdf[..., -1:]).sum(-1)
    t = Shifted(3.0).sample(path, 2, draws.fold("time"))
    x_t = path.corrupt(tokens, t, draws.fold("noise"))
    with torch.no_grad():
        scale = 1.0 if objective.guidance == 1 else Above(objective.guidance, 0.1)
        teacher = guided(twin["teacher"], b.cond, b.uncond, scale)(x_t, t).whole()
        critic = twin["critic"](x_t, t, b.cond).whole()
    g = jeffrey(teacher, critic, objective.reverse)[0] if objective.reverse == 0 else None
    if g is None:
        g = jeffrey(teacher.flatten(0, 3), critic.flatten(0, 3), objective.reverse)[0].view(teacher.shape)
    n = math.prod(SHAPE)
    weight = torch.ones(x.shape)
    if objective.count == "changed":
        weight = (x_t != tokens).float()
    if objective.count == "noise":
        weight = 1 - path.likelihood(x_t, tokens, t)
    if name == "masked":
        weight = weight * (x_t == K)
    g = g * weight[..., None] / (1 if objective.reduction == "sum" else n)
    wanted = (z * g).sum() / 3
    if objective.entropy:
        p = z.softmax(-1)
        wanted = wanted + objective.entropy * (p * p.log()).sum(-1).mean()
    if objective.kd:
        again = twin["student"].backbone(x_t, **b.cond) @ twin["student"].head.weight.T
        wanted = (
            wanted
            + objective.kd
            * F.kl_div(again.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
        )
    wanted.backward()
    assert torch.equal(tokens, objective.sample(cast["student"], b, draws, None)[1].tokens)
    torch.testing.assert_close(logits.whole(), z.detach())
    for ours, theirs in zip(gradients(cast["student"]), gradients(twin["student"]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-4)
    assert {"kl", "jeffreys", "entropy", "not_finite"} <= metrics.keys() and metrics["not_finite"] == 0


class Chunked(TokenDenoiser):
    """Logits of few rows at a time."""

    def __call__(self, *args, **extra):
        return replace(super().__call__(*args, **extra), rows=5)


@pytest.mark.parametrize("make", [dimo, reinforce])
def test_turns_move_only_their_role(make):
    objective, cast, b = make(), cast_of(), batch()
    before = {
        name: {k: v.clone() for k, v in d.backbone.state_dict().items()} for name, d in cast.items() if name != "memory"
    }
    (student, critic) = objective.turns()
    student.loss(cast, b, 0)[0].backward()
    assert all(g is None for g in gradients(cast["critic"])) and all(g is None for g in gradients(cast["teacher"]))
    assert any(g is not None and g.abs().sum() > 0 for g in gradients(cast["student"]))
    cast["student"].backbone.zero_grad(set_to_none=True)
    critic.loss(cast, b, 0)[0].backward()
    assert all(g is None for g in gradients(cast["student"])) and all(g is None for g in gradients(cast["teacher"]))
    assert any(g is not None and g.abs().sum() > 0 for g in gradients(cast["critic"]))
    for name, weights in before.items():
        assert all(torch.equal(weights[k], v) for k, v in cast[name].backbone.state_dict().items())


def test_the_students_turns_begin_when_the_critic_has_learned():
    student, critic = dimo(critic_first=5, student_every=2).turns()
    assert [step for step in range(10) if student.due(step)] == [5, 7, 9] and critic.due(0)
    assert [student.number(step) for step in (5, 7, 9)] == [0, 1, 2]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_critic_that_equals_the_teacher_leaves_the_unguided_direction_nothing(guidance):
    """The literal recipe fits the critic to the teacher: then there is no signal, but for what guidance adds."""
    cast = cast_of(same=True)
    dimo(guidance=guidance).student_loss(cast, batch(), 0)[0].backward()
    norm = sum(g.square().sum() for g in gradients(cast["student"]) if g is not None).sqrt()
    assert (norm < 1e-5) == (guidance == 1)


def test_a_critic_of_the_students_draws_gives_the_direction_a_signal():
    cast = cast_of(same=True)
    optimizer = torch.optim.Adam(cast["critic"].backbone.parameters(), 1e-3)
    objective = dimo(guidance=1.0)
    for step in range(30):
        optimizer.zero_grad()
        objective.critic_loss(cast, batch(8, 8 * step), step)[0].backward()
        optimizer.step()
    objective.student_loss(cast, batch(), 0)[0].backward()
    assert sum(g.square().sum() for g in gradients(cast["student"]) if g is not None).sqrt() > 0.05


def test_tokens_that_are_not_finite_are_left_out_and_counted():
    cast = cast_of()
    hidden = cast["critic"].backbone

    def broken(x, timestep=None, **cond):
        rows = hidden(x, timestep, **cond).clone()
        rows[0, 0, 0, 0] = torch.nan
        return rows

    b = batch()
    loss, metrics = dimo().student_loss({**cast, "critic": replace(cast["critic"], backbone=broken)}, b, 0)
    loss.backward()
    assert metrics["not_finite"] * b.video.numel() == pytest.approx(1) and loss.isfinite()
    assert all(g is None or g.isfinite().all() for g in gradients(cast["student"]))


def test_three_broken_steps_in_a_row_end_a_run():
    """Broken, whole, then broken four times; the second micro-batch of a step is not another step."""
    cast, objective, told = cast_of(), dimo(), []
    whole = cast["critic"]
    broken = replace(whole, backbone=lambda *x, **cond: torch.nan * whole.backbone(*x, **cond))
    for step, bad in enumerate((True, False, True, True, True, True)):
        for micro in range(2):
            made = replace(batch(), micro=micro)
            objective.student_loss({**cast, "critic": broken if bad and not micro else whole}, made, step)
        try:
            objective.watch({name: float(x) for name, x in cast["memory"].items()}, step, seed=7)
            told.append("")
        except UserError as error:
            told.append(str(error))
    assert [bool(said) for said in told] == [False, False, False, False, True, True]
    assert told[4].startswith("3 steps in a row, up to step 4 (seed 7)")


@pytest.mark.parametrize("make", [dimo, reinforce])
def test_a_shared_draft_is_what_the_student_drew(make):
    """The critic's loss is that on the student's tokens, and one pass of the student is not made."""
    objective, cast, b = make(share_draft=True), cast_of(), batch()
    passes, own = [], cast["student"].backbone
    cast["student"] = replace(cast["student"], backbone=lambda *x, **cond: (passes.append(1), own(*x, **cond))[1])
    student, critic = objective.turns()
    student.loss(cast, b, 0)
    drawn = objective.sample(cast["student"], b, b.keys.fold("student"), None)[1].tokens
    passes.clear()
    loss = critic.loss(cast, b, 0)[0]
    assert not passes
    draws = b.keys.fold("critic")
    t = objective.times_at(0).sample(METRIC, SHAPE[0], draws.fold("time"))
    x_t = METRIC.corrupt(drawn, t, draws.fold("noise"))
    torch.testing.assert_close(loss, cast["critic"].error(x_t, drawn, t, b.cond).mean())
    assert not torch.equal(critic.loss(cast, b, 0)[0], loss) and passes  # drawn anew where nothing was left


def test_prompts_that_do_not_say_the_shape_of_the_codes_are_refused():
    b = replace(batch(), video=torch.zeros(3, 0))
    for turn in dimo().turns():
        with pytest.raises(UsageError, match="shape of the batch's video"):
            turn.loss(cast_of(), b, 0)


def test_no_turn_and_no_sample_makes_a_tensor_of_all_logits():
    """K and the tokens are many, everything else is few: only logits of all tokens could be this large."""
    size = replace(SIZE, dim=8, ffn_dim=8, codes=700, head_dim=16, heads=1)
    path = MetricPath(torch.randn(700, 3, generator=torch.Generator().manual_seed(0)), 0.9, 3.0, rows=32)
    modules = {name: network(i, size) for i, name in enumerate(("student", "teacher", "critic"))}
    modules["teacher"].requires_grad_(False)
    cast = {name: Chunked(m, m.lm_head, path) for name, m in modules.items()} | {"memory": dimo().memory()}
    keys = seeds.keys(0, "batch", range(2))
    text = {"text": keys.integers(20, 4)}
    b = Batch(keys.fold("video").integers(700, 2, 8, 8), keys, text, text)
    n = 2 * 2 * 8 * 8
    with Largest() as watch:
        for objective in (dimo(entropy=0.01, kd=1.0), reinforce(draws=2, direct=0.1)):
            for turn in objective.turns():
                turn.loss(cast, b, 0)[0].backward()
        Denoising(None, Shifted(1.0)).loss(cast, b, 0)[0].backward()  # type: ignore[arg-type]
        with torch.no_grad():
            Jumps()(guided(cast["student"], text, text, 3.0), path, b.video, (1.0, 0.5), keys)
    assert watch.elements < n * 700 / 4, f"{watch.elements} in {watch.by}"


def test_times_change_from_the_first_law_to_the_second():
    objective = dimo(first=NearData(), then=Shifted(8.0), switch=7)
    assert objective.times_at(6) == NearData() and objective.times_at(7) == Shifted(8.0)


def test_given_frames_stay_clean_and_nothing_is_learned_from_them():
    cast, b = cast_of(), batch(6)
    objective = dimo(conditions=Frames(1.0, (1,)))
    draws = b.keys.fold("student")
    known = objective.conditions.given(b.video, draws.fold("conditions"))
    assert known[:, 0].all() and not known[:, 1].any()
    _, drawn = objective.sample(cast["student"], b, draws, known)
    t, x_t = objective._corrupted(cast["student"], drawn.tokens, 0, draws, known)
    assert torch.equal(x_t[:, 0], b.video[:, 0]) and torch.equal(drawn.tokens[:, 0], b.video[:, 0])
    assert (t[:, 0] == 0).all() and (t[:, 1] > 0).all()
    weight = objective._weight(cast["student"], x_t, drawn.tokens, t, known).view(b.video.shape)
    assert (weight[:, 0] == 0).all() and (weight[:, 1] == 1).all()
    for turn in objective.turns():
        turn.loss(cast, b, 0)[0].backward()
    some = Frames(0.5, (1, 2)).given(torch.zeros(4000, 3, 1, 1), seeds.keys(0, "some", range(4000))).sum(1)
    assert [(some == n).float().mean().item() for n in range(3)] == pytest.approx([0.5, 0.25, 0.25], abs=0.03)


def test_a_share_of_samples_starts_from_drafts_in_batches_of_any_size():
    keys = seeds.keys(0, "mixed", range(10_000))
    fresh, draft = torch.zeros(10_000, 1, 4, 4), torch.ones(10_000, 1, 4, 4)
    made = mix(fresh, draft, keys.uniform(1), keys.fold("t").uniform(1, 4, 4), Mixed(0.2, 0.2))
    mixed = made.flatten(1).any(1)
    assert mixed.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert made[mixed].mean().item() == pytest.approx(0.8, abs=0.01)
    ones = [
        mix(fresh[:1], draft[:1], keys[i : i + 1].uniform(1), keys[i : i + 1].fold("t").uniform(1, 4, 4), Mixed())
        for i in range(50)
    ]
    assert torch.equal(torch.cat(ones), made[:50])


def test_a_mixed_start_is_of_the_students_own_draft():
    cast, b = cast_of(), batch(8)
    draws = b.keys.fold("student")
    x, _ = dimo(mixed=Mixed(1.0, 0.0))._start(cast["student"], b, draws, None)
    other, _ = cast["student"].begin((8, *SHAPE), draws.fold("draft"))
    logits = cast["student"](other, torch.ones(8, 1), b.cond)
    u = draws.fold("drafted").uniform(*SHAPE)
    from kinema.diffusion.logits import draw

    assert torch.equal(x, draw(logits, u).tokens)
    plain, _ = dimo()._start(cast["student"], b, draws, None)
    none, _ = dimo(mixed=Mixed(0.0))._start(cast["student"], b, draws, None)
    assert torch.equal(plain, none)


def test_the_entropy_coefficient_rises_as_entropy_falls_through_its_band():
    objective = dimo(entropy=(0.01, 0.05), entropy_band=(0.2, 0.4))
    full = math.log(K)
    made = [objective._entropy_coefficient(torch.tensor(share * full), K).item() for share in (0.9, 0.4, 0.3, 0.2, 0.1)]
    assert made == pytest.approx([0.01, 0.01, 0.03, 0.05, 0.05])
    assert dimo()._entropy_coefficient(torch.tensor(1.0), K) is None


def test_students_of_several_steps_train_one_pass_that_all_samples_share():
    cast = cast_of()
    exits = set()
    for first in range(0, 60, 3):
        b, seen = batch(3, first), []

        def backbone(x, timestep=None, *, text, seen=seen):
            seen.append((timestep[0, 0].item(), torch.is_grad_enabled()))
            return cast["student"].backbone(x, timestep, text=text)

        student = replace(cast["student"], backbone=backbone)
        dimo(steps_at=(1.0, 0.5)).sample(student, b, b.keys.fold("student"), None)
        exits.add(tuple(seen))
    assert exits == {((1000.0, True),), ((1000.0, False), (500.0, True))}


@pytest.mark.parametrize("steps_at", [(), (0.5,), (1.0, 1.0), (1.0, 0.0)])
def test_impossible_steps_are_refused(steps_at):
    with pytest.raises(UsageError, match="steps_at"):
        dimo(steps_at=steps_at)


def test_a_masked_student_starts_with_noise_and_masks_and_draws_codes_alone():
    path = PATHS["masked"]
    cast, b = cast_of(path, Start(mask=0.5, embed_noise=0.3)), batch()
    logits, drawn = dimo().sample(cast["student"], b, b.keys.fold("student"), None)
    assert drawn.tokens.max() < K
    quiet = replace(cast["student"], start=Start(mask=0.5))
    assert not torch.equal(dimo().sample(quiet, b, b.keys.fold("student"), None)[0].hidden, logits.hidden)


def test_advantages_of_one_place_sum_to_nothing_and_leave_their_own_reward_out():
    rewards = [seeds.keys(0, f"r{g}", range(5)).normal(3) for g in range(4)]
    made = advantages(rewards)
    assert sum(made).abs().max() < 1e-5
    torch.testing.assert_close(made[1], rewards[1] - (rewards[0] + rewards[2] + rewards[3]) / 3)


@pytest.mark.parametrize("reward", ["log_ratio", "jeffreys"])
@pytest.mark.parametrize("credit", ["token", "sequence"])
@pytest.mark.parametrize("name", PATHS)
def test_reinforcement_is_that_of_whole_tensors(reward, credit, name):
    objective, path, b = reinforce(reward=reward, credit=credit, draws=3, first=Shifted(1.0)), PATHS[name], batch()
    cast, twin = cast_of(path), cast_of(path)
    objective.student_loss(cast, b, 0)[0].backward()
    draws = b.keys.fold("student")
    x, _ = twin["student"].begin((3, *SHAPE), draws.fold("start"))
    log_p = (twin["student"].backbone(x, **b.cond) @ twin["student"].head.weight.T).log_softmax(-1)
    t = Shifted(1.0).sample(path, 2, draws.fold("time"))
    rewards, chosen = [], []
    for g in range(3):
        u = (draws.fold(g) if g else draws).fold("sample").uniform(*SHAPE)
        cdf = log_p.detach().exp().cumsum(-1)
        tokens = (cdf <= u[..., None] * cdf[..., -1:]).sum(-1)
        x_t = path.corrupt(tokens, t, draws.fold(f"noise{g}" if g else "noise"))
        with torch.no_grad():
            log_t, log_a = (twin[r](x_t, t, b.cond).whole().log_softmax(-1) for r in ("teacher", "critic"))
        if reward == "log_ratio":
            r = (log_t - log_a).gather(-1, tokens[..., None])[..., 0]
        else:
            r = -0.5 * ((log_t.exp() - log_a.exp()) * (log_t - log_a)).sum(-1)
        if name == "masked":
            r = r * (x_t == K)
        rewards.append(r if credit == "token" else r.sum((1, 2, 3), keepdim=True).expand_as(r))
        chosen.append(log_p.gather(-1, tokens[..., None])[..., 0])
    loss = -sum((a * c).sum() for a, c in zip(advantages(rewards), chosen, strict=True)) / 3 / 3
    loss.backward()
    for ours, theirs in zip(gradients(cast["student"]), gradients(twin["student"]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_credit_of_single_tokens_finds_the_gradient_where_that_of_sequences_is_lost():
    """For a reward that is a sum over tokens: the cosine of the estimate to the exact gradient of the logits."""
    n, codes, draws = 5120, 4, 8
    keys = seeds.keys(0, "credit", range(draws))
    z = 0.5 * seeds.keys(0, "z", range(n)).normal(codes).double()
    value = seeds.keys(0, "value", range(n)).normal(codes).double()
    p = z.softmax(-1)
    exact = -p * (value - (p * value).sum(-1, keepdim=True))
    u = keys.uniform(n)
    drawn = [(p.cumsum(-1) <= u[g][:, None]).sum(-1).clamp(max=codes - 1) for g in range(draws)]
    single = [value.gather(-1, code[:, None])[:, 0] for code in drawn]
    whole = [reward.sum().expand(n) for reward in single]
    cosine = {}
    for name, rewards in (("token", single), ("sequence", whole)):
        g = score(z, drawn, advantages(rewards))
        cosine[name] = F.cosine_similarity(g.flatten(), exact.flatten(), dim=0).item()
    assert cosine["token"] > 0.5 and abs(cosine["sequence"]) < 0.1


def test_the_running_baseline_follows_the_rewards_of_whole_steps():
    objective, cast = reinforce(baseline="ema"), cast_of()
    memory, mean = objective.memory(), 0.0
    for step in range(3):
        heard = []
        for micro in range(2):
            _, metrics = objective.student_loss({**cast, "memory": memory}, batch(3, 6 * step + 3 * micro), step)
            heard.append(metrics["reward"].item())
            assert memory["mean"].item() == pytest.approx(mean, rel=1e-4)
        mean = 0.99 * mean + 0.01 * sum(heard) / 2
    assert reinforce().memory() == dimo().memory() and mean != 0


@pytest.mark.parametrize("kind", [Dimo, partial(Reinforce, baseline="ema", draws=2)], ids=["dimo", "reinforce"])
def test_a_resumed_distillation_equals_a_straight_one(tmp_path, kind):
    from world import token_game

    from kinema.training.trainer import Trainer

    def trained(folder, *stops: int) -> dict[str, torch.Tensor]:
        for steps in stops:
            trainer = Trainer(token_game(kind, steps=steps, batch_size=2), tmp_path / folder, torch.device("cpu"))
            trainer.train()
        return trainer._state()

    straight, resumed = trained("straight", 4), trained("resumed", 2, 4)
    assert straight.keys() == resumed.keys() and any("critic.model" in name for name in straight)
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


def test_one_draw_has_nothing_to_be_compared_with():
    with pytest.raises(UsageError, match="draws is 1"):
        reinforce(draws=1)
    assert reinforce(draws=1, baseline="ema").draws == 1


def test_latents_alone_have_weightings():
    from kinema.diffusion.weighting import MinSNR

    with pytest.raises(UsageError, match="latents"):
        Denoising(None, Shifted(1.0), MinSNR()).loss(cast_of(), batch(), 0)  # type: ignore[arg-type]

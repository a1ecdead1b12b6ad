"""What kinema says to the golden cases of Di[M]O, driven by each case's config. Their tau is 1 - t."""

from dataclasses import dataclass
from typing import Any

import torch
from harness import Case, registered
from torch import Tensor, nn

from adapters.ursa import Given, gradients_of, network, path_of, plain
from kinema.data.batch import Batch
from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.logits import Logits, cross_entropy, draw, steer
from kinema.diffusion.times import NearData, Shifted
from kinema.diffusion.token_path import MixturePath, exactly_masked
from kinema.models.ursa.transformer import perturb
from kinema.objectives.dimo import Dimo, Mixed, flattening, jeffrey, mix

NOBODY: Any = None  # the spec of a role whose network is given


def direction(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    cond, uncond = plain(inputs["teacher_cond"]), plain(inputs["teacher_uncond"])
    teacher = (uncond + config["teacher_guidance"] * (cond - uncond)).whole()
    shape = teacher.shape
    pair = [z.flatten(0, 1) / config["temperature"] for z in (teacher, inputs["critic"])]
    made = [jeffrey(*pair, beta) for beta in config["betas"]]
    g = torch.stack([one[0].view(shape) for one in made])
    return {
        "teacher_guided": teacher,
        "direction": g,
        "direction_masked": g * inputs["mask"][..., None],
        "forward_kl": made[0][1].view(shape[:2]),
        "reverse_kl": made[0][2].view(shape[:2]),
    }


def surrogate(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    hidden = inputs["student_hidden"].requires_grad_()
    heads = {name: HeadOf(inputs[f"{name}_head"]) for name in ("student", "teacher", "critic")}

    def logits(hidden: Tensor, head: str) -> Logits:
        return Logits(hidden, heads[head], torch.float32, rows=7)

    cond, uncond = (logits(inputs[f"teacher_{name}_hidden"], "teacher") for name in ("cond", "uncond"))
    teacher = uncond + config["teacher_guidance"] * (cond - uncond)
    loss, _ = steer(
        logits(hidden, "student"),
        (teacher, logits(inputs["critic_hidden"], "critic")),
        lambda rows, student, others: (jeffrey(*others, config["beta"])[0], {}),
        1 / config["batch_size"],
    )
    loss.backward()
    return {"loss": loss, "grad.student_hidden": hidden.grad, "grad.student_head": heads["student"].weight.grad}


def critic_loss(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    made = {"all_tokens.loss": cross_entropy(plain(inputs["critic"]), inputs["x"]).mean()}
    counted = inputs["mask"].float()
    for smoothing in config["label_smoothing"]:
        z = inputs["critic"].clone().requires_grad_()
        each = cross_entropy(plain(z), inputs["x"], smoothing)
        loss = (each * counted).sum() / counted.sum()
        loss.backward()
        name = f"smoothing{round(100 * smoothing)}"
        made |= {f"{name}.loss": loss, f"grad.{name}": z.grad}
    return made


def times(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    path: Any = MixturePath(2)
    low = 1 - config["clamp"]
    laws = {"curriculum_early": NearData(2.0, low), "curriculum_late": NearData(1.0, low)}
    laws |= {f"shift{shift:g}".replace(".", "p"): Shifted(shift) for shift in config["shifts"]}
    return {f"{name}.tau": 1 - law.quantile(path, inputs["uniform"]) for name, law in laws.items()}


def entropy(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    z = inputs["logits"].clone().requires_grad_()
    each = draw(plain(z), torch.zeros(z.shape[:-1])).entropy
    bonus, _ = steer(plain(z), (), lambda rows, student, others: (flattening(student()), {}), 1 / each.numel())
    bonus.backward()
    return {
        "token_entropy": each,
        "entropy": each.mean(),
        "grad.logits": -z.grad,  # type: ignore[operator]
        "log_prob": -cross_entropy(plain(z), inputs["x"]),
    }


def init(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    codes, rank = inputs["codes"], inputs["rank"]
    mixed = Mixed(config["mix_prob"], config["corrupt_ratio"])
    chance = inputs["uniform_sample"][:, None], inputs["uniform_token"]
    return {
        "perturbed": perturb(inputs["embedding"], inputs["eps"], config["sigma"]),
        "masked": exactly_masked(codes, torch.full((len(codes), 1), config["ratio"]), rank, config["K"]),
        "mixed": mix(codes, inputs["previous_codes"], *chance, mixed),
    }


def turn(config: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor], case: Case) -> dict:
    """The objective's own student turn with every draw given, and the critic's at the same corruption."""
    path, grid = path_of(config, inputs), config["grid"]
    roles = {role: network(config, part_of(weights, role)) for role in ("student", "teacher", "critic")}
    cast = {role: TokenDenoiser(module, module.lm_head, path) for role, module in roles.items()}
    streams = {"student.start.prior": "x_init", "student.sample": "uniform_student", "student.noise": "uniform_noise"}
    keys: Any = Given({name: inputs[file] for name, file in streams.items()})
    text, negative = ({"text": inputs[name]} for name in ("text_ids", "negative_text_ids"))
    batch = Batch(inputs["x_init"].unflatten(1, grid), keys, text, negative)
    told = GivenTime(1 - inputs["tau"][:, None])
    dimo = Dimo(
        *[NOBODY] * 3, reverse=config["beta"], guidance=config["teacher_guidance"], guided_above=-1.0, first=told
    )
    loss, _ = dimo.student_loss({**cast, "memory": dimo.memory()}, batch, 0)
    loss.backward()

    logits, drawn = dimo.sample(cast["student"], batch, keys.fold("student"), None)
    t, x_t = dimo._corrupted(cast["student"], drawn.tokens, 0, keys.fold("student"), None)
    teacher, critic = (one.whole().flatten(1, 3) for one in dimo.judged(cast, batch, x_t, t))
    critic_loss = cast["critic"].error(x_t, drawn.tokens, t, text).mean()
    critic_loss.backward()
    names = case.order or config["grad_norm_order"]
    grads = {role: gradients_of(roles[role], names) for role in ("student", "critic")}
    g = jeffrey(teacher.flatten(0, 1), critic.flatten(0, 1), config["beta"])[0]
    return {
        "student_logits": logits.whole().flatten(1, 3),
        "sample": drawn.tokens.flatten(1),
        "x_t": x_t.flatten(1),
        "teacher_guided": teacher,
        "critic_logits": critic,
        "direction": g.view(teacher.shape),
        "student_loss": loss,
        "critic_loss": critic_loss,
        **{f"{role}_grad_norms": grad["grad_norms"] for role, grad in grads.items()},
        **{
            name.replace("grad.", f"grad.{role}."): value
            for role, grad in grads.items()
            for name, value in grad.items()
            if name != "grad_norms"
        },
    }


class HeadOf(nn.Module):
    """A head with a given weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: Tensor, loop):
        return loop(hidden, self.weight)


@dataclass(frozen=True, eq=False)
class GivenTime:
    """A law of times that always says `t`."""

    t: Tensor

    def sample(self, path, frames: int, draw) -> Tensor:
        return self.t


def part_of(weights: dict[str, Tensor], role: str) -> dict[str, Tensor]:
    prefix = f"{role}."
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


for answer in (direction, surrogate, critic_loss, times, entropy, init, turn):
    registered(f"dimo.{answer.__name__}", answer)

"""What kinema says to the golden cases of the distillation objectives, whose noises and times are all recorded."""

import json
from functools import partial

import torch
from harness import Case, adapter
from torch import Tensor

from adapters.self_forcing import Tape, recorded
from adapters.wan import causal_network, gradients, network, size_of, texts
from kinema.data.batch import Batch
from kinema.diffusion.chunks import Chunks
from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.diffusion.rollout import rollout
from kinema.diffusion.times import Shifted, shifted
from kinema.diffusion.weighting import Bell
from kinema.models import discriminator
from kinema.models.discriminator import ClassifierBranch, Judge, WanDiscriminator
from kinema.objectives import dmd, gan, ode_regression, sid
from kinema.objectives.distribution_matching import Sample, follow, surrogate

PATH = GaussianPath()


def named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def scores(config: dict, tensors: dict[str, Tensor], *roles: str) -> dict[str, LatentDenoiser]:
    networks = {role: network(size_of(config), named(tensors, f"sd.{role}.")) for role in roles}
    return {role: LatentDenoiser(module, PATH, Flow()) for role, module in networks.items()}


def sample_of(config: dict, inputs: dict[str, Tensor], video: Tensor, **draws: Tensor) -> Sample:
    """A video looked at where the case says."""
    names = {name.removeprefix("uncond_"): text for name, text in inputs.items() if name.startswith("uncond_text.")}
    cond = {"text": inputs["text"] if "text" in inputs else texts(inputs)}
    uncond = {"text": texts(names)} if names else {}
    t = Shifted(config["shift"], 0.02, 0.98).quantile(PATH, inputs["u"] / 1000)[:, None]
    noise = draws.setdefault("noise", inputs.get("noise"))
    return Sample(video, 0, t, noise, Batch(video, None, cond, uncond), Tape({(n,): d for n, d in draws.items()}))


@adapter("objectives.dmd_direction")
def dmd_direction(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config, given, made = case.config, named(tensors, "in."), {}
    for variant in ("a", "b"):
        real, fake = (
            given[f"{role}_uncond"]
            + config[f"{role}_scale_{variant}"] * (given[f"{role}_cond"] - given[f"{role}_uncond"])
            for role in ("real", "fake")
        )
        d, _ = dmd.direction(given["x"], real, fake)
        for suffix, skip in (("", 0), ("_masked", int((given["mask"][0, :, 0, 0, 0] == 0).sum()))):
            x = given["x"].clone().requires_grad_()
            loss = surrogate(x[:, skip:], d[:, skip:])
            loss.backward()
            made |= {f"{variant}{suffix}.loss": loss, f"{variant}{suffix}.dloss_dx": x.grad}
        made |= {f"{variant}.signal": d, f"{variant}.mean_abs_signal": d.abs().mean()}
    return made


@adapter("objectives.dmd_networks")
def dmd_networks(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config, given = case.config, named(tensors, "in.")
    cast = scores(config, tensors, "real", "fake")
    cast = {"teacher": cast["real"], "critic": cast["fake"]}
    x = given["x"].requires_grad_()
    sample = sample_of(config, given, x)
    loss, _ = dmd.ScoreDifference(guidance=config["real_scale"], critic_guidance=config["fake_scale"]).student_loss(
        cast, sample
    )
    loss.backward()
    with torch.no_grad():
        x_t = sample.seen(PATH)
        estimates = {
            f"{name}_{kind}": cast[role](x_t, sample.t, text)
            for name, role in (("real", "teacher"), ("fake", "critic"))
            for kind, text in (("cond", sample.batch.cond), ("uncond", sample.batch.uncond))
        }
    signal = x.grad * x.numel()
    told = {"x_t": x_t, "t": sample.t[:, 0] * 1000, "mean_abs_signal": signal.abs().mean()}
    return {**estimates, **told, "loss": loss, "dloss_dx": x.grad}


@adapter("objectives.critic")
def critic(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config, given = case.config, named(tensors, "in.")
    score = scores(config, tensors, "fake")["fake"]
    sample = sample_of(config, given, given["x"])
    loss, _ = follow({"critic": score}, sample)
    loss.backward()
    x_t, cond = sample.seen(PATH), sample.batch.cond
    with torch.no_grad():
        flow = score.backbone(x_t, sample.t * 1000, **cond)
        told = {"x_t": x_t, "t": sample.t[:, 0] * 1000, "flow": flow, "x0": score(x_t, sample.t, cond)}
    return {**told, "loss": loss, **gradients(score.backbone, case.order)}


@adapter("objectives.dmd_student_step")
@adapter("objectives.sid_student_step")
def student_step(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config, given = case.config, named(tensors, "in.")
    cast = scores(config, tensors, "real", "fake")
    cast = {"teacher": cast["real"], "critic": cast["fake"]}
    module = causal_network(config, named(tensors, "sd.generator."))
    for score in cast.values():
        score.backbone.requires_grad_(False)
    noise = given["rollout_noise"]
    made = rollout(
        partial(LatentDenoiser(module, PATH, Flow()), cond={"text": texts(given)}),
        PATH,
        noise,
        tuple((given["steps"].double() / 1000).tolist()),
        module.new_cache(noise.shape[1], noise.shape[1]),
        Chunks(config["frames_per_block"], config["block_sizes"][0] != config["frames_per_block"]),
        recorded(given),
        given["exit_index"].tolist(),
        graded_frames=noise.shape[1],
        context_noise=config["context_noise"] / 1000,
    )
    video = torch.cat(list(made), dim=1)
    video.retain_grad()
    guidance = {"guidance": config["real_scale"], "critic_guidance": config["fake_scale"]}
    term = (
        dmd.ScoreDifference(**guidance)
        if config["loss"] == "dmd"
        else sid.ScoreIdentity(**guidance, sid_alpha=config["alpha"])
    )
    loss, _ = term.student_loss(cast, sample_of(config, given, video))
    loss.backward()
    told = {"latents": video, "loss": loss, "dloss_dlatents": video.grad}
    return {**told, **gradients(module, case.order)}


@adapter("objectives.sid_direction")
def sid_direction(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config, made = case.config, {}
    for variant in ("a", "b"):
        given = {name: tensor.clone().requires_grad_() for name, tensor in named(tensors, "in.").items()}
        real = given["real_uncond"] + config["real_scale"] * (given["real_cond"] - given["real_uncond"])
        loss = sid.identity(given["x"], real, given["fake"], config[f"alpha_{variant}"]).mean()
        loss.backward()
        made |= {f"{variant}.loss": loss, **{f"{variant}.grad.{name}": tensor.grad for name, tensor in given.items()}}
    return made


@adapter("objectives.sid_networks")
def sid_networks(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config, given = case.config, named(tensors, "in.")
    cast = scores(config, tensors, "real", "fake")
    x = given["x"].requires_grad_()
    term = sid.ScoreIdentity(guidance=config["real_scale"], sid_alpha=config["alpha"])
    loss, _ = term.student_loss({"teacher": cast["real"], "critic": cast["fake"]}, sample_of(config, given, x))
    loss.backward()
    return {"loss": loss, "dloss_dx": x.grad}


@adapter("objectives.gan_logits")
def gan_logits(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config, made = case.config, {}
    for variant in ("plain", "relativistic"):
        given = {name: tensor.clone().requires_grad_() for name, tensor in named(tensors, "in.").items()}
        fake, real = given["fake_logits"], given["real_logits"]
        g = config["gan_g_weight"] * gan.generator_loss(fake, real if variant == "relativistic" else None)
        d = config["gan_d_weight"] * gan.discriminator_loss(fake, real, variant == "relativistic")
        r1, r2 = (
            config[f"{name}_weight"] * gan.steepness(before, given[f"{role}_logits_perturbed"], config[f"{name}_sigma"])
            for name, role, before in (("r1", "real", real), ("r2", "fake", fake))
        )
        total = d + 0.5 * (r1 + r2)
        losses = {"g_loss": g, "d_loss": d, "r1": r1, "r2": r2, "d_total": total}
        made |= {f"{variant}.{name}": value for name, value in losses.items()}
        for name, loss in (("g_grad", g), ("d_grad", total)):
            found = torch.autograd.grad(loss, list(given.values()), retain_graph=True, allow_unused=True)
            made |= {
                f"{variant}.{name}.{key}": gradient
                for key, gradient in zip(given, found, strict=True)
                if gradient is not None
            }
    return made


@adapter("objectives.gan_networks")
def gan_networks(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """kinema has one `r_step`; another one for r2 is a larger noise with a smaller weight."""
    config, given, made = case.config, named(tensors, "in."), {}
    manifest = json.loads((case.folder / "manifest.json").read_text(encoding="utf-8"))
    size = manifest["weights"][case.entry["weights"]["discriminator"]]["config"]
    branch = ClassifierBranch(
        tuple(size["tap_blocks"]), config["num_class"], config["concat_time_embeddings"], size["branch_ffn_dim"]
    )
    module = WanDiscriminator(size_of(size), branch)
    weights = named(tensors, "sd.discriminator.")
    ours = {theirs: next(iter(renamed({theirs: weights[theirs]}))) for theirs in weights}
    module.load_state_dict(renamed(weights))
    judge = Judge(module, PATH, Flow())
    s1, s2 = config["r1_sigma"], config["r2_sigma"]
    draws = {"real": given["noise_real"], "r1": given["eps_real"], "r2": given["eps_fake"] * (s2 / s1)}
    r1, r2 = config["r1_weight"], config["r2_weight"] * (s1 / s2) ** 2
    for variant in ("plain", "relativistic"):
        term = gan.Adversarial(
            g_weight=config["gan_g_weight"],
            d_weight=config["gan_d_weight"],
            relativistic=variant == "relativistic",
            r1=r1,
            r2=r2,
            r_step=s1,
        )
        x = given["x_fake"].clone().requires_grad_()
        sample = sample_of(config, given, x, noise=given["noise_fake"], **draws)
        batch = Batch(given["x_real"], None, sample.batch.cond)
        sample = Sample(x, 0, sample.t, sample.noise, batch, sample.draw)
        g, _ = term.student_loss({"critic": judge}, sample)
        made |= {f"{variant}.g_loss": g, f"{variant}.g_grad.x_fake": torch.autograd.grad(g, x)[0]}
        module.zero_grad()
        total, told = term.critic_loss({"critic": judge}, Sample(**{**vars(sample), "video": x.detach()}))
        total.backward()
        penalties = {"r1": r1 * told["r1"], "r2": r2 * told["r2"]}
        made |= {f"{variant}.{name}": value for name, value in penalties.items()}
        made[f"{variant}.d_loss"] = total - 0.5 * sum(penalties.values())
        found = gradients(module, [ours[name] for name in case.order])
        made[f"{variant}.grad_norms"] = found["grad_norms"]
        made |= {f"{variant}.grad.{theirs}": found[f"grad.{name}"] for theirs, name in ours.items()}
    with torch.no_grad():
        cond = sample.batch.cond
        made["fake_logits"] = judge.logits(sample.seen(PATH, given["x_fake"]), sample.t, cond)
        made["real_logits"] = judge.logits(sample.seen(PATH, given["x_real"]), sample.t, cond)
    return {**made, "t": sample.t[:, 0] * 1000}


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(discriminator.from_release((name.removeprefix("model."), tensor) for name, tensor in weights.items()))


@adapter("objectives.ode_regression")
def ode(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    given = named(tensors, "in.")
    module = causal_network(case.config, named(tensors, "sd.generator."))
    x_t, t = ode_regression.states_at(given["ode_latents"], given["index"], (given["steps"].double() / 1000).tolist())
    cond = {"text": texts(given)}
    x0 = LatentDenoiser(module, PATH, Flow())(x_t, t, cond, lengths=case.config["block_sizes"])
    _, loss = ode_regression.regression(x0, given["ode_latents"][:, -1], t)
    loss.backward()
    return {"noisy_input": x_t, "t": t * 1000, "x0": x0, "loss": loss, **gradients(module, case.order)}


@adapter("objectives.diffusion_forcing")
@adapter("objectives.teacher_forcing")
@adapter("objectives.teacher_forcing_noised_context")
def forcing(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original's noisy context has the target's own noise, which is as good an input as any."""
    config, given = case.config, named(tensors, "in.")
    grid = torch.tensor(shifted(1000, config["shift"]), dtype=torch.float64)
    t, module = grid[given["grid_index"]].float(), causal_network(config, named(tensors, "sd.generator."))
    student, cond = LatentDenoiser(module, PATH, Flow()), {"text": texts(given)}
    seen = {"lengths": config["block_sizes"]}
    if config["teacher_forcing"]:
        t_context = grid[given["context_grid_index"]].float() if "context_grid_index" in given else torch.zeros(1, 1)
        clean = PATH.mix(given["x"], given["noise"], t_context)
        seen |= {"clean": clean, "clean_timestep": t_context.expand(len(clean), -1) * 1000}
    error = student.loss(given["x"], t, cond, Tape({("noise",): given["noise"]}), **seen)
    loss = (Bell(config["shift"])(PATH, Flow(), t) * error).mean()
    loss.backward()
    noisy = PATH.mix(given["x"], given["noise"], t)
    with torch.no_grad():
        flow = module(noisy, t * 1000, **cond, **seen)
    return {"t": t * 1000, "noisy": noisy, "flow": flow, "loss": loss, **gradients(module, case.order)}

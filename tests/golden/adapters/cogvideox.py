"""CogVideoX: tables, times, weights, guidance and samplers. Its networks are in `cogvideox_networks`."""

from dataclasses import dataclass

import torch
from harness import adapter
from torch import Tensor

from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.guidance import Cosine, DynamicSAT, guided
from kinema.diffusion.path import GaussianPath, offset_noise
from kinema.diffusion.prediction import Clean, Epsilon, V
from kinema.diffusion.samplers import DDIM, DPMpp2M, DPMpp2MSDE
from kinema.diffusion.schedule import EDM, LegacyDDPM, ZeroSNR
from kinema.diffusion.times import LogNormalSigma, karras_sigmas, sat_trailing, strata, trailing
from kinema.diffusion.weighting import EDMWeight, Even, MinSNR


def levels(times) -> Tensor:
    """The integer timesteps of a tabulated schedule's times."""
    return ZeroSNR().timestep(torch.tensor(times)).long()


@adapter("cogvideox.schedule")
def schedule(case, tensors):
    c = case.config
    beta, shift, steps = (c["beta_start"], c["beta_end"]), c["shift_scale"], c["num_timesteps"]
    plain = LegacyDDPM(steps, beta).abar()
    table = ZeroSNR(shift, steps, beta)
    return {
        "abar": table.abar(),
        "abar_without_rescale": plain / (shift + (1 - shift) * plain),
        "sqrt_abar_float32": table.abar().sqrt().float(),
        "abar_keep_start": ZeroSNR(shift, steps, beta, keep_start=True).abar(),
        "abar_post_shift": ZeroSNR(shift, steps, beta, shift_after=True).abar(),
    }


@adapter("cogvideox.timesteps")
def timesteps(case, tensors):
    made = {}
    for n in case.config["num_steps"]:
        made |= {f"trailing.n{n}": levels(trailing(n)), f"compat.n{n}": levels(sat_trailing(n))}
    return made


@dataclass(frozen=True)
class Subsampled:
    """The original sampler's own table: entries are picked, then rescaled to zero terminal SNR; only goldens use it."""

    shift: float
    n: int

    def times(self) -> tuple[float, ...]:
        return sat_trailing(self.n)

    def root(self) -> Tensor:
        """√ᾱ of the picked entries, noisy to clean, float64."""
        plain = LegacyDDPM().abar()
        a = (plain / (self.shift + (1 - self.shift) * plain)).sqrt()[levels(self.times()).flip(0)]
        return ((a - a[-1]) * a[0] / (a[0] - a[-1])).flip(0)

    def snapped(self) -> Tensor:
        """The index of the training table's entry nearest to each."""
        table = ZeroSNR(self.shift).abar().sqrt().float()
        return (self.root().float()[:, None] - table).abs().argmin(1)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        known = torch.cat([self.root(), torch.ones(1, dtype=torch.float64)])
        listed = torch.tensor([*self.times(), 0.0], dtype=torch.float64)
        a = known[(t.double()[..., None] - listed).abs().argmin(-1)]
        return a.to(t.dtype), (1 - a**2).sqrt().to(t.dtype)

    def timestep(self, t: Tensor) -> Tensor:
        return ZeroSNR(self.shift).timestep(t)

    def time_of(self, log_snr_half: Tensor) -> Tensor:
        raise NotImplementedError

    def quantile(self, u: Tensor) -> Tensor:
        raise NotImplementedError


@adapter("cogvideox.compat_table")
def compat_table(case, tensors):
    made = {}
    for shift in case.config["shifts"]:
        for n in case.config["num_steps"]:
            table, name = Subsampled(shift, n), f"shift{shift:g}_n{n}"
            made |= {f"{name}.sqrt_abar": table.root(), f"{name}.snapped_index": table.snapped()}
    return made


def coefficients(predicts, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """c_skip and c_out of x̂0 = c_skip·x + c_out·F, read off a prediction by asking it about x = 1 and F = 1."""
    one, nothing = torch.ones_like(alpha), torch.zeros_like(alpha)
    return {
        "c_skip": predicts.to_clean(nothing, one, alpha, sigma),
        "c_out": predicts.to_clean(one, nothing, alpha, sigma),
    }


@adapter("cogvideox.scalings")
def scalings(case, tensors):
    """The four of EDM's coordinates see x = x0 + σ·noise, which is the path's x_t / alpha."""
    sigma = tensors["in.sigma"].double()
    made = {}
    for name, predicts, data in (("edm", V(-1), case.config["sigma_data"]), ("eps", Epsilon(), 1.0), ("v", V(), 1.0)):
        norm = torch.sqrt(sigma**2 + data**2)
        alpha, s = data / norm, sigma / norm  # variance-preserving, of data divided by its deviation
        read = coefficients(predicts, alpha, s)
        made |= {
            f"{name}.c_skip": alpha * read["c_skip"] if name != "eps" else torch.ones_like(sigma),
            f"{name}.c_out": data * read["c_out"],
            f"{name}.c_in": 1 / norm,
            f"{name}.c_noise": sigma.log() / 4 if name == "edm" else sigma,
        }
    made["edm.c_noise"] = _edm_time(sigma)
    made |= {f"v_edm_noise.{key}": made[f"v.{key}"] for key in ("c_skip", "c_out", "c_in")}
    made["v_edm_noise.c_noise"] = _edm_time(sigma)
    root = tensors["in.sqrt_abar"].double()
    made |= {f"video.{key}": value for key, value in coefficients(V(), root, (1 - root**2).sqrt()).items()}
    made |= {"video.c_in": torch.ones_like(root), "video.c_noise": tensors["in.index"]}

    path = GaussianPath(_Levels())
    weights = {
        "unit": torch.ones_like(sigma),
        "edm": EDMWeight(case.config["sigma_data"])(path, Clean(), sigma),
        "v": Even(on=V())(path, Clean(), sigma),
        "eps": Even(on=Epsilon())(path, Clean(), sigma),
    }
    return made | {f"weight_{name}.w": weight for name, weight in weights.items()}


def _edm_time(sigma: Tensor) -> Tensor:
    """c_noise as the schedule gives it at the time of each σ."""
    schedule = EDM(sigma_data=1.0)
    low, high = schedule.sigma_min ** (1 / schedule.rho), schedule.sigma_max ** (1 / schedule.rho)
    t = (sigma ** (1 / schedule.rho) - low) / (high - low)
    return schedule.sigma(t).log() / 4


class _Levels:
    """A path that is told σ̃ itself, in variance-preserving coordinates."""

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.sqrt(1 + sigma**2)
        return 1 / norm, sigma / norm


@adapter("cogvideox.v_loss")
def v_loss(case, tensors):
    x0, noise, out = (tensors[f"in.{name}"] for name in ("x0", "noise", "model_output"))
    table = ZeroSNR(case.config["shift_scale"])
    path, t = GaussianPath(table), table.time_at(tensors["in.timestep"])[:, None]
    if level := case.config["offset_noise_level"]:
        noise = offset_noise(noise, Given(tensors["in.offset"]), level)

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        assert torch.equal(timestep[:, 0].long(), tensors["in.timestep"])
        return out

    denoiser = LatentDenoiser(network, path, V())
    draw = Given({"noise": tensors["in.noise"], "offset": tensors["in.offset"]})
    loss = denoiser.loss(x0, t, {}, draw, level).mean(1)
    x_t = path.mix(x0, noise, t)
    alpha, sigma = path.at(t, x0)
    f, f_snr = V().factors(alpha.flatten(), sigma.flatten())
    return {
        "alpha": alpha.flatten(),
        "sigma": sigma.flatten(),
        "noise_used": noise,
        "x_t": x_t,
        "v": V().target(x0, noise, alpha, sigma),
        "x0_pred": denoiser(x_t, t, {}),
        "loss": loss,
        "x0_error": loss * f,
        "noise_error": loss * f_snr,
    }


class Given:
    """A draw that replays recorded numbers: by the names of streams, or by steps along the first dim."""

    def __init__(self, recorded: Tensor | dict[str, Tensor]):
        self.recorded = recorded

    def fold(self, name):
        return Given(self.recorded[name])

    def normal(self, *shape):
        return self.recorded.reshape(-1, *shape)


@adapter("cogvideox.min_snr")
def min_snr(case, tensors):
    table = ZeroSNR(case.config["shift_scale"])
    path, t = GaussianPath(table), table.time_at(tensors["in.timestep"])
    weigh = MinSNR(case.config["gamma"])
    alpha, sigma = table(t.double())
    return {
        "snr": (alpha / sigma) ** 2,
        "weight_v": weigh(path, V(), t.float()),
        "weight_x0": weigh(path, Clean(), t.float()),
        "weight_noise": weigh(path, Epsilon(), t.float()),
        "weight_v_plus_one": MinSNR(case.config["gamma"], plus_one=True)(path, V(), t.float()),
    }


@adapter("cogvideox.stratified_times")
def stratified_times(case, tensors):
    count, steps = case.config["num_samples"], case.config["num_timesteps"]
    table = ZeroSNR(steps=steps)
    t = table.quantile(strata(tensors["in.permutation"], tensors["in.uniform"], count))
    made = {"timestep": table.timestep(t).long()}
    for name in case.entry["outputs"]:  # the original's groups of ranks, recorded for comparison only
        if name.endswith(".range"):
            ranks, groups = (int(part[1:]) for part in name.split(".")[1].split("_")[1:])
            group, width = torch.arange(ranks) // (ranks // groups), steps // groups
            made[name.removeprefix("out.")] = torch.stack([group * width, (group + 1) * width - 1], dim=1)
    return made


@adapter("cogvideox.edm")
def edm(case, tensors):
    c = case.config
    made = {"sampled.sigma": LogNormalSigma(c["p_mean"], c["p_std"]).sigma(tensors["in.normal"])}
    for n in c["num_steps"]:
        alpha, sigma = LegacyDDPM()(torch.tensor(sat_trailing(n), dtype=torch.float64))
        made[f"karras_n{n}.sigma"] = karras_sigmas(n, c["sigma_min"], c["sigma_max"], c["rho"])
        made[f"ddpm_n{n}.sigma"] = sigma / alpha
    return made


@adapter("cogvideox.dynamic_guidance")
def dynamic_guidance(case, tensors):
    scale, exponent, n = (case.config[name] for name in ("scale", "exponent", "num_steps"))
    t = torch.tensor(trailing(n), dtype=torch.float64)
    told = (tensors["in.timestep"].double() + 1) / 1000
    return {
        "dynamic_sat": DynamicSAT(scale, exponent, n)(told),
        "progress": Cosine(scale, exponent)(t),
        "rising": Cosine(scale, exponent, falling=False)(t),
    }


@adapter("cogvideox.sampler")
def sampler(case, tensors):
    c = case.config
    n, shift, std, compat = c["num_steps"], c["shift_scale"], c["data_std"], c["mode"] == "compat"
    table = ZeroSNR(shift)
    path = GaussianPath(Subsampled(shift, n) if compat else table)
    times = sat_trailing(n) if compat else trailing(n)
    read = table.time_at(Subsampled(shift, n).snapped()) if compat else None

    def network(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The estimate a sampler is given: the exact velocity of a Gaussian, read by the table of the mode."""
        alpha, sigma = GaussianPath(table).at(t.double(), x)
        mean = cond["mean"].double()
        clean = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x.double() - alpha * mean)
        v = alpha * (x.double() - alpha * clean) / sigma - sigma * clean
        if read is not None:
            step = (torch.tensor(times) - t[0, 0]).abs().argmin()
            alpha, sigma = GaussianPath(table).at(read[step].double().expand(len(x), 1), x)
        return V().to_clean(v, x.double(), alpha, sigma)

    scale = 1.0
    if c["guidance"] == "constant":
        scale = c["guidance_scale"]
    elif c["guidance"] == "dynamic_sat":
        scale = DynamicSAT(c["guidance_scale"], c["guidance_exponent"], n)
    uncond = {"mean": tensors.get("in.mean_uncond", tensors["in.mean"])}
    denoise = guided(network, {"mean": tensors["in.mean"]}, uncond, scale)
    states, estimates = [], []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        states.append(x)
        estimates.append(denoise(x, t))
        return estimates[-1]

    solver = {"ddim": DDIM(), "sde": DPMpp2MSDE(), "ode": DPMpp2M()}[c["solver"]]
    draw = Given(tensors["in.noise"].double()) if "in.noise" in tensors else None
    final = solver(watched, path, tensors["in.x_start"].double(), times, draw)
    at = torch.tensor(times)
    scales = scale(at) if callable(scale) else torch.full((n,), float(scale))
    return {"x": torch.stack(states), "x0": torch.stack(estimates), "final": final, "scale": scales}

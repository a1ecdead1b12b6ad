"""Rectified flow: grids, conversions, weights and trajectories."""

import torch
from harness import adapter
from torch import Tensor

from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.diffusion.samplers import DDIM, UniPC
from kinema.diffusion.times import Shifted, shifted, unwarp, warp, warped
from kinema.diffusion.weighting import Bell

PATH, FLOW = GaussianPath(), Flow()


@adapter("flow_match.grid")
def grid(case, tensors):
    """kinema's grids end before 0 ("extra_one_step"); the other options are spelt out from `warp`."""
    made = {}
    for name, g in case.config["grids"].items():
        n, low, high = g["num_steps"], g["sigma_min"], g["sigma_max"]
        start = low + (high - low) * g["denoising_strength"]
        u = torch.linspace(start, low, n + g["extra_one_step"], dtype=torch.float64)[:n]
        u = u.flip(0) if g["inverse_timesteps"] else u
        sigma = warp(u, g["shift"])
        if (low, high, g["denoising_strength"]) == (0, 1, 1) and g["extra_one_step"] and not g["inverse_timesteps"]:
            sigma = torch.tensor(shifted(n, g["shift"]), dtype=torch.float64)
        sigma = 1 - sigma if g["reverse_sigmas"] else sigma
        made |= {f"{name}.sigmas": sigma, f"{name}.timesteps": sigma * 1000}
    return made


@adapter("flow_match.training_grid")
def training_grid(case, tensors):
    n, shift = case.config["num_steps"], case.config["shift"]
    t = torch.tensor(shifted(n, shift))
    weights = Bell(shift, n)(PATH, FLOW, t.double())
    rows = tensors["in.indices"]
    picked = {
        "sigmas": PATH.schedule(t)[1][rows],
        "timesteps": PATH.schedule.timestep(t)[rows],
        "weights": weights[rows],
    }
    return {**picked, "weight_sum": weights.sum(), "weight_max": weights.max()}


@adapter("flow_match.corrupt_and_convert")
def corrupt_and_convert(case, tensors):
    x0, noise, flow, t = (tensors[f"in.{name}"] for name in ("x0", "noise", "flow", "t"))
    t = t[:, None] / 1000
    x_t = PATH.mix(x0, noise, t)
    alpha, sigma = PATH.at(t, x0)
    return {
        "sigma": sigma.flatten(),
        "x_t": x_t,
        "target_flow": FLOW.target(x0, noise, alpha, sigma),
        "x0_from_flow": FLOW.to_clean(flow, x_t, alpha, sigma),
        "flow_from_x0": (x_t - x0) / sigma,
        "weight": Bell(case.config["shift"], case.config["num_steps"])(PATH, FLOW, t)[:, 0],
    }


@adapter("flow_match.euler_step")
def euler_step(case, tensors):
    x, flow, t, t_next, t_last = (tensors[f"in.{name}"] for name in ("x", "flow", "t", "t_next", "t_last"))

    def step(start: Tensor, end: Tensor) -> Tensor:
        s, u = start[:, None] / 1000, end[:, None] / 1000
        return PATH.step(x, s, u, FLOW.to_clean(flow, x, *PATH.at(s, x)))

    nothing = torch.zeros_like(t)
    return {"next": step(t, t_next), "to_final": step(t, nothing), "next_last": step(t_last, nothing)}


def trajectory(sampler, tensors):
    """States before each step and the result, and the estimates, with the velocity field of the cases."""
    sigmas = tensors["in.sigmas"].double().tolist()
    states, estimates = [], []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        sigma = t.reshape(-1, *[1] * (x.ndim - 1))
        estimate = x - sigma * (torch.tanh(x) * (0.5 + sigma / 2) + 0.1)
        states.append(x)
        estimates.append(estimate)
        return estimate

    last = sampler(denoise, PATH, tensors["in.x"].double(), sigmas[:-1])
    return {"states": torch.stack([*states, last]), "x0": torch.stack(estimates)}


@adapter("flow_match.euler_trajectory")
def euler_trajectory(case, tensors):
    return trajectory(DDIM(), tensors)  # Euler's method, in whose name nothing else happens on a Gaussian path


@adapter("flow_match.unipc_trajectory")
def unipc_trajectory(case, tensors):
    assert case.config["order"] == 2
    return trajectory(UniPC(), tensors)


@adapter("flow_match.warped_step_lists")
def warped_step_lists(case, tensors):
    made, shift = {}, case.config["shift"]
    for name, entries in case.config["lists"].items():
        listed = [n for n in entries if n > 0]
        times = warped([n / 1000 for n in entries], shift)
        edges = [round(1000 * unwarp(t, shift)) for t in times[: len(listed)]] + [0]
        made |= {
            f"{name}.warped": torch.tensor(times) * 1000,
            f"{name}.interval_from": torch.tensor(edges[:-1]),
            f"{name}.interval_to": torch.tensor(edges[1:]),
        }
    return made


@adapter("flow_match.score_timestep_law")
def score_timestep_law(case, tensors):
    low, high = (edge / 1000 for edge in case.config["clamp"])
    law = Shifted(case.config["shift"], low, high)
    return {"t": PATH.schedule.timestep(law.quantile(PATH, tensors["in.u"].double() / 1000))}

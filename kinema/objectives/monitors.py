"""What tells a healthy distillation from one that collapses: numbers about videos and scores that are there anyway.

All are scalars on the device, NaN where a batch says nothing. `training/guard.py` knows their healthy ranges.
"""

import torch
from torch import Tensor

from kinema.seeds import Draw

Metrics = dict[str, Tensor]


@torch.no_grad()
def of_videos(x: Tensor, noise: Draw) -> Metrics:
    """Of the student's videos `[B, T, …]` and the draw their noise came from.

    motion     mean |x[t + 1] - x[t]| / the spread of the numbers; 0 is a still picture
    spread     standard deviation of the numbers, about 1 in normalised latents; it grows when colours saturate
    saturated  share of numbers beyond 4
    diversity  variance between the samples at a place / variance of all numbers: about 1, and 0 when all are one video
    same_noise correlation of neighbours' noise: 0, and 1 when all samples start from the same
    """
    spread = x.std()
    nothing = torch.full((), torch.nan, device=x.device)
    start = noise.normal(min(4096, x[0].numel()))
    return {
        "motion": x.diff(dim=1).abs().mean() / spread if x.shape[1] > 1 else nothing,
        "spread": spread,
        "saturated": (x.abs() > 4).float().mean(),
        "diversity": x.var(dim=0).mean() / x.var() if len(x) > 1 else nothing,
        "same_noise": (start * start.roll(1, 0)).mean() / start.square().mean() if len(x) > 1 else nothing,
    }


@torch.no_grad()
def of_scores(
    x: Tensor, t: Tensor, real: Tensor, fake: Tensor, without: Tensor, with_: Tensor, guided: bool
) -> Metrics:
    """Of the estimates of the student's videos x at x_t: the guided teacher's and the critic's, and the teacher's two.

    gap_q1 … 4  mean |fake - real| / mean |x - real| where t lies in [0, ¼) …: how far the student has to go
    critic_fit  mean (x - fake)² / mean (x - with_)²: below 1 where the critic knows the student's videos better than
                the teacher does; it is 1 for a copy of the teacher, and stays there if the critic does not learn
    prompt      <x - without, with_ - without> / |with_ - without|², the guidance the videos show: 1 in videos as the
                teacher makes them, its w in guided ones, 0 where the prompt is ignored, negative where it is shunned
    """
    scale = (x - real).abs().flatten(1).mean(1, keepdim=True)
    gap = (fake - real).abs().flatten(1).mean(1, keepdim=True) / scale
    effect = with_ - without
    shown = ((x - without) * effect).mean() / effect.square().mean()
    return {
        **by_quartile("gap", gap, t),
        "critic_fit": (x - fake).square().mean() / (x - with_).square().mean(),
        "prompt": shown if guided else torch.full((), torch.nan, device=x.device),
    }


def by_quartile(name: str, values: Tensor, t: Tensor) -> Metrics:
    """The mean of values `[B, T]` or `[B, 1]` where t lies in [0, ¼) … [¾, 1]; NaN for a quartile nothing fell into."""
    quartile = (t * 4).long().clamp(max=3).expand_as(values)
    nothing = torch.full((), torch.nan, device=values.device)
    means = {}
    for q in range(4):
        here = (quartile == q).float()
        means[f"{name}_q{q + 1}"] = torch.where(
            here.sum() > 0, (values * here).sum() / here.sum().clamp(min=1), nothing
        )
    return means

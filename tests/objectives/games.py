"""Two worlds for the objectives: points of two modes with networks of a few hundred weights, and a tiny causal Wan.

The points are videos of one frame, two channels and one pixel. Their teacher is not a network: what is left of a point
under noise is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.diffusion.chunks import Chunks
from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.diffusion.times import shifted
from kinema.models.discriminator import Discriminator, Judge
from kinema.models.wan.spec import Wan, WanCausal
from kinema.models.wan.transformer import WanSize
from kinema.seeds import Keys

CPU = torch.device("cpu")
MODES = torch.tensor([[-0.72, 0.24], [0.72, -0.24]])
SHARES = torch.tensor([0.3, 0.7])
SPREAD = 0.3
SIZE = WanSize(
    dim=24, ffn_dim=32, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=8, text_len=6, freq_dim=16
)


class Loud:
    """A spec whose new networks say something: Wan's own predict nothing before their first step."""

    def load(self, module, device):
        module = super().load(module, device)
        weight = module.head.head.weight
        with torch.no_grad():
            weight.copy_(torch.zeros(weight.shape).normal_(0, 0.2, generator=torch.Generator().manual_seed(self.seed)))
        return module


@dataclass(frozen=True)
class LoudWan(Loud, Wan):
    pass


@dataclass(frozen=True)
class LoudCausal(Loud, WanCausal):
    pass


class NoMemory:
    frames = 0

    def reset(self):
        pass

    def rewind(self):
        pass


class Net(nn.Module):
    """The flow, or the logit, of a point at a time."""

    def __init__(self, width: int, judges: bool):
        super().__init__()
        self.blocks = nn.ModuleList()
        self.body = nn.Sequential(nn.Linear(2 + 8 + 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.flow = nn.Linear(width, 2)
        self.branch = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)) if judges else None

    def forward(self, x, timestep, *, judge=False, detach=False, cache=None, write=False, first_position=0, **cond):
        t = timestep.expand(len(x), 1) / 1000
        waves = [wave(t * k) for k in (1, 2, 5, 10) for wave in (torch.sin, torch.cos)]
        side = cond.get("side", x.new_full((len(x), 1), -1))
        told = (side == torch.arange(2)).float()
        hidden = self.body(torch.cat([x.flatten(1), *waves, told], dim=1))
        if judge:
            return self.branch(hidden.detach() if detach else hidden)
        return self.flow(hidden).view_as(x)

    def new_cache(self, frames=None, graded=0):
        return NoMemory()


class Known(nn.Module):
    """The flow of the mixture; with `side` of cond that of one mode, where it is 0 or 1."""

    def forward(self, x, timestep, *, side=None, **_):
        t = (timestep.expand(len(x), 1) / 1000)[..., None]
        points = x.flatten(1)[:, None]
        variance = (1 - t) ** 2 * SPREAD**2 + t**2
        off = points - (1 - t) * MODES
        weight = SHARES.log() - off.square().sum(2) / (2 * variance[..., 0])
        if side is not None:
            weight = torch.where((side < 0) | (torch.arange(2) == side), weight, -1e9)
        estimates = MODES + (1 - t) * SPREAD**2 / variance * off
        mean = (weight.softmax(1)[..., None] * estimates).sum(1)
        return ((x.flatten(1) - mean) / t[:, 0]).view_as(x)


@dataclass(frozen=True)
class Points:
    """The spec of a small network on points, which may be of any of the roles."""

    width: int = 64
    seed: int = 0
    shift: float = 1.0
    steps_at: tuple[float, ...] = (1.0, 0.7, 0.4)
    known: bool = False

    @property
    def chunks(self):
        return Chunks(1)

    def times(self, steps):
        return shifted(steps, self.shift)

    def tensor_plan(self):
        return None

    def build(self):
        return Known() if self.known else Net(self.width, False)

    def load(self, module, device):
        return seeded(module, self.seed)

    def read(self, module):
        return LatentDenoiser(module, GaussianPath(), Flow())


@dataclass(frozen=True)
class Judged(Discriminator):
    """A critic with a branch, on points."""

    trunk: Wan = field(default_factory=lambda: Wan(size=SIZE, shift=1.0))
    width: int = 64

    def __post_init__(self):
        pass

    def build(self):
        return Net(self.width, True)

    def load(self, module, device):
        return seeded(module, 3)

    def read(self, module):
        return Judge(module, GaussianPath(), Flow())


@dataclass(frozen=True)
class TwoModes:
    """Real points; with `told` the condition says which mode a point is of, and -1 nothing."""

    told: bool = False
    share: float = 0.3

    def open(self, seed: int, device: torch.device) -> Source:
        def source(samples: Sequence[int], keys: Keys) -> Batch:
            draw = seeds.keys(seed, "points", list(samples), device=device)
            side = (draw.fold("side").uniform(1) > self.share).long()
            points = MODES[side[:, 0]] + SPREAD * draw.fold("point").normal(2)
            cond = {"side": side} if self.told else {}
            nothing = {"side": torch.full_like(side, -1)} if self.told else {}
            return Batch(points.view(-1, 1, 2, 1, 1), keys, cond, nothing)

        return source


@dataclass(frozen=True)
class Clips:
    """Latents `[T, 4, 4, 4]` with trajectories `[K + 1, T, 4, 4, 4]` and texts, each a function of its number."""

    frames: int = 4
    states: int = 3

    def open(self, seed: int, device: torch.device) -> Source:
        def source(samples: Sequence[int], keys: Keys) -> Batch:
            draw = seeds.keys(seed, "clips", list(samples), device=device)
            states = draw.fold("states").normal(self.states, self.frames, 4, 4, 4)
            text, nothing = draw.fold("text").normal(3, 8), torch.zeros(len(samples), 3, 8, device=device)
            return Batch(states[:, -1], keys, {"text": text}, {"text": nothing}, trajectory=states)

        return source


def seeded(module: nn.Module, seed: int) -> nn.Module:
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(seeds.key_of(seed, name))
        bound = parameter.shape[-1] ** -0.5
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return module


def share_of_first(points: Tensor) -> float:
    """How many points are of the first mode; each must be near one of the two."""
    off = (points.flatten(1)[:, None] - MODES).norm(dim=2)
    return (off[:, 0] < off[:, 1]).float().mean().item()


def far(points: Tensor) -> float:
    """The share of points that belong to no mode."""
    off = (points.flatten(1)[:, None] - MODES).norm(dim=2)
    return (off.min(1).values > 3 * SPREAD).float().mean().item()

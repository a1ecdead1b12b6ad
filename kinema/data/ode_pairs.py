"""Trajectories of a teacher's ODE from noise to data, made once: a causal student is taught to jump along them.

The pairing of noise and video that the ODE gives is what the few-step student imitates first (arXiv 2412.07772, 3.4). A
bidirectional teacher's video depends on the noise of later frames too, which a causal student cannot see: its targets
are then averages. `consistency.py` starts a student without that flaw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.data.latents import stacked
from kinema.data.pool import clip_of
from kinema.data.prompts import PromptSet, Rows, prompted
from kinema.data.shards import Item, Make, Shards
from kinema.diffusion.guidance import guided
from kinema.errors import UsageError, UserError
from kinema.models.protocols import BackboneSpec, TextSpec
from kinema.seeds import Keys

KIND = "ode_pairs"


@dataclass(frozen=True)
class OdePairs:
    """Batches of trajectories from a folder of `MakeOdePairs`; the video is their end.

    times     what the trajectories must have been kept at, without the final 0: the student's `steps_at`
    rows      the length embeddings are padded to; 0: the longest of the batch
    resident  keep everything on the device once it is read; needs `rows`
    """

    path: str
    times: tuple[float, ...]
    rows: int = 0
    resident: bool = False

    def open(self, seed: int, device: torch.device) -> Source:
        """Raises UserError if the folder is missing or unfinished, or its trajectories were kept at other times."""
        if not Path(self.path).exists():
            raise UserError(
                f"there are no trajectories in {self.path}; make them with kinema prepare sprites:ode_pairs (of Wan "
                "2.1: self_forcing:ode_pairs), or name their folder"
            )
        shards = Shards(Path(self.path), KIND)
        there = shards.header["times"]
        if len(there) != len(self.times) + 1 or any(abs(a - b) > 1e-6 for a, b in zip(there, self.times, strict=False)):
            raise UserError(
                f"{self.path} keeps its trajectories at {_list(there)}, but the student steps at "
                f"{_list((*self.times, 0.0))}; prepare them with the student's steps"
            )
        nothing = shards.unconditional()
        read = Rows(shards, ("text", "trajectory"), self.rows, self.resident, device)

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            numbers = [clip_of(seed, n, len(shards), 1) for n in samples]
            rows, captions = read(numbers), tuple(shards.prompt(number) for number in numbers)
            trajectory = stacked(rows["trajectory"], numbers, self.path)
            batch = prompted(keys, rows["text"], nothing, self.rows, captions)
            states = trajectory.to(device, torch.float32, non_blocking=True)
            return replace(batch, video=states[:, -1], trajectory=states)

        return source


@dataclass(frozen=True)
class MakeOdePairs:
    """Runs a teacher's guided ODE on prompts: a preparation.

    Items: `trajectory` `[K + 1, T, C, h, w]` from noise to data, `text` `[n, D]`.

    shape     (T, C, h, w) of the latents
    steps     Euler steps on the teacher's own grid; a multiple of `keep`, so that all kept times are on it
    keep      states kept evenly from noise on (K), besides the end
    guidance  w of uncond + w·(cond - uncond)
    batch     prompts that run together
    compute   of the teacher: the ODE is integrated in float32
    """

    prompts: PromptSet
    text: TextSpec
    teacher: BackboneSpec
    shape: tuple[int, int, int, int]
    steps: int = 48
    keep: int = 4
    guidance: float = 6.0
    seed: int = 0
    batch: int = 1
    per_shard: int = 64
    compute: str = "float32"
    dtype: str = "float16"

    def __post_init__(self):
        if self.steps < 1 or self.steps % self.keep:
            fits = max(self.keep, self.steps - self.steps % self.keep)
            raise UsageError(f"{self.steps} steps cannot keep {self.keep} states evenly; use {fits}")

    def times(self) -> tuple[float, ...]:
        """Where states are kept, the final 0 among them."""
        return (*self.teacher.times(self.steps)[:: self.steps // self.keep], 0.0)

    def header(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "items": len(self.prompts.prompts()),
            "times": self.times(),
            "shape": self.shape,
            "steps": self.steps,
            "guidance": self.guidance,
            "teacher": repr(self.teacher),
            "encoder": self.text.path,
            "unconditional": self.text.unconditional,
            "seed": self.seed,
            "batch": self.batch,
            "compute": self.compute,
            "dtype": self.dtype,
        }

    def open(self, device: torch.device) -> tuple[Make, Tensor]:
        prompts, text, kept = self.prompts.prompts(), self.text.load(device), getattr(torch, self.dtype)
        module = self.teacher.load(self.teacher.build(), device).eval().requires_grad_(False)
        denoiser, times = self.teacher.read(module), self.teacher.times(self.steps)

        def make(numbers: range) -> list[Item]:
            items = []
            for start in range(numbers.start, numbers.stop, self.batch):
                part = range(start, min(start + self.batch, numbers.stop))
                told = [prompts[n] for n in part]
                cond, uncond = text([*told, text.unconditional])["text"].split([len(told), 1])
                draw = seeds.keys(self.seed, "ode", list(part), device=device).fold("noise")
                noise = denoiser.path.prior((len(told), *self.shape), draw)
                both = {"text": cond}, {"text": uncond.expand_as(cond)}
                with torch.autocast(device.type, torch.bfloat16, enabled=self.compute == "bfloat16"):
                    states = trajectory(
                        guided(denoiser, *both, self.guidance), denoiser.path, noise, times, self.steps // self.keep
                    )
                for n, prompt, video in zip(part, told, states.to(kept), strict=True):
                    items.append(Item(prompts[n], {"trajectory": video, "text": text.embed(prompt).to(kept)}))
            return items

        return make, text.embed(text.unconditional).to(kept)


@torch.no_grad()
def trajectory(denoise: Any, path: Any, x: Tensor, times: Sequence[float], every: int) -> Tensor:
    """`[B, K + 1, T, …]`: the states of Euler's method before steps 0, `every`, 2·`every` …, and its end."""
    states = []
    for i, (time, after) in enumerate(zip(times, (*times[1:], 0.0), strict=True)):
        if i % every == 0:
            states.append(x)
        t, s = (torch.full((len(x), 1), value, device=x.device) for value in (time, after))
        x = path.step(x, t, s, denoise(x, t))
    return torch.stack([*states, x], dim=1)


def _list(times: Sequence[float]) -> str:
    return ", ".join(f"{time:.4g}" for time in times)

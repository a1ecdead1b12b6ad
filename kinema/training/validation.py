"""How wrong a network is about videos it does not learn from, at fixed times and with fixed noise."""

from typing import Any

import torch
from torch import Tensor

from kinema import seeds
from kinema.run import Run
from kinema.training.world import World


class Validator:
    """Opens a run's validation data when it is first asked."""

    def __init__(self, run: Run, device: torch.device):
        assert run.validation is not None
        self.run, self.validation, self.device, self.source = run, run.validation, device, None

    @property
    def every(self) -> int:
        return self.validation.every

    @torch.no_grad()
    def errors(self, reading: Any, world: World, batch: int) -> dict[str, Tensor]:
        """The mean error at each time as `validation/time`; the mean over all ranks is that over all samples.

        `batch` samples are looked at together. The data-parallel ranks share the samples if these divide so.
        """
        wanted, run = self.validation, self.run
        if self.source is None:
            self.source = wanted.data.open(run.seed, self.device)
        shared = wanted.samples % world.copies == 0
        numbers = list(range(wanted.samples))[world.copy :: world.copies] if shared else list(range(wanted.samples))
        sums = {f"validation/{time:g}": torch.zeros((), device=self.device) for time in wanted.times}
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            keys = seeds.keys(run.seed, "validation", part, list(range(len(part))), len(part), self.device)
            sample = self.source(part, keys)
            for time, name in zip(wanted.times, sums, strict=True):
                t = torch.full((len(part), 1), time, device=self.device)
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=run.plan.compute == "bfloat16", cache_enabled=False
                ):
                    error = reading.loss(sample.video, t, sample.cond, keys.fold(name))
                sums[name] += error.mean(1).sum()
        return {name: total / len(numbers) for name, total in sums.items()}

"""The moving average of a role's weights: a second network of the same spec, laid over the ranks like the first, whose
float32 tensors are the average itself."""

import torch
from torch import Tensor, nn

from kinema.models.weights import load_into, tensors
from kinema.objectives.objective import Role
from kinema.run import Plan
from kinema.training import parallel
from kinema.training.parallel import local
from kinema.training.world import World

TOGETHER = 64  # tensors moved by one kernel: enough to launch few, few enough to need little memory


class Average:
    """`module` holds the average and can be read and sampled from like the trained network, which it never touches."""

    def __init__(self, role: Role, trained: nn.Module, plan: Plan, world: World):
        assert role.ema is not None
        self.config = role.ema
        module = role.spec.build().eval().requires_grad_(False)
        parallel.lay_out(module, role.spec, plan, world, role.shards, learns=False)
        self.module = load_into(module, tensors(trained).items(), world.device)
        ours = dict(self.module.named_parameters())
        pairs = [(ours[name], p) for name, p in trained.named_parameters() if p.requires_grad]
        self._averages: list[Tensor] = [local(average) for average, _ in pairs]
        self._weights: list[Tensor] = [local(p) for _, p in pairs]

    @torch.no_grad()
    def update(self, number: int, skip: Tensor) -> None:
        """After the role's update `number` (0 is the first); `skip` `[]` is 1 where that update was thrown away."""
        keep = self.config.keep_at(number)
        share = (1 - keep) * (1 - skip)  # a tensor, so that nothing is read back from the device
        for start in range(0, len(self._weights), TOGETHER):
            part = slice(start, start + TOGETHER)
            averages, weights = self._averages[part], self._weights[part]
            if keep == 0:
                torch._foreach_copy_(averages, weights)  # type: ignore[reportPrivateImportUsage]
                continue
            moves = torch._foreach_sub(weights, averages)  # type: ignore[reportPrivateImportUsage]
            torch._foreach_mul_(moves, share)  # type: ignore[reportPrivateImportUsage]
            torch._foreach_add_(averages, moves)  # type: ignore[reportPrivateImportUsage]

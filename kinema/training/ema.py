"""The moving average of a role's weights: a second network of the same spec whose float32 tensors are the average
itself."""

import torch
from torch import Tensor, nn

from kinema.models.protocols import Spec
from kinema.optim import Ema


class Average:
    """`module` holds the average and can be read and sampled from like the trained network, which it never touches."""

    def __init__(self, spec: Spec, config: Ema, trained: nn.Module):
        self.config = config
        self.module = spec.build().eval().requires_grad_(False)
        copies = {name: tensor.detach().clone() for name, tensor in trained.state_dict().items()}
        self.module.load_state_dict(copies, assign=True)
        ours = dict(self.module.named_parameters())
        pairs = [(ours[name], p) for name, p in trained.named_parameters() if p.requires_grad]
        self._averages: list[Tensor] = [a for a, _ in pairs]
        self._weights: list[Tensor] = [p for _, p in pairs]

    @torch.no_grad()
    def update(self, number: int, skip: Tensor) -> None:
        """After the role's update `number` (0 is the first); `skip` `[]` is 1 where that update was thrown away."""
        keep = self.config.keep_at(number)
        weights = self._weights
        if keep == 0:
            torch._foreach_copy_(self._averages, weights)  # type: ignore[reportPrivateImportUsage]
            return
        moves = torch._foreach_sub(weights, self._averages)  # type: ignore[reportPrivateImportUsage]
        share = (1 - keep) * (1 - skip)  # a tensor, so that nothing is read back from the device
        torch._foreach_mul_(moves, share)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_add_(self._averages, moves)  # type: ignore[reportPrivateImportUsage]

"""Several datasets as one: each batch is shared out among them, whatever their sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kinema.data.batch import Batch, Data, Source
from kinema.errors import UsageError
from kinema.seeds import Keys


@dataclass(frozen=True)
class InTurn:
    """Sample n is sample n div k of part n mod k, of k parts whose videos and conditions have the same shapes."""

    parts: tuple[Data, ...]

    def __post_init__(self):
        if not self.parts:
            raise UsageError("data in turn has no parts; give it one or more")

    def open(self, seed: int, device: torch.device) -> Source:
        sources, k = [part.open(seed, device) for part in self.parts], len(self.parts)

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            order, batches = [], []
            for number, read in enumerate(sources):
                places = [place for place, n in enumerate(samples) if n % k == number]
                if places:
                    order += places
                    rows = torch.tensor(places, device=keys.key.device)
                    batches.append(read([samples[place] // k for place in places], keys[rows]))
            back = torch.argsort(torch.tensor(order)).tolist()
            joined = {name: _joined([getattr(b, name) for b in batches], back) for name in ("cond", "uncond")}
            captions = [caption for batch in batches for caption in batch.captions]
            video = torch.cat([batch.video for batch in batches])[back]
            return replace(
                batches[0], video=video, keys=keys, captions=tuple(captions[i] for i in back if captions), **joined
            )

        return source


def _joined(conds: Sequence[dict[str, Tensor]], order: list[int]) -> dict[str, Tensor]:
    return {name: torch.cat([cond[name] for cond in conds])[order] for name in conds[0]}

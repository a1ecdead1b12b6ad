"""A small text encoder and the heads it is taught with: from a caption to the attributes it states.

After training, the encoder alone is kept, in the layout of the Hub, and is frozen: to the generator it is what a large
UMT5 is to Wan. A tiny world needs its own, because a random encoder mixes up which word belongs to which object.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kinema import seeds
from kinema.models.weights import load_into, tensors


@dataclass(frozen=True)
class CaptionReader:
    """A UMT5 encoder (arXiv 2304.09151) of these dimensions; `classes` says how many values each attribute has."""

    vocabulary: int
    classes: tuple[int, ...]
    dim: int = 64
    layers: int = 2
    heads: int = 4
    ffn_dim: int = 128
    seed: int = 0

    def build(self) -> nn.Module:
        with torch.device("meta"):
            return Reader(self)

    def load(self, module: nn.Module, device: torch.device) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.key_of(self.seed, "init"))
            return load_into(module, tensors(Reader(self)).items(), device)

    def read(self, module: nn.Module) -> nn.Module:
        return module

    def tensor_plan(self) -> None:
        return None

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes the encoder, without the heads, as `folder/text_encoder`."""
        assert isinstance(module, Reader)
        module.encoder.half().save_pretrained(folder / "text_encoder")


class Reader(nn.Module):
    """One learned question per attribute looks at the encoder's rows and answers with the attribute's value."""

    def __init__(self, spec: CaptionReader):
        super().__init__()
        from transformers import UMT5Config, UMT5EncoderModel

        config = UMT5Config(
            vocab_size=spec.vocabulary,
            d_model=spec.dim,
            d_kv=spec.dim // spec.heads,
            d_ff=spec.ffn_dim,
            num_layers=spec.layers,
            num_heads=spec.heads,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
        )
        self.encoder = UMT5EncoderModel(config)
        self.questions = nn.Parameter(torch.randn(len(spec.classes), spec.dim) * 0.02)
        self.answers = nn.ModuleList(nn.Linear(spec.dim, n) for n in spec.classes)

    def forward(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Logits `[B, classes[a]]` of each attribute, from token ids and mask `[B, L]`."""
        rows = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        scores = (rows @ self.questions.T.to(rows.dtype)).float().masked_fill(~mask.bool()[..., None], -torch.inf)
        seen = scores.softmax(1).transpose(1, 2).to(rows.dtype) @ rows  # [B, A, D]
        return [answer(seen[:, a]) for a, answer in enumerate(self.answers)]

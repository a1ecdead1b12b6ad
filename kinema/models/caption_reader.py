"""A small text encoder and the heads it is taught with: from a caption to the attributes it states.

After training, the encoder alone is kept, in the layout of the Hub, and is frozen: to the generator it is what a large
UMT5 is to Wan, and a large T5 to CogVideoX. A tiny world needs its own, because a random encoder mixes up which word
belongs to which object.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kinema.models.weights import load_into, self_made


@dataclass(frozen=True)
class CaptionReader:
    """An encoder of these dimensions; `classes` says how many values each attribute has.

    kind  "umt5" (arXiv 2304.09151) does not look at padding; "t5" (arXiv 1910.10683) does, as it does for CogVideoX
    """

    vocabulary: int
    classes: tuple[int, ...]
    kind: Literal["umt5", "t5"] = "umt5"
    dim: int = 64
    layers: int = 2
    heads: int = 4
    ffn_dim: int = 128
    seed: int = 0

    def build(self) -> nn.Module:
        with torch.device("meta"):
            return Reader(self)

    def load(self, module: nn.Module, device: torch.device) -> nn.Module:
        return load_into(module, self_made(lambda: Reader(self), self.seed).items(), device)

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
        from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

        options: dict[str, Any] = {
            "vocab_size": spec.vocabulary,
            "d_model": spec.dim,
            "d_kv": spec.dim // spec.heads,
            "d_ff": spec.ffn_dim,
            "num_layers": spec.layers,
            "num_heads": spec.heads,
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 32,
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
        }
        self.masked = spec.kind == "umt5"
        self.encoder = UMT5EncoderModel(UMT5Config(**options)) if self.masked else T5EncoderModel(T5Config(**options))
        self.questions = nn.Parameter(torch.randn(len(spec.classes), spec.dim) * 0.02)
        self.answers = nn.ModuleList(nn.Linear(spec.dim, n) for n in spec.classes)

    def forward(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Logits `[B, classes[a]]` of each attribute, from token ids and mask `[B, L]`."""
        seen_by_encoder = mask if self.masked else torch.ones_like(mask)
        rows = self.encoder(input_ids=ids, attention_mask=seen_by_encoder).last_hidden_state
        scores = (rows @ self.questions.T.to(rows.dtype)).float().masked_fill(~mask.bool()[..., None], -torch.inf)
        seen = scores.softmax(1).transpose(1, 2).to(rows.dtype) @ rows  # [B, A, D]
        return [answer(seen[:, a]) for a, answer in enumerate(self.answers)]

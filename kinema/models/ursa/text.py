"""Prompts to what URSA reads: token ids, padded on the left, which its own embedding table turns into vectors.

The padding is attended to, as in training, so the length is a fact of the weights.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kinema.errors import UserError
from kinema.models.hub import located
from kinema.models.protocols import Cond

NEGATIVE = "worst quality, low quality, inconsistent motion, static, still, blurry, jittery, distorted, ugly"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QwenText:
    """Where the tokenizer is and how it is used.

    path           a pipeline's folder with `tokenizer/`, or a Hub id
    length         of every row of ids; what is longer loses its end and is counted
    unconditional  the text that stands for no text, in training's dropout as in guidance
    motion         how much the video should move, told before the prompt as `motion=9.0, `; None tells nothing
    """

    path: str
    length: int = 320
    unconditional: str = ""
    motion: float | None = None

    def load(self, device: torch.device | str) -> "PromptTokenizer":
        """Raises UserError if there is no tokenizer at `path`. A folder is never downloaded."""
        from transformers import AutoTokenizer

        folder = located(self.path, "tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, subfolder="tokenizer")
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"no tokenizer at {self.path} ({reason}); give a folder with tokenizer") from error
        return PromptTokenizer(self, tokenizer, torch.device(device))


class PromptTokenizer:
    """An opened tokenizer. `seen` and `truncated` count the prompts so far and those that were too long."""

    def __init__(self, spec: QwenText, tokenizer: Any, device: torch.device):
        self.spec, self.device, self.tokenizer = spec, device, tokenizer
        self.seen = self.truncated = 0

    @property
    def unconditional(self) -> str:
        return self.spec.unconditional

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """`{"text": [B, length]}` int64."""
        return {"text": self.ids([self.moving(prompt) for prompt in prompts])}

    def moving(self, prompt: str) -> str:
        """The prompt with what it says about motion; the unconditional text stays as it is."""
        told = self.spec.motion is not None and prompt != self.spec.unconditional
        return f"motion={self.spec.motion:.1f}, {prompt}" if told else prompt

    def moving_by(self, motion: float) -> "PromptTokenizer":
        """This tokenizer telling another motion, if it tells any."""
        if self.spec.motion is None:
            return self
        return PromptTokenizer(replace(self.spec, motion=motion), self.tokenizer, self.device)

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Ids `[B, length]` of texts as they are."""
        pad, length, rows = self.tokenizer.pad_token_id, self.spec.length, []
        for text in texts:
            ids = self.tokenizer(text).input_ids if text else []
            self.seen += 1
            if len(ids) > length:
                if not self.truncated:
                    log.warning("a prompt has %d tokens, more than %d: its end is cut off", len(ids), length)
                self.truncated += 1
            rows.append([pad] * (length - len(ids)) + ids[:length])
        return torch.tensor(rows, device=self.device)

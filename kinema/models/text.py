"""Prompts to what Wan reads: rows of umT5's encoder (arXiv 2304.09151), which is transformers' and frozen.

Each prompt goes through the encoder alone and at its own length. So an embedding is a function of the prompt, not of
the batch it is first met in, and it can be kept for when the caption comes again.
"""

import html
import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from kinema.errors import UserError
from kinema.models.protocols import Cond
from kinema.models.weights import Weights, load_into, located, open_weights

# What Wan's public pipelines give as the unconditional text.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
ORIGINAL = "models_t5_umt5-xxl-enc-bf16.pth"


@dataclass(frozen=True)
class UMT5:
    """Where the text encoder is and how it is used.

    path           a pipeline's folder with `text_encoder/` and `tokenizer/`, the original release's folder, or a Hub id
    max_tokens     longer prompts are cut
    unconditional  the text that stands for no text, in training's dropout as in guidance
    dtype          "auto" is bfloat16 where the weights are, else float32
    cached         how many prompts' embeddings are kept, those used last
    """

    path: str
    max_tokens: int = 512
    unconditional: str = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cached: int = 1024

    def load(self, device: torch.device | str) -> "PromptEncoder":
        """Raises UserError if encoder or tokenizer are not at `path`, or damaged. A folder is never downloaded."""
        import transformers
        from transformers import AutoTokenizer, UMT5EncoderModel

        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        transformers.utils.logging.disable_progress_bar()  # its own bar for reading a file would break into ours
        logging.getLogger("transformers.modeling_utils").disabled = True  # a UserError says it in a sentence
        folder = located(self.path)
        network_of: Any = UMT5EncoderModel
        try:
            if (folder / ORIGINAL).exists():
                tokenizer = AutoTokenizer.from_pretrained(folder / "google" / "umt5-xxl", local_files_only=True)
                network: Any = original_network(open_weights(folder / ORIGINAL), dtype or torch.bfloat16)
            else:
                where = {
                    "pretrained_model_name_or_path": folder if folder.exists() else self.path,
                    "local_files_only": folder.exists(),
                }
                tokenizer = AutoTokenizer.from_pretrained(**where, subfolder="tokenizer")
                options = {"subfolder": "text_encoder", "dtype": dtype or "auto", "output_loading_info": True}
                network, found = network_of.from_pretrained(**where, **options)
                if missing := sorted(found["missing_keys"]):  # transformers would only warn, and start them at random
                    raise ValueError(f"its file lacks {len(missing)} tensors, the first being {missing[0]}")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"no umT5 text encoder at {self.path} ({reason}); give a folder with text_encoder and tokenizer"
            ) from error
        if dtype is None and next(network.parameters()).dtype == torch.float16:
            network.float()  # half precision overflows in T5's feed-forward layers
        return PromptEncoder(self, tokenizer, network.eval().requires_grad_(False).to(device=device))


class PromptEncoder:
    """An opened text encoder of width D."""

    def __init__(self, spec: UMT5, tokenizer: Any, network: nn.Module):
        self.spec, self.tokenizer, self.network = spec, tokenizer, network
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def unconditional(self) -> str:
        return self.spec.unconditional

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """`{"text": [B, L, D]}`, L a multiple of 8 that holds the longest prompt; rows beyond a prompt are zero."""
        rows = [self.embed(prompt) for prompt in prompts]
        longest = max(len(row) for row in rows)
        return {"text": _padded(rows, min(self.spec.max_tokens, -(-longest // 8) * 8))}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], length: int) -> Tensor:
        """`[B, length, D]` of many prompts at once, zero beyond each; nothing is kept. UserError if one is longer.

        Its sums are those of `embed` in another order: equal up to rounding, and a function of all the prompts.
        """
        tokens = self.tokenizer([clean(prompt) for prompt in prompts])
        for prompt, ids in zip(prompts, tokens.input_ids, strict=True):
            if len(ids) > length:
                raise UserError(f"{prompt!r} has {len(ids)} tokens, more than the {length} asked for; shorten it")
        batch = self.tokenizer.pad(tokens, padding="max_length", max_length=length, return_tensors="pt").to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            rows = self.network(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return rows * batch.attention_mask[..., None].to(rows.dtype)

    @torch.no_grad()
    def embed(self, prompt: str) -> Tensor:
        """`[n, D]`, a row for each of the prompt's n tokens."""
        text = clean(prompt)
        row = self._kept.pop(text, None)
        if row is None:
            ids = self.tokenizer(text, truncation=True, max_length=self.spec.max_tokens, return_tensors="pt").input_ids
            with torch.autocast(self.device.type, enabled=False):
                row = self.network(input_ids=ids.to(self.device)).last_hidden_state[0]
        self._kept[text] = row
        if len(self._kept) > self.spec.cached:
            self._kept.popitem(last=False)
        return row


def clean(prompt: str) -> str:
    """A prompt as Wan's training saw it: mojibake repaired, HTML entities resolved twice, white space collapsed."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def original_network(weights: Weights, dtype: torch.dtype) -> nn.Module:
    """transformers' encoder filled from the original release's file; all sizes are read from its tensors."""
    from transformers import UMT5Config, UMT5EncoderModel

    shapes = weights.shapes
    try:
        vocabulary, dim = shapes["token_embedding.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        width, ffn_dim = shapes["blocks.0.attn.q.weight"][0], shapes["blocks.0.ffn.fc1.weight"][0]
    except KeyError as error:
        raise UserError(f"{weights.path} is no umT5 encoder (it lacks {error.args[0]}); give {ORIGINAL}") from None
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=width // heads,
        d_ff=ffn_dim,
        num_layers=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        network = UMT5EncoderModel(config)
    load_into(network, from_original(weights), "cpu", dtype, f"{weights.path}, read as the original umT5 release")
    network.encoder.embed_tokens.weight = network.shared.weight
    return network


def from_original(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Renames a stream from the original release's names to transformers'."""
    inside = {
        "norm1": "layer.0.layer_norm",
        "norm2": "layer.1.layer_norm",
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
        **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    }
    top = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
    for name, tensor in named:
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
        renamed = f"encoder.block.{match[1]}.{inside.get(match[2], match[2])}.weight" if match else top.get(name, name)
        yield renamed, tensor


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    return torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])

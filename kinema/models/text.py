"""Prompts to what Wan and CogVideoX read: rows of umT5's or T5's encoder, which are transformers' and frozen.

Each prompt goes through the encoder alone. So an embedding is a function of the prompt, not of the batch it is first
met in, and it can be kept for when the caption comes again.
"""

import difflib
import html
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from kinema.errors import UserError
from kinema.models.hub import located
from kinema.models.protocols import Cond
from kinema.models.weights import Weights, load_into, open_weights

# What Wan's public pipelines give as the unconditional text.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
# What ends and starts a scene, in this order: rows 32100 and 32101 of T5's embedding, which its words do not use.
SCENES = ("<end_scene>", "<start_scene>")
ORIGINAL = "models_t5_umt5-xxl-enc-bf16.pth"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UMT5:
    """Where Wan's text encoder (umT5, arXiv 2304.09151) is and how it is used.

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
        from transformers import AutoTokenizer, UMT5EncoderModel

        folder = located(self.path)
        if not (folder / ORIGINAL).exists():
            return PromptEncoder(self, *_opened(self, UMT5EncoderModel, "umT5", device))
        dtype = torch.bfloat16 if self.dtype == "auto" else getattr(torch, self.dtype)
        with _reported(self.path, "umT5"):
            tokenizer = AutoTokenizer.from_pretrained(folder / "google" / "umt5-xxl", local_files_only=True)
            network = original_network(open_weights(folder / ORIGINAL), dtype)
        return PromptEncoder(self, tokenizer, network.eval().requires_grad_(False).to(device=device))


@dataclass(frozen=True)
class T5:
    """Where CogVideoX's text encoder (T5 1.1, arXiv 1910.10683) is and how it is used.

    path           a pipeline's folder with `text_encoder/` and `tokenizer/`, or a Hub id
    tokens         prompts are padded, or cut, to this length; padding is encoded and attended to like words
    unconditional  what stands for no text, in training's dropout as in guidance: a text, or None for zeros. The public
                   training code drops text to zeros, diffusers' pipeline guides by the embedding of ""
    dtype          "auto" is bfloat16 where the weights are, else float32
    cached         how many prompts' embeddings are kept, those used last
    scene_tokens   prompts may hold `SCENES`, each of which is one token then
    padded         False: prompts are as long as they are, up to `tokens`, and the network is told which rows are words
    """

    path: str
    tokens: int = 226
    unconditional: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cached: int = 64
    scene_tokens: bool = False
    padded: bool = True

    def load(self, device: torch.device | str) -> "T5Encoder":
        """Raises UserError if encoder or tokenizer are not at `path`, or damaged. A folder is never downloaded."""
        from transformers import T5EncoderModel

        tokenizer, network = _opened(self, T5EncoderModel, "T5", device)
        if self.scene_tokens:
            tokenizer.add_tokens(list(SCENES))
        return T5Encoder(self, tokenizer, network)


class PromptEncoder:
    """An opened text encoder of width D."""

    def __init__(self, spec: UMT5, tokenizer: Any, network: nn.Module):
        self.spec, self.tokenizer, self.network = spec, tokenizer, network
        self._kept = _Kept(spec.cached)

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

        def made() -> Tensor:
            ids = self.tokenizer(text, truncation=True, max_length=self.spec.max_tokens, return_tensors="pt").input_ids
            with torch.autocast(self.device.type, enabled=False):
                return self.network(input_ids=ids.to(self.device)).last_hidden_state[0]

        text = clean(prompt)
        return self._kept(text, made)


class T5Encoder:
    """An opened text encoder of width D whose prompts all have the same length; None is the prompt of zeros."""

    def __init__(self, spec: T5, tokenizer: Any, network: nn.Module):
        self.spec, self.tokenizer, self.network = spec, tokenizer, network
        self._kept = _Kept(spec.cached)

    @property
    def unconditional(self) -> str | None:
        return self.spec.unconditional

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def __call__(self, prompts: Sequence[str | None]) -> Cond:
        """`{"text": [B, tokens, D]}`; without padding of the longest's length, with `"valid"` `[B, L]`."""
        rows = [self.embed(prompt) for prompt in prompts]
        if self.spec.padded:
            return {"text": torch.stack(rows)}
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        text = _padded(rows, max(len(row) for row in rows))
        return {"text": text, "valid": torch.arange(text.shape[1], device=text.device) < lengths[:, None]}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str | None], length: int) -> Tensor:
        """`[B, tokens, D]` of many prompts at once; nothing is kept. UserError if `length` is not that of the spec."""
        assert self.spec.padded, "prompts without padding are embedded one by one"
        if length != self.spec.tokens:
            raise UserError(f"prompts of this encoder have {self.spec.tokens} tokens, not {length}; set its tokens")
        rows = self._rows([prompt or "" for prompt in prompts])
        given = torch.tensor([prompt is not None for prompt in prompts], device=rows.device)
        return rows * given[:, None, None].to(rows.dtype)

    @torch.no_grad()
    def embed(self, prompt: str | None) -> Tensor:
        """`[tokens, D]`, or `[n, D]` without padding."""
        if prompt is None:
            return torch.zeros_like(self.embed(""))
        return self._kept(prompt, lambda: self._rows([prompt])[0])

    def _rows(self, prompts: Sequence[str]) -> Tensor:
        ids = self.tokenizer(list(prompts)).input_ids
        for prompt, own in zip(prompts, ids, strict=True):
            if len(own) > self.spec.tokens:
                log.warning("a prompt of %d tokens is cut to %d: %.60s…", len(own), self.spec.tokens, prompt)
        options = {"max_length": self.spec.tokens, "truncation": True, "return_tensors": "pt"}
        options |= {"padding": "max_length"} if self.spec.padded else {}
        padded = self.tokenizer(list(prompts), **options).input_ids
        network: Any = self.network
        known = len(network.get_input_embeddings().weight)
        if int(padded.max()) >= known:
            raise UserError(
                f"the text encoder at {self.spec.path} has {known} tokens and none left for {' and '.join(SCENES)}; "
                "leave transitions between scenes away"
            )
        padded = padded.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self.network(input_ids=padded, attention_mask=torch.ones_like(padded)).last_hidden_state


def unknown_words(tokenizer: Any, prompts: Iterable[str]) -> dict[str, str]:
    """The words of prompts that no token stands for, each with the known word nearest to it, "" if none is.

    Tokenizers written in Python do not say where in the prompt a token is; of these there are none.
    """
    found, known = {}, [word for word in tokenizer.get_vocab() if word.isalpha()]
    for prompt in prompts if tokenizer.is_fast else ():
        tokens = tokenizer(prompt, return_offsets_mapping=True)
        for number, (begin, end) in zip(tokens.input_ids, tokens.offset_mapping, strict=True):
            if number == tokenizer.unk_token_id and (word := prompt[begin:end]) not in found:
                found[word] = next(iter(difflib.get_close_matches(word.lower(), known, 1)), "")
    return found


class _Kept:
    """The `size` values used last, by key."""

    def __init__(self, size: int):
        self.size, self.values = size, OrderedDict[str, Tensor]()

    def __call__(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        value = self.values.pop(key, None)
        self.values[key] = value = make() if value is None else value
        if len(self.values) > self.size:
            self.values.popitem(last=False)
        return value


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


def _opened(spec: UMT5 | T5, kind: Any, name: str, device: torch.device | str) -> tuple[Any, Any]:
    """Tokenizer and frozen network of a folder in the Hub's layout, or of a Hub id."""
    import transformers
    from transformers import AutoTokenizer

    transformers.utils.logging.disable_progress_bar()  # its own bar for reading a file would break into ours
    logging.getLogger("transformers.modeling_utils").disabled = True  # a UserError says it in a sentence
    dtype = "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
    options = {"dtype": dtype, "output_loading_info": True}
    with _reported(spec.path, name):
        tokenizer = AutoTokenizer.from_pretrained(**_where(spec.path, "tokenizer"))
        network, found = kind.from_pretrained(**_where(spec.path, "text_encoder"), **options)
        if missing := sorted(found["missing_keys"]):  # transformers would only warn, and start them at random
            raise ValueError(f"its file lacks {len(missing)} tensors, the first being {missing[0]}")
    if dtype == "auto" and next(network.parameters()).dtype == torch.float16:
        network.float()  # half precision overflows in T5's feed-forward layers
    return tokenizer, network.eval().requires_grad_(False).to(device=device)


def _where(path: str, part: str) -> dict[str, Any]:
    """What transformers is told to read a part of a pipeline's folder; nothing is fetched but by `located`."""
    return {"pretrained_model_name_or_path": located(path, part), "subfolder": part, "local_files_only": True}


@contextmanager
def _reported(path: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        fix = "give a folder with text_encoder and tokenizer"
        raise UserError(f"no {name} text encoder at {path} ({reason}); {fix}") from error


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    return torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])

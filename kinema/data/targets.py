"""What data is prepared for: a family's frozen networks, its shapes, and what of a clip is kept for it.

  wan        `clean` `[T, 16, h, w]` float16, normalised: what its transformer learns
  cogvideox  `mean`, `logvar` `[T, 16, h, w]` bfloat16 of the posterior, unscaled and without padding; `first`
             `[3, H, W]` uint8 where a first frame is a condition
  ttt        the same moments of windows of many pieces of three seconds, with a text for each piece
  ursa       `codes` `[T, h, w]`, uint16 or int32; its texts are kept as words

A latent is a function of the clip alone: each goes through its network by itself.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kinema.data.buckets import Bucket
from kinema.data.listing import Told
from kinema.errors import UserError
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.hub import located
from kinema.models.protocols import CodecSpec, TextSpec
from kinema.models.sizes import check_frames, check_sides
from kinema.models.text import ORIGINAL as ORIGINAL_TEXT
from kinema.models.text import T5
from kinema.models.ursa.codec import URSACodec
from kinema.models.wan.vae_fast_encoder import FastVideoEncoder
from kinema.models.wan.vae_layouts import ORIGINAL

Family = Literal["wan", "cogvideox", "ursa", "ttt"]
PIECE = 3  # seconds of a TTT model's piece: what its attention sees at once
RESAMPLED = "cover, bilinear, nearest in time"  # how frames are read, as part of what latents are
FAST = "FastVideoEncoder 1"  # likewise what computes Wan's: another order of sums has other last bits
SMALL = 128 * 128  # pixels of a frame whose layers are too little work to share out
START, END = 32101, 32100  # rows of T5's table that say that a scene starts and ends, as TTT-Video has them


class Encoder(Protocol):
    """Opened frozen networks."""

    def video(self, pixels: Tensor) -> dict[str, Tensor]:
        """What is kept of a clip `[F, 3, H, W]` uint8."""
        ...


@dataclass(frozen=True)
class Target:
    """A family's model and its native clips. `image`: first frames are kept too.

    model     the folder that codec and text encoder are in
    revision  of the model, where it came from the Hub
    """

    family: Family
    model: str
    codec: CodecSpec
    text: TextSpec
    frames: int
    height: int
    width: int
    fps: int
    image: bool = False
    revision: str = ""

    def facts(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """All that decides what is kept of given pixels and words, as JSON; `digests` are of codec and text encoder."""
        codec: Any = self.codec
        known = {"compute": codec.compute, "sha256": digests["codec"], "class": type(codec).__name__}
        if isinstance(codec, CogVideoXVAE):
            known |= {"chunk": codec.chunk}
        if self.family == "wan":
            known |= {"encoder": FAST}
        return {
            "family": self.family,
            "model": self.model,
            "revision": self.revision,
            "codec": known,
            "text": {**_plain(self.text), "sha256": digests["text"], "class": type(self.text).__name__},
            "stored": STORED[self.family],
            "image": self.image,
            "fps": self.fps,
        }

    def valid(self, frames: int, height: int, width: int) -> object:
        """UsageError for clips that the codec cannot take, with the nearest it can."""
        return _shape_of(self.codec, frames, height, width)

    def unit(self) -> int:
        """What both sides of a clip are multiples of."""
        if isinstance(self.codec, URSACodec):
            return self.codec.size.spatial_stride
        return 16

    def texts(self, told: Sequence[Told], motion: float | None) -> list[dict[str, Any]]:
        """What is kept as texts of a sample: values that say all about each."""
        if self.family == "ttt":
            last = len(told) - 1
            return [
                {"text": one.text, "start": one.scene_start and i > 0, "end": one.scene_end and i < last}
                for i, one in enumerate(told)
            ]
        (one,) = told
        return [{"text": one.text} | ({"motion": motion} if self.family == "ursa" and motion is not None else {})]

    def open_codec(self, device: torch.device) -> Encoder:
        codec = self.codec.load(device)
        kind = {"wan": _Wan, "cogvideox": _CogVideoX, "ttt": _CogVideoX, "ursa": _URSA}[self.family]
        return kind(codec, self.image)

    def open_text(self, device: torch.device) -> "TextKeeper":
        return TextKeeper(self, None if self.family == "ursa" else self.text.load(device))


STORED = {
    "wan": {"clean": "float16, normalised by the codec's mean and deviation"},
    "cogvideox": {"mean": "bfloat16, unscaled", "logvar": "bfloat16"},
    "ttt": {"mean": "bfloat16, unscaled", "logvar": "bfloat16"},
    "ursa": {"codes": "uint16 or int32"},
}


class _Wan:
    def __init__(self, codec: Any, image: bool):
        self.codec = FastVideoEncoder(codec.network, codec.pixels, fused=codec.device.type == "cuda")

    @torch.no_grad()
    def video(self, pixels: Tensor) -> dict[str, Tensor]:
        with _few_threads(pixels):
            return {"clean": self.codec.encode(_floats(pixels, self.codec.device))[0].half()}


class _CogVideoX:
    def __init__(self, codec: Any, image: bool):
        self.codec, self.image = codec, image

    @torch.no_grad()
    def video(self, pixels: Tensor) -> dict[str, Tensor]:
        mean, logvar = self.codec.moments(_floats(pixels, self.codec.device))
        first = {"first": pixels[0]} if self.image else {}
        return {"mean": mean[0].bfloat16(), "logvar": logvar[0].bfloat16(), **first}


class _URSA:
    def __init__(self, codec: Any, image: bool):
        self.codec = codec

    def video(self, pixels: Tensor) -> dict[str, Tensor]:
        codes = self.codec.encode(_floats(pixels, self.codec.device))[0]
        return {"codes": codes.to(torch.uint16 if self.codec.codes <= 1 << 16 else torch.int32)}


class TextKeeper:
    """Texts as they are kept. `encoder` None keeps words alone."""

    def __init__(self, target: Target, encoder: Any):
        self.target, self.encoder = target, encoder

    @torch.no_grad()
    def __call__(self, text: Mapping[str, Any]) -> dict[str, Tensor]:
        if self.encoder is None:
            return {}
        if self.target.family == "ttt":
            return {"text": self._piece(text).bfloat16()}
        return {"text": self.encoder.embed(text["text"]).bfloat16()}

    @torch.no_grad()
    def unconditional(self) -> dict[str, Tensor]:
        words = self.target.text.unconditional
        if self.encoder is None:
            return {}
        if self.target.family == "ttt":
            return {"text": self._piece({"text": words or "", "start": False, "end": False}).bfloat16()}
        return {"text": self.encoder.embed(words).bfloat16()}

    def _piece(self, text: Mapping[str, Any]) -> Tensor:
        """`[n, D]`: T5 on the words alone, without padding, between the rows that mark scenes."""
        encoder, spec = self.encoder, self.target.text
        assert isinstance(spec, T5)
        ids = encoder.tokenizer(text["text"]).input_ids
        ids = ids[: spec.tokens - text["start"] - text["end"] - 1] if len(ids) > spec.tokens - 2 else ids[:-1]
        ids = [*([START] if text["start"] else []), *ids, *([END] if text["end"] else [])]
        ids.append(encoder.tokenizer.eos_token_id)
        rows = encoder.network.get_input_embeddings().weight.shape[0]
        if max(ids) >= rows:
            raise UserError(
                f"the text encoder of {self.target.model} has {rows} rows, none for marks of scenes ({END}, {START}); "
                "leave scene_start and scene_end away"
            )
        batch = torch.tensor([ids], device=encoder.device)
        with torch.autocast(encoder.device.type, enabled=False):
            return encoder.network(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state[0]


def text_key(facts: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    return key_of("text", facts["text"], facts["family"], text)


def sample_key(facts: Mapping[str, Any], source: str, start: float, bucket: Bucket, place: Sequence[float]) -> str:
    """The hash of all that decides what is kept of a clip."""
    known = [facts[name] for name in ("family", "codec", "stored", "image", "fps")]
    return key_of("sample", known, source, round(start, 6), asdict(bucket), [*place], RESAMPLED)


def key_of(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def files_of(path: str, part: str) -> list[Path]:
    """The files that decide what a network of a model's folder does."""
    folder = located(path)
    original = {"vae": (ORIGINAL,), "text_encoder": (ORIGINAL_TEXT, "google/umt5-xxl")}.get(part, ())
    if original and (folder / original[0]).exists():
        there = [folder / name for name in original if (folder / name).exists()]
        return [file for one in there for file in (sorted(one.iterdir()) if one.is_dir() else [one])]
    inside = located(path, part) / part
    inside = inside if inside.is_dir() else folder
    if inside.is_file():
        return [inside]
    kinds = (".safetensors", ".json", ".bin", ".pt", ".pth", ".model", ".txt")
    found = sorted(file for file in inside.rglob("*") if file.suffix in kinds and file.is_file())
    if not found:
        raise UserError(f"there is no {part} in {path}; give a model's folder")
    return found


@contextmanager
def _few_threads(pixels: Tensor) -> Iterator[None]:
    """One thread for small frames: several would wait for each other more than compute while files are decoded."""
    before = torch.get_num_threads()
    if pixels.shape[2] * pixels.shape[3] <= SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _floats(pixels: Tensor, device: torch.device) -> Tensor:
    """`[1, F, 3, H, W]` in [-1, 1]."""
    pixels = pixels.pin_memory() if device.type == "cuda" else pixels
    return pixels[None].to(device, non_blocking=True).float() / 127.5 - 1


def _plain(text: TextSpec) -> dict[str, Any]:
    named = {name: getattr(text, name) for name in ("max_tokens", "tokens", "length", "dtype") if hasattr(text, name)}
    return {"unconditional": text.unconditional, **named}


def _shape_of(codec: CodecSpec, frames: int, height: int, width: int) -> object:
    if isinstance(codec, URSACodec):
        from kinema.models.ursa.codec import latent_shape

        return latent_shape(codec.size, frames, height, width)
    check_frames(frames, 8 if isinstance(codec, CogVideoXVAE) else 4)
    check_sides(height, width, 16)
    return None

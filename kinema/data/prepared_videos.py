"""Batches of videos that `kinema prepare` encoded: for CogVideoX, for long videos of many pieces, and for URSA.

(Wan's are `kinema.data.latents.Latents`.) Posteriors are drawn from anew at every visit, and captions are dropped here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.data.codes import conditioned, told
from kinema.data.first_frame import FirstFrame
from kinema.data.prepared import Prepared, Visits
from kinema.data.targets import PIECE
from kinema.errors import UserError
from kinema.models.cogvideox.vae import STRIDE, CogVideoXVAE
from kinema.models.text import T5
from kinema.models.ursa.codec import URSACodec
from kinema.models.ursa.text import QwenText
from kinema.seeds import Keys


@dataclass(frozen=True)
class PreparedVideos:
    """Latents of videos prepared for CogVideoX, with their captions' embeddings.

    path     the folder that `kinema prepare --for cogvideox` made; codec and text must be those it was made with
    dropout  a caption is replaced by the encoder's unconditional text with this probability
    image    makes the first frame a condition, for image-to-video
    mix      how many buckets share an optimizer step
    """

    path: str
    codec: CogVideoXVAE
    text: T5
    dropout: float = 0.1
    image: FirstFrame | None = None
    mix: int = 1

    def open(self, seed: int, device: torch.device) -> Source:
        data = Prepared(Path(self.path), ("cogvideox",))
        agree(data, "codec", {"chunk": self.codec.chunk})
        agree(data, "text", {"unconditional": self.text.unconditional, "tokens": self.text.tokens})
        if self.image is not None and not data.manifest["image"]:
            raise UserError(
                f"{self.path} has no first frames; prepare it for an image-to-video model, with its --model"
            )
        codec = self.codec.described() if self.image is None else self.codec.load(device)
        nothing = data.unconditional().to(device).float()[None]
        names = ("mean", "logvar", *(("first",) if self.image is not None else ()))
        visits = Visits(data, seed, names, self.mix, pinned=device.type == "cuda")

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            rows = visits(samples, keys.count)
            moved = {name: tensor.to(device, non_blocking=True).float() for name, tensor in rows.tensors.items()}
            latents = codec.latents(moved["mean"], moved["logvar"], keys.fold("posterior"))
            text = torch.stack([text for (text,) in rows.texts]).to(device, non_blocking=True).float()
            dropped, empty = keys.fold("text_drop").uniform(1, 1) < self.dropout, nothing.expand_as(text)
            cond, uncond = {"text": torch.where(dropped, empty, text)}, {"text": empty}
            if self.image is not None:
                image = self.image(codec, moved["first"] / 127.5 - 1, latents.shape[1], keys)
                cond, uncond = {**cond, "image": image}, {**uncond, "image": image}
            return Batch(latents, keys, cond, uncond, tuple(words["text"] for (words,) in rows.words))

        return source


@dataclass(frozen=True)
class PreparedStories:
    """Latents of long videos, `pieces` pieces of three seconds each, with a text `[B, C, S, D]` for every piece.

    path     the folder that `kinema prepare --for ttt` made; longer windows than are asked for give their beginnings
    dropout  all texts of a sample are replaced by the unconditional one with this probability
    rows     the length texts are padded to; 0: the longest of the batch. `valid` `[B, C, S]` says which rows are words
    """

    path: str
    codec: CogVideoXVAE
    text: T5
    pieces: int = 1
    dropout: float = 0.1
    rows: int = 0

    def open(self, seed: int, device: torch.device) -> Source:
        data = Prepared(Path(self.path), ("ttt",))
        agree(data, "codec", {"chunk": self.codec.chunk})
        agree(data, "text", {"unconditional": self.text.unconditional})
        data = data.at_least(self.pieces, self.path)
        codec, nothing = self.codec.described(), data.unconditional()
        frames = PIECE * data.manifest["fps"] // STRIDE * self.pieces + 1
        visits = Visits(data, seed, ("mean", "logvar"), pinned=device.type == "cuda", frames=frames)

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            rows = visits(samples, keys.count)
            mean, logvar = (rows.tensors[name].to(device, non_blocking=True).float() for name in ("mean", "logvar"))
            latents = codec.latents(mean, logvar, keys.fold("posterior"))
            texts = [one[: self.pieces] for one in rows.texts]
            length = self.rows or -(-max(len(text) for one in [*texts, [nothing]] for text in one) // 8) * 8
            text, valid = (tensor.to(device, non_blocking=True) for tensor in padded(texts, length))
            empty, void = (tensor.to(device) for tensor in padded([[nothing]], length))
            empty, void = empty.expand_as(text), void.expand_as(valid)
            dropped = keys.fold("text_drop").uniform(1, 1, 1) < self.dropout
            cond = {"text": torch.where(dropped, empty, text), "valid": torch.where(dropped[..., 0], void, valid)}
            captions = tuple(" ".join(words["text"] for words in one[: self.pieces]) for one in rows.words)
            return Batch(latents, keys, cond, {"text": empty, "valid": void}, captions)

        return source


@dataclass(frozen=True)
class PreparedCodes:
    """Codes of videos prepared for URSA, with their captions as ids.

    path         the folder that `kinema prepare --for ursa` made with `codec`
    dropout      a caption is replaced by the unconditional text with this probability
    motion_told  how often a caption with a known motion score says it
    """

    path: str
    codec: URSACodec
    text: QwenText
    dropout: float = 0.1
    motion_told: float = 0.6
    mix: int = 1

    def open(self, seed: int, device: torch.device) -> Source:
        data, text = Prepared(Path(self.path), ("ursa",)), self.text.load(device)
        visits = Visits(data, seed, ("codes",), self.mix, texts=False, pinned=device.type == "cuda")
        nothing, codes = text.ids([text.unconditional]), self.codec.size.codes

        def source(samples: Sequence[int], keys: Keys) -> Batch:
            rows = visits(samples, keys.count)
            video = rows.tensors["codes"].to(device, non_blocking=True).long()
            if int(rows.tensors["codes"].int().max()) >= codes:
                raise UserError(
                    f"{self.path} has codes beyond the {codes} of {self.codec.path}; prepare it with that model"
                )
            tells = [seeds.shared(1 << 24, seed, "motion", n) / (1 << 24) < self.motion_told for n in samples]
            said = zip((words for (words,) in rows.words), tells, strict=True)
            captions = tuple(told(words["text"], words.get("motion"), tell) for words, tell in said)
            return conditioned(video, text.ids(captions), nothing, keys, self.dropout, captions)

        return source


def padded(texts: Sequence[Sequence[Tensor]], length: int) -> tuple[Tensor, Tensor]:
    """Texts `[n, D]` of pieces as `[B, C, length, D]` float32, and which rows are words `[B, C, length]`."""
    longest = max(len(text) for one in texts for text in one)
    if longest > length:
        raise UserError(f"a text has {longest} tokens, more than the {length} rows of the data; raise run.data.rows")
    rows = [torch.stack([F.pad(text.float(), (0, 0, 0, length - len(text))) for text in one]) for one in texts]
    words = [[torch.arange(length) < len(text) for text in one] for one in texts]
    return torch.stack(rows), torch.stack([torch.stack(one) for one in words])


def agree(data: Prepared, part: str, ours: Mapping[str, Any]) -> None:
    """UserError if a folder was prepared in another way than it is to be read."""
    for name, value in ours.items():
        if (there := data.manifest[part].get(name)) != value:
            raise UserError(
                f"{data.folder} was prepared with {part}.{name} {there!r}, but the run has {value!r}; prepare the "
                f"videos again with the run's model, or set run.data.{part}.{name} to what it was prepared with"
            )

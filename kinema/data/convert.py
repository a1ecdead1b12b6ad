"""Data of other systems as kinema's: TTT-Video's list of latents and texts that were embedded before.

Its list is JSON lines of `vid_emb`, a torch file `[T, 2C, h, w]` of a posterior's mean and logarithm of the variance,
and `text_chunk_emb`, one torch file `[n, D]` for each piece of three seconds; paths are relative to the list. Values
are taken as they are, to the bit. (Self-Forcing's LMDB is converted by `public_lmdb.ConvertLMDB`; CogVideo's folders
are videos, which `kinema prepare` reads.)
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.data import store
from kinema.data.buckets import Bucket
from kinema.data.cutting import Planned, Window
from kinema.data.decode import digest
from kinema.data.ledger import finish
from kinema.data.preparing import Report
from kinema.data.scanning import NOTES, Progress
from kinema.data.tables import table
from kinema.data.targets import PIECE, Target, key_of
from kinema.errors import UserError
from kinema.files import write_text

LATENTS = 4 * PIECE  # latent frames of a piece, besides the first of all


def ttt_video(listed: Path, target: Target, folder: Path, device: torch.device, progress: Progress) -> Report:
    """Converts a list into `folder`, as `kinema prepare --for ttt` would have made it; goes on after a kill.

    `target` embeds what stands for no text, which the list does not have. A sample with files that are missing, damaged
    or of other shapes is reported and left out.
    """
    root = listed if listed.is_dir() else listed.parent
    file = next(iter(sorted(listed.glob("*.jsonl"))), listed) if listed.is_dir() else listed
    with store.locked(folder):
        facts = _facts(target)
        path = folder / store.MANIFEST
        if not path.exists():
            if others := [p.name for p in folder.iterdir() if not p.name.startswith((".", NOTES))]:
                raise UserError(f"{folder} holds other things ({others[0]}); choose another folder with -o")
            write_text(path, json.dumps({"format": store.FORMAT, "complete": False, **facts}))
        elif store.read_manifest(folder).get("origin") != facts["origin"]:
            raise UserError(f"{folder} was made otherwise; choose another folder with -o")
        rows = [*table(file)]
        there, said = (store.Reader(folder / part).keys() for part in ("shards", "texts"))
        windows, texts, left_out, made = [], {}, {}, 0
        shards, words = (store.Writer(folder / part, "converted") for part in ("shards", "texts"))
        try:
            if store.UNCONDITIONAL not in said:
                kept = target.open_text(device).unconditional()
                words.put(store.UNCONDITIONAL, kept, {"text": target.text.unconditional})
            with progress("samples", len(rows)) as each:
                for done, row in enumerate(rows, start=1):
                    try:
                        window, told, video = _sample(row, root, there, said)
                    except UserError as error:
                        left_out[f"{file}, row {done}"] = str(error)
                        continue
                    for key, (tensor, record) in told.items():
                        texts[key] = record
                        if tensor is not None:
                            words.put(key, {"text": tensor}, record)
                            said[key] = ""
                    if video is not None:
                        made += 1
                        shards.put(window.key, video, {"video": str(window.video), "bucket": vars(window.bucket)})
                    windows.append(window)
                    if done % 16 == 0 or done == len(rows):
                        each(done)
        finally:
            shards.close()
            words.close()
        if not windows:
            raise UserError(f"nothing of {file} can be converted: {'; '.join(left_out.values())[:300]}")
        there, said = (store.Reader(folder / part).keys() for part in ("shards", "texts"))
        finish(folder, facts, windows, Planned(windows, texts, left_out), there, said, left_out)
    return Report(len(windows), made, 0, left_out)


Told = dict[str, tuple[Tensor | None, dict[str, Any]]]


def _sample(
    row: Mapping[str, Any], root: Path, there: Mapping[str, str], said: Mapping[str, str]
) -> tuple[Window, Told, dict[str, Tensor] | None]:
    """What a row of the list stands for; tensors only of what is not there yet."""
    if not isinstance(row.get("vid_emb"), str) or not isinstance(row.get("text_chunk_emb"), list):
        raise UserError("it has no vid_emb and text_chunk_emb; give TTT-Video's training list")
    latents, pieces = root / row["vid_emb"], [root / str(name) for name in row["text_chunk_emb"]]
    told: Told = {}
    keys = []
    for piece in pieces:
        key = key_of("ttt_video text", _digest(piece))
        keys.append(key)
        told[key] = (None if key in said else _tensor(piece, 2), {"text": "", "file": str(piece)})
    source = _digest(latents)
    video = _tensor(latents, 4)
    if video.shape[1] % 2 or len(video) != LATENTS * len(pieces) + 1:
        raise UserError(
            f"{latents} is {list(video.shape)}, which is not mean and variance of {LATENTS * len(pieces) + 1} latent "
            f"frames, as {len(pieces)} texts need"
        )
    mean, logvar = video.bfloat16().chunk(2, dim=1)
    bucket = Bucket(4 * (len(video) - 1) + 1, 8 * video.shape[2], 8 * video.shape[3])
    key = key_of("ttt_video sample", source)
    window = Window(key, latents, source, 0.0, bucket, (0.5, 0.5), tuple(keys))
    return window, told, None if key in there else {"mean": mean, "logvar": logvar}


def _facts(target: Target) -> dict[str, Any]:
    """As of data that was prepared here, as far as it is known."""
    digests = {"codec": "", "text": ""}
    return {"origin": "ttt_video", **target.facts(digests)}


def _digest(path: Path) -> str:
    try:
        return digest(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error


def _tensor(path: Path, dims: int) -> Tensor:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or holds more than a tensor ({reason})") from error
    if isinstance(content, Tensor) and content.ndim == dims + 1 and len(content) == 1:
        content = content[0]
    if not isinstance(content, Tensor) or content.ndim != dims:
        raise UserError(f"{path} holds no tensor of {dims} dimensions")
    return content

"""Judge a generator: make the videos of many captions, read them with the oracle, score them against what was asked.

Latents are written batch by batch, so an evaluation that was killed goes on where it stopped and can be scored again.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.data.captions import parse
from kinema.data.scenes import Scene
from kinema.data.sprites import World, render
from kinema.data.video import write_video
from kinema.errors import UserError
from kinema.evaluation.scores import Scores, score
from kinema.pretrained import Pretrained

SHOWN = 12  # videos written beside the scores, for the report
HELD_OUT = World(split="heldout", seed=1)  # combinations no training caption has; another seed than any training world


def held_out(n: int, world: World = HELD_OUT) -> tuple[list[str], list[Scene]]:
    """The first n held-out captions and what they ask for."""
    clips = [world.clip(index) for index in range(n)]
    return [caption for _, caption in clips], [scene for scene, _ in clips]


def understood(captions: Sequence[str]) -> list[Scene]:
    """What captions of a user's file ask for; raises UserError for one that is not of the sprites grammar."""
    scenes = []
    for number, caption in enumerate(captions, 1):
        if (scene := parse(caption)) is None:
            raise UserError(
                f"caption {number} ({caption[:60]!r}) is not a sprites caption, so the oracle cannot judge it; "
                f"write it like {HELD_OUT.clip(0)[1]!r}"
            )
        scenes.append(scene)
    return scenes


def videos_of(
    model: Pretrained,
    captions: Sequence[str],
    folder: Path,
    seed: int = 0,
    batch: int = 32,
    each: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Pixels `[B, T, 3, H, W]` of all captions; latents already in `folder` are not made again.

    Raises UserError if the folder holds latents of another model, other captions, or other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    what = {"model": model.name, "seed": seed, "batch": batch, "captions": list(captions), **model.settings()}
    _claim(folder / "settings.json", what)
    made = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        path = folder / f"latents-{start:06d}.safetensors"
        if path.exists():
            latents = load_file(path)["latents"].to(model.studio.codec.device)
        else:
            latents = model.studio.latents(model.spec, model.denoiser, part, range(start, start + len(part)), seed)
            draft = path.with_suffix(".new")
            save_file({"latents": latents.cpu().contiguous()}, draft)
            draft.replace(path)
        made.append(model.studio.codec.decode(latents).cpu())
        each(start + len(part))
    return torch.cat(made)


def evaluate(
    model: Pretrained,
    captions: Sequence[str],
    scenes: Sequence[Scene],
    folder: Path,
    seed: int = 0,
    batch: int = 32,
    each: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Scores of the model's videos, also written to `folder/scores.json`."""
    began = time.monotonic()
    videos = videos_of(model, captions, folder, seed, batch, each)
    scores = score(videos, scenes)
    (folder / "videos").mkdir(exist_ok=True)
    for number, video in enumerate(videos[:SHOWN]):
        write_video(folder / "videos" / f"{number:03d}.mp4", video, model.studio.pipeline.fps, upscale=3)
    result = {
        "model": model.name,
        "n": len(captions),
        "seed": seed,
        **model.settings(),
        "device": str(model.studio.codec.device),
        "seconds": round(time.monotonic() - began, 1),
        "scores": json.loads(scores.to_json()),
        "windows": windows(videos, scenes),
    }
    draft = folder / "scores.new"
    draft.write_text(json.dumps(result, indent=1))
    draft.replace(folder / "scores.json")
    return scores


def windows(videos: Tensor, scenes: Sequence[Scene], length: int = HELD_OUT.frames) -> list[dict]:
    """How the scores of videos longer than a clip change with time: those of each further `length` frames.

    What a motion looks like depends on the length of a clip, so it is only comparable between windows.
    """
    if videos.shape[1] <= length:
        return []
    starts = range(0, videos.shape[1] - length + 1, length)
    parts = ((start, videos[:, start : start + length]) for start in starts)
    return [{"first": start, "scores": json.loads(score(part, scenes).to_json())} for start, part in parts]


def reference(world: World, scenes_of: Sequence[int]) -> Tensor:
    """The true videos of a world's clips, for the Fréchet distance and for showing beside generated ones."""
    return render(world, list(scenes_of))


def _claim(path: Path, what: dict) -> None:
    if path.exists():
        there = json.loads(path.read_text())
        for key in what:
            if there.get(key) != what[key]:
                raise UserError(
                    f"{path.parent} holds the evaluation of another {key}; choose another folder with --out, or "
                    f"delete it"
                )
        return
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(what, indent=1))
    draft.replace(path)

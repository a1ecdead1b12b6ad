"""Judge a generator: make the videos of many captions, read them with the oracle, score them against what was asked.

Latents are written batch by batch, so an evaluation that was killed goes on where it stopped and can be scored again.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.data.captions import parse
from kinema.data.scenes import Scene
from kinema.data.sprites import World, render_scenes
from kinema.data.video import write_video
from kinema.errors import UserError
from kinema.evaluation import frechet
from kinema.evaluation.looking import look
from kinema.evaluation.scores import Scores, judge, score
from kinema.files import write_text
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
    what = {"model": model.name, "weights": model.weights, "seed": seed, "batch": batch, "captions": list(captions)}
    what |= model.settings()
    _claim(folder / "settings.json", what)
    made = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        path = folder / f"latents-{start:06d}.safetensors"
        if path.exists():
            latents = _latents(path).to(model.studio.codec.device)
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
    jobs: int = 1,
    truth: Tensor | None = None,
) -> Scores:
    """Scores of the model's videos, also written to `folder/scores.json`; `jobs` processes read them.

    They include the Fréchet distance to as many rendered videos of the same scenes, if there are two or more: `truth`
    are the features of these, where they are known.
    """
    began = time.monotonic()
    videos = videos_of(model, captions, folder, seed, batch, each)
    readings, features = look(videos, jobs)
    scores = judge(readings, scenes)
    if len(videos) > 1:
        truth = look(rendered(scenes, videos.shape[1]), jobs)[1] if truth is None else truth
        apart = frechet.score(features, truth)
        scores = Scores({**scores.scores, "Fréchet distance": apart})
    show(videos, folder, model.studio.pipeline.fps)
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
    write_json(folder / "scores.json", result)
    return scores


def show(videos: Tensor, folder: Path, fps: int) -> None:
    """Writes the first videos into `folder/videos`, small ones three times as large."""
    (folder / "videos").mkdir(exist_ok=True)
    for number, video in enumerate(videos[:SHOWN]):
        write_video(folder / "videos" / f"{number:03d}.mp4", video, fps, upscale=3 if video.shape[-1] < 256 else 1)


def windows(videos: Tensor, scenes: Sequence[Scene], length: int = HELD_OUT.frames) -> list[dict]:
    """How the scores of videos longer than a clip change with time: those of each further `length` frames.

    What a motion looks like depends on the length of a clip, so it is only comparable between windows.
    """
    if videos.shape[1] <= length:
        return []
    starts = range(0, videos.shape[1] - length + 1, length)
    parts = ((start, videos[:, start : start + length]) for start in starts)
    return [{"first": start, "scores": json.loads(score(part, scenes).to_json())} for start, part in parts]


def rendered(scenes: Sequence[Scene], frames: int) -> Tensor:
    """True videos `[B, frames, 3, 64, 64]` of the scenes, placed as those of `HELD_OUT` are."""
    return render_scenes(replace(HELD_OUT, frames=frames), scenes, HELD_OUT.keys(range(len(scenes))))


def latents_in(folder: Path, n: int, batch: int) -> Iterator[tuple[int, Tensor]]:
    """(number of the first, latents) of the batches of a finished evaluation."""
    return ((start, _latents(folder / f"latents-{start:06d}.safetensors")) for start in range(0, n, batch))


def write_json(path: Path, content: dict) -> None:
    """Writes a file that appears whole or not at all."""
    write_text(path, json.dumps(content, indent=1))


def read_json(path: Path) -> dict:
    """A file that an evaluation wrote. Raises UserError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); delete {path.parent} and evaluate again") from error


def _latents(path: Path) -> Tensor:
    try:
        return load_file(path)["latents"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); delete that file and evaluate again") from error


def _claim(path: Path, what: dict) -> None:
    if path.exists():
        there = read_json(path)
        for key in what | there:  # what only one of them has, too: a model that is not fast says nothing of it
            if there.get(key) != what.get(key):
                raise UserError(
                    f"{path.parent} holds the evaluation of {_other(key)}; "
                    "choose another folder with --out, or delete it"
                )
        return
    write_json(path, what)


def _other(key: str) -> str:
    if key in ("fast", "fp8", "fp8_attention"):
        return f"the same model with or without --{key.replace('_', '-')}"
    return f"other {key}" if key.endswith("s") else f"another {key}"

"""Long videos from stories: a prompt for each segment in, one video file out, in memory that a segment bounds.

Everything is denoised together, and decoded a few frames at a time straight into the file. Each estimate of the network
is kept on the disk until the video is done; so whoever is stopped goes on where they were, to the same video.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema import seeds
from kinema.data.video import write_stream
from kinema.diffusion.guidance import Denoise, guided
from kinema.errors import UserError
from kinema.files import write_text
from kinema.models.text import SCENES
from kinema.sampling import Studio

Each = Callable[[int], None]


@dataclass(frozen=True)
class Scene:
    """What one segment shows. `transition`: it begins a new scene; `negative` is what it shall not show."""

    text: str
    transition: bool = False
    negative: str | None = None


Told = tuple[Scene, ...]
FIELDS: dict[str, type] = {"text": str, "requires_scene_transition": bool, "neg_text": str}


def read_stories(path: Path) -> list[Told]:
    """The stories of a JSON file (a list of them) or of JSON lines (one each).

    A story is a list of scenes, each an object `{"text": …, "requires_scene_transition": false, "neg_text": ""}` or a
    plain string; a string alone is a story of one scene. Raises UserError for anything else.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); give a JSON file of stories in UTF-8") from error
    try:
        if path.suffix == ".jsonl":
            listed = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            listed = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); correct it, or name JSON lines .jsonl") from error
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path} holds no list of stories; write [[scene, scene, …], …]")
    return [_story(story, f"story {n} of {path}") for n, story in enumerate(listed, 1)]


def _story(said: Any, where: str) -> Told:
    scenes = [said] if isinstance(said, str) else said
    if not isinstance(scenes, list) or not scenes:
        raise UserError(f"{where} is no list of scenes; write [scene, scene, …]")
    made = []
    for number, scene in enumerate(scenes, 1):
        scene = {"text": scene} if isinstance(scene, str) else scene
        if not isinstance(scene, dict) or "text" not in scene:
            raise UserError(f'scene {number} of {where} has no text; write "…" or {{"text": "…"}}')
        for key, value in scene.items():
            if key not in FIELDS:
                raise UserError(f"scene {number} of {where} has {key!r}; it can have {', '.join(FIELDS)}")
            if not isinstance(value, FIELDS[key]):
                wanted = "true or false" if FIELDS[key] is bool else "a text in quotes"
                raise UserError(f"{key} of scene {number} of {where} is {json.dumps(value)}; it must be {wanted}")
        given: dict[str, Any] = scene
        made.append(Scene(given["text"], given.get("requires_scene_transition", False), given.get("neg_text") or None))
    return tuple(made)


def texts_of(story: Told) -> list[str]:
    """The prompts of a story: a transition ends the one before and starts its own; the first needs none."""
    texts = [scene.text for scene in story]
    for n, scene in enumerate(story):
        if scene.transition and n:
            texts[n - 1] = f"{texts[n - 1]} {SCENES[0]}"
            texts[n] = f"{SCENES[1]} {texts[n]}"
    return texts


def conditions(studio: Studio, stories: Sequence[Told]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Conditions of videos of one length with and without their prompts, `[B, C, S, D]`."""
    told = [text for story in stories for text in texts_of(story)]
    not_told = [scene.negative or studio.text.unconditional for story in stories for scene in story]
    with torch.no_grad():
        cond, uncond = (
            {name: rows.unflatten(0, (len(stories), -1)) for name, rows in studio.text(texts).items()}
            for texts in (told, not_told)
        )
    return cond, uncond


def frames_of(segments: int, stride: int) -> int:
    """Pixel frames of so many segments of `stride` latent frames."""
    return 4 * segments * stride + 1


def sample_latents(
    studio: Studio,
    spec: Any,
    denoiser: Any,
    conds: tuple[dict[str, Tensor], dict[str, Tensor]],
    seed: int,
    numbers: Sequence[int],
    folder: Path | None = None,
    each: Each = lambda done: None,
    compute: str = "float32",
) -> Tensor:
    """Latents `[B, T, C, h, w]` of the videos with these numbers of a seed. With `folder`, estimates are kept and found
    there."""
    pipeline, (cond, uncond) = studio.pipeline, conds
    segments, device = cond["text"].shape[1], studio.codec.device
    shape = studio.codec.latent_shape(
        frames_of(segments, denoiser.backbone.long.stride), pipeline.height, pipeline.width
    )
    draw = seeds.keys(seed, "story", list(numbers), device=device)
    noise = denoiser.path.prior((len(numbers), *shape), draw.fold("noise"))
    denoise = guided(denoiser, cond, uncond, pipeline.guidance)
    if folder is not None:
        denoise = remembered(denoise, folder)
    sampler: Any = pipeline.sampler
    bfloat16 = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    with torch.no_grad(), bfloat16 if compute == "bfloat16" else nullcontext():
        return sampler(denoise, denoiser.path, noise, spec.times(pipeline.steps), draw.fold("steps"), each)


def remembered(denoise: Denoise, folder: Path) -> Denoise:
    """`denoise` whose answers are kept in `folder`, one file per call; a call that has one is not made again.

    Samplers are functions of the answers and of draws that belong to steps, so the video is the same to the last bit.
    An answer whose file is damaged is made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    calls = 0

    def answer(x_t: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        path, calls = folder / f"{calls:04d}.safetensors", calls + 1
        if path.exists():
            with suppress(SafetensorError, KeyError):
                return load_file(path)["estimate"].to(x_t.device)
        estimate = denoise(x_t, t)
        draft = path.with_suffix(".new")
        save_file({"estimate": estimate.cpu().contiguous()}, draft)
        draft.replace(path)
        return estimate

    return answer


def tell(
    model: Any,
    stories: Sequence[Told],
    out: Path,
    seed: int = 0,
    upscale: int = 1,
    compute: str = "float32",
    each: Each = lambda done: None,
) -> list[Path]:
    """Writes the video of each story into `out` and returns the files; those that are there already stay.

    `model` is a `Pretrained` with a TTT edit; `each(done)` counts network evaluations. UserError if `out` holds videos
    of other stories or settings, or the model makes no long videos.
    """
    studio = model.studio
    if getattr(model.spec, "long", None) is None:
        raise UserError(
            f"{model.name} makes videos of one prompt; train it on stories first (kinema train ttt_video:3s, or "
            "sprites:ttt_1x)"
        )
    what = {"model": model.name, "weights": model.weights, "seed": seed, "compute": compute, "upscale": upscale}
    what |= model.settings()
    what["stories"] = [texts_of(story) for story in stories]
    what["negatives"] = [[scene.negative for scene in story] for story in stories]
    claim(out / "settings.json", what)
    told = [conditions(studio, [story]) for story in stories]
    if studio.codec.device.type == "cuda":  # the text encoder may be larger than all that follows
        studio.text.network.to("cpu")
        torch.cuda.empty_cache()
    files, steps = [], studio.pipeline.steps
    for number, conds in enumerate(told):
        file, kept = out / f"{number:03d}.mp4", out / f"{number:03d}.estimates"
        if not file.exists():
            count = number * steps
            latents = sample_latents(
                studio, model.spec, model.denoiser, conds, seed, [number], kept, lambda n, c=count: each(c + n), compute
            )
            write_stream(file, (part[0].cpu() for part in studio.codec.stream(latents)), studio.pipeline.fps, upscale)
        shutil.rmtree(kept, ignore_errors=True)
        each((number + 1) * steps)
        files.append(file)
    return files


def claim(path: Path, what: dict[str, Any]) -> None:
    """Makes a folder that of `what`, by a file in it. UserError if it is that of something else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(what))
    if not path.exists():
        write_text(path, json.dumps(plain, indent=1))
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise UserError(f"{path} is not what kinema keeps of its settings; choose another folder with --out")
    for key in plain | there:
        if there.get(key) != plain.get(key):
            raise UserError(
                f"{path.parent} holds videos of other {key}; choose another folder with --out, or delete it"
            )

"""How well a long video remembers: a character opens a story and comes back in its last scene, where the caption only
calls it "the first one". The oracle says whether it looks the same.

Latents are written batch by batch, so a measurement that was killed goes on where it stopped.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema import storytelling
from kinema.data.scenes import Story
from kinema.data.sprites import World
from kinema.data.stories import stories_of, told_of
from kinema.data.video import write_video
from kinema.errors import UserError
from kinema.evaluation import oracle
from kinema.evaluation.evaluate import read_json
from kinema.evaluation.looking import look
from kinema.evaluation.scores import Scores, mean, rate
from kinema.files import write_text
from kinema.pretrained import Pretrained

HELD_OUT = World(seed=1)  # stories that no training run is made of
SHOWN = 4
ATTRIBUTES = ("shape", "colour", "size")


def probe(
    model: Pretrained,
    scenes: int,
    n: int,
    folder: Path,
    seed: int = 0,
    batch: int = 8,
    each: Callable[[int], None] = lambda done: None,
    jobs: int = 1,
    rendered: bool = True,
) -> Scores:
    """Scores of `n` stories of so many scenes, also written to `folder/memory.json`; with those of `rendered` stories
    that only went through the model's autoencoder, which no model can beat, as "rendered: …".

    `jobs` processes read the videos. What is measured already is not measured again.

    Raises UserError if the model makes no long videos, or the folder holds another measurement.
    """
    if scenes < 2:
        raise UserError(f"a story of {scenes} scene has nobody who comes back; use 2 scenes or more")
    if getattr(model.spec, "long", None) is None:
        raise UserError(
            f"{model.name} makes videos of one prompt; train it on stories first (kinema train sprites:ttt_1x)"
        )
    began, studio = time.monotonic(), model.studio
    what = {
        "model": model.name,
        "weights": model.weights,
        "scenes": scenes,
        "n": n,
        "seed": seed,
        "batch": batch,
        **model.settings(),
    }
    storytelling.claim(folder / "settings.json", what)
    if (folder / "memory.json").exists():
        found = Scores.of_json(read_json(folder / "memory.json")["scores"])
        if not rendered or "rendered: persistence" in found.scores:
            return found
    made, true = [], []
    for start in range(0, n, batch):
        numbers = list(range(start, min(start + batch, n)))
        stories, captions = told_of(HELD_OUT, numbers, scenes)
        path = folder / f"latents-{start:06d}.safetensors"
        if path.exists():
            latents = load_file(path)["latents"].to(studio.codec.device)
        else:
            told = [tuple(storytelling.Scene(text) for text in texts) for texts in captions]
            conds = storytelling.conditions(studio, told)
            latents = storytelling.sample_latents(studio, model.spec, model.denoiser, conds, seed, numbers)
            draft = path.with_suffix(".new")
            save_file({"latents": latents.cpu().contiguous()}, draft)
            draft.replace(path)
        videos = torch.cat([part.cpu() for part in studio.codec.stream(latents)], dim=1)
        made += readings(videos, stories, jobs)
        if rendered:
            pixels = stories_of(HELD_OUT, numbers, scenes, device=studio.codec.device)[0]
            again = studio.codec.stream(studio.codec.encode(pixels))
            true += readings(torch.cat([part.cpu() for part in again], dim=1), stories, jobs)
        for number, video in zip(numbers, videos, strict=True):
            if number < SHOWN:
                (folder / "videos").mkdir(exist_ok=True)
                write_video(folder / "videos" / f"{number:03d}.mp4", video, studio.pipeline.fps, upscale=3)
        each(start + len(numbers))
    ceiling = remembered(true).scores if rendered else {}
    scores = Scores({**remembered(made).scores, **{f"rendered: {name}": score for name, score in ceiling.items()}})
    result = {**what, "device": str(studio.codec.device), "seconds": round(time.monotonic() - began, 1)}
    write_text(folder / "memory.json", json.dumps({**result, "scores": json.loads(scores.to_json())}, indent=1))
    return scores


def readings(videos: Tensor, stories: Sequence[Story], jobs: int = 1) -> list[tuple[Story, list[oracle.Reading]]]:
    """What the oracle sees in each scene of videos `[B, 1 + scenes · (frames - 1), 3, H, W]`.

    The frame that neighbours share is left out: a scene's first one may still show the one before.
    """
    scenes = len(stories[0].scenes)
    seen, _ = look(videos[:, 1:].unflatten(1, (scenes, -1)).flatten(0, 1), jobs)
    return [(story, seen[n * scenes : (n + 1) * scenes]) for n, story in enumerate(stories)]


def remembered(found: Sequence[tuple[Story, list[oracle.Reading]]]) -> Scores:
    """Rates over stories: "persistence" (the last scene's character looks as it did in the first), its "shape",
    "colour" and "size" alone, "returns" (all scenes in which any character comes back), and "asked for" (the first
    scene shows what its caption says, without which there is little to remember). Means: distances of the last from the
    first."""
    rows: dict[str, list[bool]] = {name: [] for name in ("persistence", *ATTRIBUTES, "asked for")}
    returns, apart = [], {name: [] for name in ATTRIBUTES}
    for story, seen in found:
        compared = oracle.persistence(seen, story)
        last = next(one for one in compared if one.scene == len(story.scenes) - 1)
        first, end = (seen[n].objects[:1] for n in (0, -1))
        rows["persistence"].append(last.same)
        asked = story.scenes[0].sprites[0]
        rows["asked for"].append(bool(first) and all(getattr(first[0], a) == getattr(asked, a) for a in ATTRIBUTES))
        for name in ATTRIBUTES:
            rows[name].append(bool(first and end) and getattr(first[0], name) == getattr(end[0], name))
            apart[name].append(getattr(last, name))
        returns += [one.same for one in compared]
    rates = {name: rate(values) for name, values in rows.items()}
    means = {f"{name} distance": mean(values) for name, values in apart.items()}
    return Scores({**rates, "returns": rate(returns), **means})

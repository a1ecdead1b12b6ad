"""What a stream remembers when its prompt changes: stories of three chapters, told A, B and A again, judged by chapter.

python -m kinema.evaluation.switched sprites-wan-4step --n 32 --window 9 --sink 3 --out DIR

Scores are written as `kinema evaluate --frames` writes them, a window being the last clip's length of a chapter and the
one before it, judged by what its own chapter asks for; `python -m kinema.evaluation.drift` draws them.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kinema import seeds
from kinema.commands import count, device_of, execute, parser_of
from kinema.data.scenes import Scene
from kinema.errors import UserError
from kinema.evaluation.evaluate import HELD_OUT, held_out, show, write_json
from kinema.evaluation.scores import score
from kinema.models.wan.spec import WanCausal
from kinema.pretrained import Pretrained, load

CHUNKS = 6  # of a chapter


def tell(
    model: Pretrained, chapters: Sequence[Sequence[str]], first: int = 0, anew: bool = False
) -> tuple[Tensor, int]:
    """One video for each story, `[B, T, 3, H, W]`, and how many latent frames a chapter has.

    chapters  for each chapter, a prompt for each story
    first     the number of the first story, which decides the noise of each
    anew      what was made is seen again under each new prompt

    UserError for a model that does not stream.
    """
    spec = model.spec
    if not isinstance(spec, WanCausal):
        raise UserError(f"{model.name} does not stream, so its prompt cannot change; give a causal Wan")
    length, batch = CHUNKS * spec.chunk, len(chapters[0])
    draw = seeds.keys(0, "sample", range(first, first + batch), device=model.studio.codec.device)
    options = {"length": length * len(chapters)}
    session = model.studio.session(spec, model.denoiser, chapters[0], draw, **options)
    for number, prompts in enumerate(chapters[1:], 1):
        session.switch(prompts, at=number * length, anew=anew)
    return torch.cat([*session.frames()], dim=1), length


def judged(videos: Tensor, ends: Sequence[int], scenes: Sequence[Sequence[Scene]]) -> list[dict]:
    """The last two windows before each of `ends`, pixel frames, by the scenes of the chapter that ends there."""
    clip, windows = HELD_OUT.frames, []
    for end, asked in zip(ends, scenes, strict=True):
        for first in (end - 2 * clip, end - clip):
            scores = score(videos[:, first : first + clip], asked)
            windows.append({"first": first, "scores": json.loads(scores.to_json())})
    return windows


def main(words: list[str]) -> None:
    p = parser_of("kinema.evaluation.switched", __doc__)
    p.add_argument("model")
    p.add_argument("--n", type=count, default=32, help="stories (%(default)s)")
    p.add_argument("--window", type=int, default=9, help="latent frames a chunk sees (%(default)s)")
    p.add_argument("--sink", type=int, default=0, help="of these, first frames that stay (%(default)s)")
    p.add_argument("--anew", action="store_true", help="see what was made again under each new prompt")
    p.add_argument("--batch", type=count, default=16, help="stories told at once (%(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    p.add_argument("--out", type=Path, help="(runs/switched-SINK)")
    args = p.parse_args(words)
    model = load(args.model, device_of(args.device))
    model = model.with_window(args.window, args.sink) if isinstance(model.spec, WanCausal) else model
    out = args.out or Path(f"runs/switched-{args.sink}")
    out.mkdir(parents=True, exist_ok=True)
    captions, scenes = held_out(2 * args.n)
    videos, length = [], 0
    for i in range(0, args.n, args.batch):
        a, b = captions[: args.n][i : i + args.batch], captions[args.n :][i : i + args.batch]
        made, length = tell(model, [a, b, a], first=i, anew=args.anew)
        videos.append(made)
        print(f"{i + len(a)}/{args.n} stories", flush=True)
    told = torch.cat(videos)
    stride = model.studio.codec.stride[0]
    ends = [1 + stride * (length * k - 1) for k in (1, 2, 3)]
    windows = judged(told, ends, [scenes[: args.n], scenes[args.n :], scenes[: args.n]])
    show(told, out, model.studio.pipeline.fps)
    write_json(out / "scores.json", {"model": model.name, "n": args.n, **model.settings(), "windows": windows})
    for window in windows:
        said = {name: s["value"] for name, s in window["scores"].items() if name in ("shape", "colour", "background")}
        print(f"frames from {window['first']}:", ", ".join(f"{name} {value:.3f}" for name, value in said.items()))


if __name__ == "__main__":
    sys.exit(execute(main))

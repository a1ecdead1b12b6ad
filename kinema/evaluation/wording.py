"""What a wrong word of the caption costs a model of sprites at each time: where on its path what is decided.

python -m kinema.evaluation.wording sprites-cogvideox --n 48
python -m kinema.evaluation.wording runs/sprites-wan --times 1 0.8 0.6 0.4 0.2 --words colour motion

Held-out clips are looked at under noise with their captions and with captions in which one word is another one. The
cost is by how much the model's own error (of its prediction, unweighted) is greater with the wrong word: near 0 where
nothing of the word is decided, since it is seen already or cannot be seen yet.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from kinema import seeds
from kinema.commands import count, device_of, execute, parser_of, several
from kinema.data.captions import caption, key
from kinema.data.sprites import World, render
from kinema.errors import UsageError
from kinema.evaluation.evaluate import HELD_OUT
from kinema.evaluation.scores import Score, mean
from kinema.pretrained import Pretrained, load

WORDS = {"colour": "colours", "size": "sizes", "shape": "shapes", "motion": "motions"}
TIMES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@torch.no_grad()
def costs(
    model: Pretrained, times: Sequence[float], words: Sequence[str] = tuple(WORDS), n: int = 48, batch: int = 16
) -> dict[str, list[Score]]:
    """For each of the words, and for "right", the error with the right caption, a mean over `n` clips at each time.

    Raises UsageError for a model whose videos are not square.
    """
    studio, pipeline = model.studio, model.studio.pipeline
    if pipeline.height != pipeline.width:
        raise UsageError(f"{model.name} makes videos of {pipeline.height}×{pipeline.width}; sprites are square ones")
    world = replace(HELD_OUT, frames=pipeline.frames, size=pipeline.height)
    found: dict[str, list[list[float]]] = {name: [[] for _ in times] for name in ("right", *words)}
    for start in range(0, n, batch):
        numbers = range(start, min(start + batch, n))
        x0 = studio.codec.encode(render(world, numbers, studio.codec.device))
        draw = seeds.keys(0, "wording", list(numbers), device=x0.device)
        told = {"right": world.captions(numbers)}
        told |= {word: [_misworded(world, i, word) for i in numbers] for word in words}
        conds = {name: studio.text(captions) for name, captions in told.items()}
        for place, time in enumerate(times):
            t = torch.full((len(numbers), 1), time, device=x0.device)
            errors = {name: model.denoiser.loss(x0, t, cond, draw).flatten(1).mean(1) for name, cond in conds.items()}
            for name, error in errors.items():
                found[name][place] += (error if name == "right" else error - errors["right"]).tolist()
    return {name: [mean(values) for values in rows] for name, rows in found.items()}


def _misworded(world: World, index: int, word: str) -> str:
    """The clip's caption, in which one thing that is said of its first sprite, and nothing else, is another one."""
    scene, own = world.scene(index), key(world.seed, index)
    first, *others = scene.sprites
    options = [value for value in getattr(world, WORDS[word]) if value != getattr(first, word)]
    wrong = replace(first, **{word: options[seeds.key_of(own, word) % len(options)]})
    return caption(replace(scene, sprites=(wrong, *others)), own)


def table(times: Sequence[float], found: dict[str, list[Score]]) -> str:
    wide = max(map(len, found))
    lines = [f"{'t':{wide}}" + "".join(f"{time:>8g}" for time in times)]
    for name, row in found.items():
        lines.append(f"{name:{wide}}" + "".join(f"{score.value:8.3f}" for score in row))
        lines.append(" " * wide + "".join(f"{f'±{(score.high - score.low) / 2:.3f}':>8}" for score in row))
    return "\n".join(lines)


def main(words: list[str]) -> None:
    parser = parser_of("kinema.evaluation.wording", __doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a shipped name, a folder in diffusers layout, or a run's folder"
    )
    parser.add_argument(
        "--times", type=float, nargs="+", default=TIMES, metavar="T", help="of the path (eleven, from 1 to 0.1)"
    )
    parser.add_argument("--words", nargs="+", choices=WORDS, default=list(WORDS), help="(all)")
    parser.add_argument("--n", type=several, default=48, metavar="N", help="clips (%(default)s)")
    parser.add_argument("--batch", type=count, default=16, metavar="N", help="clips at once (%(default)s)")
    parser.add_argument("--device", type=device_of, default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    args = parser.parse_args(words)
    if outside := [time for time in args.times if not 0 < time <= 1]:
        raise UsageError(f"--times has {outside[0]:g}; times lie above 0 and up to 1, which is pure noise")
    found = costs(load(args.model, args.device), args.times, args.words, args.n, args.batch)
    print(f"error with the right caption, and by how much a wrong word makes it greater ({args.n} clips, 95 %)")
    print(table(args.times, found))


if __name__ == "__main__":
    sys.exit(execute(main))

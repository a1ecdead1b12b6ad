"""What the first scene leaves in an untrained `lact`: how its rates and groups must be for a video of many scenes.

python -m kinema.evaluation.retention --width 160 --tokens 208 --rates 0.1 0.03 --scenes 1 3 6 21

Every scene has `pairs` keys and values of its own, random ones, each said by as many of its tokens. After the last
scene, the keys of the first are read; the share is of those whose answer is nearer (by its angle, means aside) to its
own value than to any other of the video. Training moves rates away from where they start, but it has to start where
something is remembered.
"""

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.commands import count, execute, parser_of, several
from kinema.errors import UsageError
from kinema.models.ttt import large_chunk
from kinema.models.ttt.mixer import normal


def retained(
    width: int, tokens: int, rate: float, scenes: int, whole: bool = False, pairs: int = 8, videos: int = 4
) -> float:
    """The share of a first scene's pairs that is there after `scenes` of so many tokens, for one head of `lact`.

    `whole` takes one step for the whole video instead of one for each scene. Raises UsageError for fewer tokens than
    pairs, some of which nobody would say.
    """
    if tokens < pairs:
        raise UsageError(f"a scene of {tokens} tokens cannot say {pairs} pairs; give it {pairs} or more")
    generator = torch.Generator().manual_seed(0)
    state = tuple(normal((1, 1, width, width), width**-0.5, generator).expand(videos, -1, -1, -1) for _ in range(3))
    keys, values = (F.silu(normal((videos, 1, scenes * pairs, width), 1.0, generator)) for _ in range(2))
    keys = F.normalize(keys, dim=-1)
    k, v = (_said(x, pairs, tokens) for x in (keys, values))
    eta = torch.full((*k.shape[:3], 3), rate)
    groups = (scenes * tokens,) if whole else (tokens,) * scenes
    state = large_chunk.scan(k, k, v, eta, state, large_chunk.lengths_of(state), groups)[1]
    found = _centred(large_chunk.read(state, keys[:, :, :pairs])) @ _centred(values).mT
    return (found.argmax(-1) == torch.arange(pairs)).float().mean().item()


def _said(x: Tensor, pairs: int, tokens: int) -> Tensor:
    """`[B, 1, C · pairs, m]` → `[B, 1, C · tokens, m]`: a scene says its pairs over and over."""
    return x.unflatten(2, (-1, pairs))[:, :, :, torch.arange(tokens) % pairs].flatten(2, 3)


def _centred(x: Tensor) -> Tensor:
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1)


def table(width: int, tokens: int, rates: Sequence[float], scenes: Sequence[int]) -> str:
    lines = [f"{'rate':>7} {'one step for':>13}" + "".join(f"{n:>5} scenes" for n in scenes)]
    for rate in rates:
        for whole in (False, True):
            shares = "".join(f"{retained(width, tokens, rate, n, whole):12.0%}" for n in scenes)
            lines.append(f"{rate:7g} {'the video' if whole else 'each scene':>13}{shares}")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    parser = parser_of("kinema.evaluation.retention", __doc__)
    parser.add_argument("--width", type=several, default=160, metavar="N", help="channels of a head (%(default)s)")
    parser.add_argument("--tokens", type=several, default=208, metavar="N", help="of a scene (%(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.03, 0.01], metavar="X", help="(%(default)s)")
    parser.add_argument("--scenes", type=count, nargs="+", default=[1, 3, 6, 21], metavar="N", help="(%(default)s)")
    args = parser.parse_args(words)
    print(table(args.width, args.tokens, args.rates, args.scenes))


if __name__ == "__main__":
    sys.exit(execute(main))

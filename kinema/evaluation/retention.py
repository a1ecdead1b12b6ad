"""What an untrained mixer remembers of a video of many scenes: how its rates must be for so many tokens and scenes.

python -m kinema.evaluation.retention --mixer lact --width 160 --tokens 168 --rates 0.1 0.03 --scenes 1 3 6 21
python -m kinema.evaluation.retention --mixer ttt_mlp --width 32 --spread 1 --rates 0.3 1 3

Every scene has `pairs` keys and values of its own, random ones, each said by as many of its tokens. After the last
scene the keys are read again, and a pair is there if the answer is nearer (by its angle, means aside) to its own value
than to any other of the video. Training moves rates away from where they start, but it has to start where something is
remembered.
"""

import sys
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.commands import count, execute, parser_of, several
from kinema.errors import UsageError
from kinema.models.ttt.lact import LaCT
from kinema.models.ttt.mixer import normal
from kinema.models.ttt.ttt_layer import TTTMLP, TTTLinear

FastWeights = LaCT | TTTLinear | TTTMLP
WAYS: dict[str, dict[str, FastWeights]] = {
    "lact": {"each scene": LaCT(heads=1, group="segment"), "the video": LaCT(heads=1)},
    "ttt_linear": {"64 tokens": TTTLinear(mini_batch=64)},
    "ttt_mlp": {"64 tokens": TTTMLP()},
}


class Retained(NamedTuple):
    """Shares of pairs that are there: of the first scene, and of all."""

    first: float
    all: float


def retained(mixer: FastWeights, width: int, tokens: int, scenes: int, pairs: int = 8, videos: int = 4) -> Retained:
    """What one head of `width` channels holds after `scenes` of so many tokens, its learned rates being 0.

    Raises UsageError for fewer tokens than pairs, some of which nobody would say.
    """
    if tokens < pairs:
        raise UsageError(f"a scene of {tokens} tokens cannot say {pairs} pairs; give it {pairs} or more")
    generator = torch.Generator().manual_seed(0)
    layer = mixer.build(width, width)
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(mixer.init(name, parameter.shape, generator))
    keys, values = (normal((videos, 1, scenes * pairs, width), 1.0, generator) for _ in range(2))
    if isinstance(mixer, LaCT):
        keys, values = F.silu(keys), F.silu(values)
        rates = torch.full((3,), mixer.base_lr)
    else:
        values = (values - values.mean(-1, keepdim=True)) / values.std(-1, keepdim=True)
        rates = torch.tensor(0.5 * mixer.base_lr / mixer.n / width)
    keys = F.normalize(keys, dim=-1)
    multiple = mixer.walk.multiple

    def scanned(k: Tensor, v: Tensor, groups: tuple[int, ...], state: tuple[Tensor, ...], there: bool):
        fill = -k.shape[2] % multiple
        eta = rates.expand(*k.shape[:3], *rates.shape)
        valid = F.pad(torch.full((videos, k.shape[2]), there), (0, fill))
        k, v = (F.pad(x, (0, 0, 0, fill)) for x in (k, v))
        eta = F.pad(eta, (0, 0) * rates.ndim + (0, fill))
        return layer.scanned((k, k, v, eta), valid, groups, state)

    with torch.no_grad():
        k, v = (_said(x, pairs, tokens) for x in (keys, values))
        state = scanned(k, v, (tokens,) * scenes, layer.initial_state(videos), True)[1]
        answers = scanned(keys, values, (keys.shape[2],), state, False)[0][:, :, : keys.shape[2]]
    if not isinstance(mixer, LaCT):
        answers = answers - keys  # what they add to the query
    found = _centred(answers) @ _centred(values).mT
    there = (found.argmax(-1) == torch.arange(scenes * pairs)).float()
    return Retained(there[..., :pairs].mean().item(), there.mean().item())


def _said(x: Tensor, pairs: int, tokens: int) -> Tensor:
    """`[B, 1, C · pairs, m]` → `[B, 1, C · tokens, m]`: a scene says its pairs over and over."""
    return x.unflatten(2, (-1, pairs))[:, :, :, torch.arange(tokens) % pairs].flatten(2, 3)


def _centred(x: Tensor) -> Tensor:
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1)


def main(words: list[str]) -> None:
    parser = parser_of("kinema.evaluation.retention", __doc__)
    parser.add_argument("--mixer", choices=WAYS, default="lact", help="(%(default)s)")
    parser.add_argument("--width", type=several, default=160, metavar="N", help="channels of a head (%(default)s)")
    parser.add_argument("--tokens", type=several, default=168, metavar="N", help="of a scene (%(default)s)")
    parser.add_argument(
        "--rates", type=float, nargs="+", metavar="X", help="base_lr (its default, for scenes of 17,776 tokens)"
    )
    parser.add_argument("--spread", type=float, metavar="X", help="of the first weights of ttt_linear and ttt_mlp")
    parser.add_argument("--scenes", type=count, nargs="+", default=[1, 3, 6, 21], metavar="N", help="(%(default)s)")
    args = parser.parse_args(words)
    if args.mixer == "lact" and args.spread is not None:
        raise UsageError("lact has no spread; leave --spread out")
    if not all(rate > 0 for rate in [*(args.rates or []), *([] if args.spread is None else [args.spread])]):
        raise UsageError("--rates and --spread must be above 0")
    ways = WAYS[args.mixer]
    spread = {} if args.spread is None else {"spread": args.spread}
    print("shares of pairs that are there, of the first scene / of all")
    print(f"{'base_lr':>8} {'one step for':>13}" + "".join(f"{n:>9} scenes" for n in args.scenes))
    for rate in args.rates or [next(iter(ways.values())).base_lr]:
        for way, mixer in ways.items():
            mixer = replace(mixer, base_lr=rate, **spread)
            shares = [retained(mixer, args.width, args.tokens, n) for n in args.scenes]
            print(f"{rate:8g} {way:>13}" + "".join(f"{share.first:8.0%} /{share.all:5.0%}" for share in shares))


if __name__ == "__main__":
    sys.exit(execute(main))

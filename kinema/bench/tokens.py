"""One-step against many-step URSA at real size on random weights: a JSON line per measurement.

python -m kinema.bench.tokens --size 1.7B --clip 17x256x256 --clip 49x320x512

Times are medians over `--repeats`, after passes that do not count. Random weights take as long as trained ones. The
step of Di[M]O is measured by `python -m kinema.bench.steps bench:ursa_dimo`.
"""

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kinema import seeds
from kinema.bench.measure import forget_peak, peak, random_weights, synchronised
from kinema.commands import count, counts, device_of, execute, parser_of
from kinema.diffusion.guidance import guided
from kinema.diffusion.token_sampling import Jumps
from kinema.errors import UsageError
from kinema.models.attention import backends
from kinema.models.ursa.spec import URSA, Metric
from kinema.models.ursa.tokenizer import FSQSize, FSQVideoTokenizer, latent_frames
from kinema.models.ursa.transformer import SIZES, URSASize
from kinema.training.metrics import machine

TINY = URSASize(dim=64, ffn_dim=128, heads=4, kv_heads=2, layers=2, codes=1920, words=300, bov=290, head_dim=32)
NARROW: dict[str, Any] = {
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 8,
    "levels": (8, 8, 6, 5),
}
Clip = tuple[int, int, int]


def sampling(
    size: str,
    clips: list[Clip],
    steps: tuple[int, ...],
    guidance: float,
    device: torch.device,
    repeats: int,
    dtype: torch.dtype,
    compiled: bool,
) -> Iterator[dict[str, Any]]:
    """A video in one unguided step, and in each of `steps` guided ones, without and with the tokenizer's decoder."""
    spec = URSA(Metric(levels(size), alpha=0.8, c=1.8), dimensions(size))
    module = _network(spec.build(), device, dtype)
    for block in module.blocks if compiled else ():
        block.compile()
    for clip in clips:
        codec = FSQSize(sample_frames=clip[0], **(NARROW if size == "tiny" else {}))
        with torch.device("meta"):
            tokenizer = FSQVideoTokenizer(codec)
        tokenizer = _network(tokenizer, device, dtype)
        for passes, scale in ((1, 1.0), *((n, guidance) for n in steps)):
            line = sampled(spec, module, tokenizer, clip, passes, scale, device, repeats if passes == 1 else 1)
            yield {**line, "clip": "x".join(map(str, clip)), "compiled": compiled}


def sampled(
    spec: URSA,
    module: nn.Module,
    tokenizer: FSQVideoTokenizer,
    clip: Clip,
    steps: int,
    guidance: float,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """One video in so many steps: passes, seconds and memory."""
    frames, height, width = clip
    denoiser, size, unit = spec.read(module), spec.dimensions, tokenizer.size.spatial_stride
    shape = (1, latent_frames(tokenizer.size, frames), height // unit, width // unit)
    draw = seeds.keys(0, "benchmark", [0], device=device)
    cond, uncond = ({"text": draw.fold(name).integers(size.words, size.text_len or 320)} for name in ("a", "b"))
    denoise: Any = guided(denoiser, cond, uncond, guidance)  # type: ignore[arg-type]
    rows = [0]
    hook = module.register_forward_pre_hook(lambda module, given: rows.__setitem__(0, rows[0] + len(given[0])))

    def sample() -> Tensor:
        noise = denoiser.path.prior(shape, draw.fold("noise"))
        return Jumps()(denoise, denoiser.path, noise, spec.times(steps), draw.fold("steps"))

    made, seconds, most = measured(sample, device, repeats, warm=1)
    hook.remove()
    _, decoding, peak_of_tokenizer = measured(lambda: tokenizer.decode(made), device, repeats, warm=1)
    return {
        "steps": steps,
        "guidance": guidance,
        "passes": rows[0] / (1 + repeats),
        "seconds": seconds,
        "seconds_with_tokenizer": seconds + decoding,
        "peak_gib": most,
        "peak_gib_of_tokenizer": peak_of_tokenizer,
        "tokens": made[0].numel(),
    }


def dimensions(size: str) -> URSASize:
    return TINY if size == "tiny" else SIZES[size]


def levels(size: str) -> tuple[int, ...]:
    return NARROW["levels"] if size == "tiny" else FSQSize.levels


def _network(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    return random_weights(module, device, dtype).eval().requires_grad_(False)


def measured(
    work: Callable[[], Tensor], device: torch.device, repeats: int, warm: int
) -> tuple[Tensor, float, float | None]:
    """What `work` gives, its median seconds and the peak of memory in GiB."""
    seconds, made = [], None
    with torch.no_grad():
        for repeat in range(warm + repeats):
            if repeat == warm:
                forget_peak(device)
            synchronised(device)
            began = time.perf_counter()
            made = work()
            if repeat >= warm:
                synchronised(device)
                seconds.append(time.perf_counter() - began)
    assert made is not None
    return made, statistics.median(seconds), peak(device)


def clip_of(text: str) -> Clip:
    """(frames, height, width) of, for example, 17x256x256; UsageError for what the tokenizer cannot take."""
    if not (match := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)):
        raise UsageError(f"--clip is {text}; give it as 17x256x256: frames, height, width")
    frames, height, width = (int(number) for number in match.groups())
    time, unit = FSQSize.temporal_stride, FSQSize.spatial_stride
    if frames % time != 1 or not height or not width or height % unit or width % unit:
        raise UsageError(
            f"--clip is {text}; frames must be 1 + a multiple of {time}, height and width multiples of {unit}, as in "
            "17x256x256"
        )
    return frames, height, width


def main(words: list[str]) -> None:
    parser = parser_of("kinema.bench.tokens", __doc__)
    parser.add_argument("--size", choices=("tiny", "0.6B", "1.7B"), default="1.7B")
    parser.add_argument("--clip", action="append", metavar="FxHxW", help="(default: 17x256x256)")
    parser.add_argument(
        "--steps", type=counts, default=(25,), metavar="N,...", help="guided steps of the many-step sampler (25)"
    )
    parser.add_argument("--guidance", type=float, default=7.0, help="(%(default)s)")
    parser.add_argument("--repeats", type=count, default=5, help="(%(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile each block")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(words)
    clips, device = [clip_of(text) for text in args.clip or ["17x256x256"]], device_of(args.device)
    lines = sampling(
        args.size, clips, args.steps, args.guidance, device, args.repeats, getattr(torch, args.dtype), args.compile
    )
    about = {"size": args.size, "dtype": args.dtype, "attention": backends(device)["order"], "machine": machine()}
    for line in lines:
        print(json.dumps({**line, **about}), flush=True)


if __name__ == "__main__":
    sys.exit(execute(main))

"""What length costs: time and memory of blocks of CogVideoX-5B's width with each mixer, from 3 to 63 seconds.

python -m kinema.evaluation.cost --seconds 3 9 18 30 63 --mixers none ttt_mlp lact gated_deltanet attention

Weights and inputs are random, which changes neither. All is relative to `none`, which has attention inside segments
alone; blocks are alike, so the numbers of a few are those of all but for what surrounds them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinema.commands import count, execute, parser_of
from kinema.errors import UserError
from kinema.models.cogvideox.long import Long
from kinema.models.cogvideox.transformer import SIZES, CogVideoXTransformer, patch_counts
from kinema.models.ttt import door
from kinema.models.ttt.edit import KINDS, MixerKind

TEXT = 226  # tokens of a segment, all of them attended to
SEGMENT = 3  # seconds


def measure(
    spec: MixerKind,
    seconds: int,
    layers: int = 2,
    repeats: int = 3,
    device: str = "cuda",
    train: bool = True,
    **size: Any,
) -> dict[str, float]:
    """Seconds and peak GiB of one pass without gradients, and of one with them and block-wise recomputation; what does
    not fit into the GPU's memory is left out.

    `size` changes fields of the network's size, for a quick look on small machines.
    """
    module = _network(spec, layers, device, size)
    long = module.long
    assert isinstance(long, Long)
    segments = seconds // SEGMENT
    _, rows, columns = patch_counts(module.size.grid, module.size.patch)
    grid = (segments * long.stride + 1, rows, columns)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    text = torch.zeros(1, segments, TEXT, 1, device=device)
    x = torch.zeros(1, grid[0], 1, 1, 1, device=device)  # of which only its device and its frames are looked at
    span = long.share(x, text, None, grid, torch.float32)[3]
    tokens = grid[0] * grid[1] * grid[2]
    make = torch.Generator(device).manual_seed(0)
    video = torch.randn(1, tokens, module.size.dim, device=device, dtype=dtype, generator=make)
    words = torch.randn(1, segments * TEXT, module.size.dim, device=device, dtype=dtype, generator=make)
    e = torch.randn(1, 1, module.size.time_dim, device=device, generator=make)

    def forward(recompute: bool) -> Tensor:
        v, w = video.requires_grad_(recompute), words
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu", cache_enabled=False):
            for block in module.blocks:
                if recompute:
                    v, w = torch.utils.checkpoint.checkpoint(block, v, w, e, span, use_reentrant=False)  # type: ignore
                else:
                    v, w = block(v, w, e, span)
        return v

    def infer() -> None:
        with torch.no_grad():
            forward(False)

    def learn() -> None:
        forward(True).float().square().mean().backward()
        module.zero_grad(set_to_none=True)

    made = {"tokens": float(tokens + segments * TEXT)}
    for name, work in (("inference", infer), *((("training", learn),) if train else ())):
        try:
            made |= {f"{name} {key}": value for key, value in _timed(work, repeats, device).items()}
        except torch.OutOfMemoryError:
            module.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    return made


def _network(spec: MixerKind, layers: int, device: str, changes: dict[str, Any]) -> CogVideoXTransformer:
    with torch.device("meta"):
        module = CogVideoXTransformer(replace(SIZES["5B"], layers=layers, **changes))
        module.lengthen(spec)
    module = module.to_empty(device=device)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(0, 0.02)
            if "norm" in name and name.endswith("weight"):
                nn.init.ones_(p)
    return module


def _timed(work: Callable[[], None], repeats: int, device: str) -> dict[str, float]:
    """The quickest of some runs, after one that does not count; runs of many seconds are not repeated as often."""
    cuda = device != "cpu"
    work()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    best, spent = float("inf"), 0.0
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        best, spent = min(best, took), spent + took
        if spent > 2:
            break
    return {"seconds": best, "GiB": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0}


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each mixer and length, with times relative to `none` at that length."""
    plain = {row["seconds"]: row for row in rows if row["mixer"] == "none"}
    lines = [f"{'mixer':16} {'s':>3} {'tokens':>8}   inference s (×)    GiB   training s (×)    GiB"]
    for row in rows:
        line = f"{row['mixer']:16} {row['seconds']:>3} {row['tokens']:>8.0f}"
        for kind in ("inference", "training"):
            if f"{kind} seconds" in row:
                own, base = row[f"{kind} seconds"], plain.get(row["seconds"])
                ratio = f"{own / base[f'{kind} seconds']:5.2f}" if base and f"{kind} seconds" in base else "    -"
                line += f"   {own:9.3f} ({ratio}) {row[f'{kind} GiB']:6.1f}"
            else:
                line += f"   {'-':>25}"
        lines.append(line)
    return "\n".join(lines)


def main(words: list[str]) -> None:
    parser = parser_of("kinema.evaluation.cost", __doc__)
    parser.add_argument("--seconds", type=_length, nargs="+", default=[3, 9, 18, 30, 63])
    parser.add_argument(
        "--mixers", nargs="+", choices=list(KINDS), default=["none", "ttt_mlp", "lact", "gated_deltanet"]
    )
    parser.add_argument("--layers", type=count, default=2)
    parser.add_argument("--repeats", type=count, default=3, help="of which the quickest counts")
    parser.add_argument("--mini-batch", type=count, default=64, help="of ttt_mlp")
    parser.add_argument("--parallel", action="store_true", help="both directions of ttt_mlp at once")
    parser.add_argument("--torch", action="store_true", help="the PyTorch path where there are kernels")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/cost.json"))
    args = parser.parse_args(words)
    if not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no GPU, which this measures; run it on a machine with one")
    door.prefer("torch" if args.torch else "auto")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device, rows = torch.cuda.get_device_name(), list[dict[str, Any]]()
    for kind in args.mixers:
        options: dict[str, Any] = {}
        if kind == "ttt_mlp":
            options = {"mini_batch": args.mini_batch, "passes": "parallel" if args.parallel else "sequential"}
        for seconds in args.seconds:
            row = measure(KINDS[kind](**options), seconds, args.layers, args.repeats, train=not args.no_training)
            torch.cuda.empty_cache()
            rows.append({"mixer": kind, "seconds": seconds, **options, **row})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            args.out.write_text(json.dumps({"device": device, "layers": args.layers, "rows": rows}, indent=1))
    print(f"{device}, {args.layers} blocks\n{table(rows)}")


def _length(text: str) -> int:
    if count(text) % SEGMENT:
        raise argparse.ArgumentTypeError(f"must be seconds in segments of {SEGMENT}, as 3 or 9, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(execute(main))

"""How fast a run's steps are and what they hold at most: nothing is read, logged or saved.

python -m kinema.bench.steps bench:cogvideox_lora --steps 10
python -m kinema.bench.steps bench:cogvideox_lora --steps 10 --network diffusers     the same loop, their network
torchrun --nproc-per-node 2 -m kinema.bench.steps bench:cogvideox_sft --steps 10     in shards

Prints one line of JSON. Weights are random numbers, made where they are needed: what they are does not change the time.
"""

import json
import os
import statistics
import sys
import time
from typing import Any

import torch

from kinema import config
from kinema.bench.measure import forget_peak, peak, synchronised
from kinema.bench.stage import Stage
from kinema.commands import execute, parser_of
from kinema.run import Run
from kinema.training import budget, world
from kinema.training.metrics import machine

PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # TFLOP/s of dense bfloat16 products, by the vendor
WARM = 3  # steps that are not counted: allocation, kernel choice, compilation


def measure(run: Run, device: torch.device, planned: budget.Budget | None) -> dict[str, Any]:
    """Takes `run.steps` steps of the turns that are due; the times are those after the first `WARM`.

    Seconds are the median step's. TFLOP are the model's, without recomputation, as `planned` has them.
    """
    stage, seconds = Stage(run, device), []
    forget_peak(device)
    for step in range(run.steps):
        began = time.perf_counter()
        for turn in run.objective.turns():
            if turn.due(step):
                stage.take(turn, step)
        synchronised(device)
        seconds.append(time.perf_counter() - began)
    counted = seconds[WARM:] or seconds[-1:]
    typical = statistics.median(counted)
    found = {
        "machine": machine(),
        "processes": stage.world.size,
        "seconds": round(typical, 4),
        "slowest": round(max(counted), 4),
        "first": round(seconds[0], 2),
        "peak_gib": peak(device),
    }
    if planned is None:
        return found
    tflop = sum(turn.flops / turn.every for turn in planned.turns) / 1e12
    tokens = sum(turn.tokens / turn.every for turn in planned.turns)
    rate = tflop / typical / stage.world.size
    ceiling = next((value for name, value in PEAK.items() if device.type == "cuda" and name in machine()), None)
    return found | {
        "tokens_per_second": round(tokens / typical, 1),
        "tflop": round(tflop, 2),
        "tflop_per_second": round(rate, 1),
        "mfu": None if ceiling is None else round(rate / ceiling, 4),
        "planned_gib": round(planned.peak / 2**30, 2),
    }


def main(words: list[str]) -> None:
    parser = parser_of("kinema.bench.steps", __doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="its options, and --run.… for every field, come after it")
    parser.add_argument(
        "--no-plan", action="store_true", help="count no work and plan no memory, which can take minutes"
    )
    args, options = parser.parse_known_args(words)
    run = config.configure(args.recipe, options)
    planned = None if args.no_plan else budget.budget(run, int(os.environ.get("WORLD_SIZE", "1")))
    device = world.join(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    measured = measure(run, device, planned)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(json.dumps({"run": " ".join(words), **measured}), flush=True)
    world.leave()


if __name__ == "__main__":
    sys.exit(execute(main))

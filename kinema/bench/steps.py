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
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kinema import config, seeds
from kinema.models.protocols import Spec
from kinema.run import Run
from kinema.training import budget, world
from kinema.training.actor import Actor, backward
from kinema.training.metrics import machine
from kinema.training.world import World

PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # TFLOP/s of dense bfloat16 products, by the vendor
WARM = 3  # steps that are not counted: allocation, kernel choice, compilation


def measure(run: Run, device: torch.device, planned: budget.Budget) -> dict[str, Any]:
    """Takes `run.steps` steps of the turns that are due; the times are those after the first `WARM`.

    Seconds are the median step's. TFLOP are the model's, without recomputation, as `planned` has them.
    """
    here = World.of(run.plan, device)
    passes, samples = run.passes(here.copies)
    actors = {name: Actor(name, role, run.plan, here, _random) for name, role in run.objective.roles().items()}
    cast = {name: actor.reading for name, actor in actors.items()} | {
        "memory": {name: tensor.to(device) for name, tensor in run.objective.memory().items()}
    }
    source, seconds = run.data.open(run.seed, device), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(run.steps):
        began = time.perf_counter()
        for turn in run.objective.turns():
            if not turn.due(step):
                continue
            for other in actors.values():
                other.moves(other is actors[turn.role])
            for micro in range(passes):
                first = (micro * here.copies + here.copy) * samples
                places = range(first, first + samples)
                numbers = [step * run.batch_size + place for place in places]
                keys = seeds.keys(run.seed, "train", numbers, list(places), run.batch_size, device)
                backward(turn, cast, replace(source(numbers, keys), micro=micro), step, passes, run.plan)
            actors[turn.role].update(step, turn.number(step), turn.betas, turn.first)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    counted = seconds[WARM:] or seconds[-1:]
    typical = statistics.median(counted)
    tflop = sum(turn.flops / turn.every for turn in planned.turns) / 1e12
    tokens = sum(turn.tokens / turn.every for turn in planned.turns)
    rate = tflop / typical / here.size
    peak = next((value for name, value in PEAK.items() if device.type == "cuda" and name in machine()), None)
    return {
        "machine": machine(),
        "processes": here.size,
        "seconds": round(typical, 4),
        "slowest": round(max(counted), 4),
        "first": round(seconds[0], 2),
        "tokens_per_second": round(tokens / typical, 1),
        "tflop": round(tflop, 2),
        "tflop_per_second": round(rate, 1),
        "mfu": None if peak is None else round(rate / peak, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
        "planned_gib": round(planned.peak / 2**30, 2),
    }


def _random(spec: Spec, module: nn.Module, device: torch.device) -> nn.Module:
    module.to_empty(device=device)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.02)
        for buffer in module.buffers():
            buffer.zero_()
    return module


def main(words: list[str]) -> None:
    run = config.configure(words[0], words[1:])
    planned = budget.budget(run, int(os.environ.get("WORLD_SIZE", "1")))
    device = world.join(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    measured = measure(run, device, planned)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(json.dumps({"run": " ".join(words), **measured}), flush=True)
    world.leave()


if __name__ == "__main__":
    main(sys.argv[1:])

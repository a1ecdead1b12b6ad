"""A run as a job of a Slurm cluster, through submitit: one task per GPU, and back in the queue when its time is over.

Slurm's warning reaches every task; the trainer agrees on a step, writes a checkpoint and returns. Then the first task
puts the same job back in the queue, and its next start goes on in the same folder.
"""

import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kinema import config
from kinema.errors import UsageError, UserError
from kinema.run import Run
from kinema.training import world
from kinema.training.trainer import Trainer


@dataclass(frozen=True)
class Job:
    """What is asked of the cluster. `processes` are those of a node (one for each GPU if there are GPUs), `warning` the
    seconds before its end at which the job is told; `extra` are further options of sbatch, such as `account`."""

    name: str
    nodes: int = 1
    gpus: int = 8
    processes: int = 0
    cpus: int = 8
    hours: float = 24.0
    warning: int = 180
    partition: str | None = None
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def per_node(self) -> int:
        return self.processes or max(1, self.gpus)


def submit(recipe: str, overrides: list[str], folder: Path, job: Job, local: bool = False) -> Any:
    """Queues the run and returns submitit's job. `local` starts its processes here instead, without a cluster.

    Raises UsageError for a run that does not fit the number of processes, UserError where there is no Slurm.
    """
    run = config.configure(recipe, overrides)
    sizes = run.plan.sizes(job.nodes * job.per_node)
    run.passes(sizes[0] * sizes[1])
    import submitit

    try:
        executor = submitit.AutoExecutor(folder / "jobs", cluster="local" if local else "slurm")
    except RuntimeError as error:
        raise UserError("there is no Slurm here (no sbatch); run this on a login node, or with --local") from error
    executor.update_parameters(
        name=job.name,
        nodes=job.nodes,
        tasks_per_node=job.per_node,
        timeout_min=max(1, int(job.hours * 60)),
        **({"gpus_per_node": job.gpus} if job.gpus else {}),
    )
    if not local:
        executor.update_parameters(
            cpus_per_task=job.cpus,
            slurm_signal_delay_s=job.warning,
            slurm_additional_parameters={"requeue": True, **job.extra},
            **({"slurm_partition": job.partition} if job.partition else {}),
        )
    try:
        return executor.submit(work, recipe, overrides, str(folder), "cuda" if job.gpus else "cpu")
    except Exception as error:  # submitit gives what sbatch said in an exception of its own
        raise UserError(f"Slurm did not take the job: {' '.join(str(error).split())}") from error


def work(recipe: str, overrides: list[str], folder: str, device: str) -> str:
    """What every task of the job does. Returns how it ended, for the job's log."""
    from submitit.helpers import TorchDistributedEnvironment

    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    run: Run = config.configure(recipe, overrides)
    trainer = Trainer(run, Path(folder), world.join(torch.device(device)))
    ended = trainer.train()
    first = trainer.world.rank == 0
    world.leave()
    if ended is not signal.SIGUSR2:
        return "finished" if ended is None else f"stopped by {ended.name}"
    if first and (number := os.environ.get("SLURM_JOB_ID")):
        subprocess.run(["scontrol", "requeue", number], check=True, timeout=60)
    return "requeued"


def options(pairs: list[str]) -> dict[str, str]:
    """`--slurm account=me` and the like. Raises UsageError for what is not NAME=VALUE."""
    made = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--slurm {pair} is not NAME=VALUE, for example --slurm account=vision")
        made[name] = value
    return made

"""Who trains together: the processes of a job, their one mesh, and what they have to agree on.

A process that was started alone needs none of this and pays for none of it: every function here is then the identity.
"""

import datetime
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kinema.errors import ElsewhereError, UserError
from kinema.run import AXES, Plan

T = TypeVar("T")


def join(device: torch.device) -> torch.device:
    """Joins the job that torchrun or Slurm started this process for and returns this process's own device.

    Without a job (no RANK in the environment) nothing happens. `device` without an index means the GPU of LOCAL_RANK.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device(
            "cuda", index % torch.cuda.device_count()
        )  # a launcher may show each process its own only
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return device


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True, eq=False)
class World:
    """The place of this process among all that train the run.

    mesh     the axes of `AXES` over all processes; None where this is the only one
    copies   how many data-parallel ranks there are, and `copy` which of them this process belongs to: processes of one
    context or tensor group are one data-parallel rank, so they see the same samples and draw the same noise
    control  a gloo group for agreements of the training loop, apart from the one that `files` are written with
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    copies: int = 1
    copy: int = 0
    mesh: DeviceMesh | None = None
    control: Any = None
    files: Any = None

    @classmethod
    def of(cls, plan: Plan, device: torch.device, alive: bool = True) -> "World":
        """Lays `plan` over the processes of the job. UsageError if their number is not the plan's product.

        Without `alive`, the others only pretend to be there, and nothing is agreed with them.
        """
        size = dist.get_world_size() if dist.is_initialized() else 1
        sizes = plan.sizes(size)
        if size == 1:
            return cls(device)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
        if plan.context > 1:  # kept in the mesh; made here, as `budget` lays networks out where no tensor can be read
            mesh["shard", "context"]._flatten("shard_context")
        replicate, shard, _, _ = mesh.get_coordinate() or (0, 0, 0, 0)
        groups = [dist.new_group(backend="gloo") if alive else None for _ in range(2)]
        return cls(device, dist.get_rank(), size, math.prod(sizes[:2]), replicate * sizes[1] + shard, mesh, *groups)

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, which alone calls it; an error of it is raised everywhere, told by one."""
        if self.mesh is None:
            return function()
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = function()
            except UserError as error:
                said[1] = error
        heard = [said[0], said[1] and str(said[1])]
        dist.broadcast_object_list(heard, src=0, group=self.control)
        if said[1]:
            raise said[1]
        if heard[1]:
            raise ElsewhereError()
        return heard[0]

    def most(self, number: int) -> int:
        """The greatest of all ranks' numbers."""
        if self.mesh is None:
            return number
        word = torch.tensor(number)
        dist.all_reduce(word, dist.ReduceOp.MAX, group=self.control)
        return int(word)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place and on the device: nothing waits for it."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def together(self) -> Iterator[None]:
        """While this lasts, the process ends as soon as it is told of the death of any other one.

        Without it, the others wait in a collective for the dead until they time out. Each rank waits for a word of the
        next one that comes only at the end; the operating system closes the connection of a process that dies.
        """
        if self.mesh is None:
            yield
            return
        group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=365))
        after, word, over = (self.rank + 1) % self.size, torch.zeros(1), threading.Event()

        def watch() -> None:
            try:
                dist.recv(word, src=after, group=group)
            except RuntimeError:
                if not over.is_set():
                    print(
                        f"kinema: rank {self.rank}: rank {after} is gone (killed, out of memory, or ended by the error "
                        f"above); the same command goes on from the last checkpoint",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError):
                thread.join(3)  # if a collective has noticed the death first: who died is said there
            over.set()
            raise
        over.set()
        dist.send(torch.ones(1), dst=(self.rank - 1) % self.size, group=group)
        thread.join()

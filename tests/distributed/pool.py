"""Four processes that wait for jobs: starting one costs seconds, too many for a suite of many small jobs."""

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from typing import Any


class Pool:
    """`run(world, function, *args)` calls `function(rank, *args)` in `world` processes that have joined one job, in
    float64 unless said otherwise, and returns their results in the order of their ranks.

    Raises AssertionError with what a rank said if one fails; where all of them answer, others may follow."""

    def __init__(self, size: int = 4, device: str = "cpu"):
        context = multiprocessing.get_context("spawn")
        self.answers = context.Queue()
        self.inboxes = [context.Queue() for _ in range(size)]
        self.processes = [
            context.Process(target=_wait_for_jobs, args=(rank, device, inbox, self.answers), daemon=True)
            for rank, inbox in enumerate(self.inboxes)
        ]
        for process in self.processes:
            process.start()
        self.jobs = 0

    def run(self, world: int, function: Callable, *args: Any, dtype: str = "float64") -> list[Any]:
        self.jobs += 1
        for inbox in self.inboxes[:world]:
            inbox.put((self.jobs, world, function, args, dtype))
        answers: dict[int, Any] = {}
        failed = ""
        while len(answers) < world:
            try:
                rank, value, error = self.answers.get(timeout=20 if failed else 120)
            except queue.Empty:
                self.close()  # who waits for a rank that has failed cannot be asked again
                raise AssertionError(failed or f"{world - len(answers)} of {world} ranks did not answer") from None
            answers[rank] = value
            if error and not failed:
                failed = f"rank {rank} of {world}:\n{error}"
        if failed:
            raise AssertionError(failed)
        return [answers[rank] for rank in range(world)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def _wait_for_jobs(rank: int, device: str, inbox, answers) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    while True:
        job, world, function, args, dtype = inbox.get()
        try:
            torch.set_default_dtype(getattr(torch, dtype))
            store = dist.FileStore(f"{os.environ['KINEMA_TEST_STORES']}/{job}", world)
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
            value = function(rank, *args)
            dist.barrier()
            dist.destroy_process_group()
            answers.put((rank, value, None))
        except BaseException:
            told = traceback.format_exc()
            if dist.is_initialized():
                dist.destroy_process_group()
            answers.put((rank, None, told))

"""The encoding of `data.encoding` on every device there is, a process for each where there are several."""

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kinema.data.encoding import Say, Work, do
from kinema.data.scanning import Progress
from kinema.errors import UserError


def run(work: Work, devices: Sequence[torch.device], progress: Progress, threads: int) -> Iterator[tuple[str, str]]:
    """Does the work on all devices, a process each where there are several; yields (key, why) of what failed."""
    frames = sum(w.bucket.frames for w in work.windows)
    failed: list[tuple[str, str]] = []
    with progress("texts", len(work.texts)) as texts, progress("frames", frames) as encoded:
        done = {"texts": 0, "frames": 0}
        at = {"texts": 0.0, "frames": 0.0}
        lengths = {w.key: w.bucket.frames for w in work.windows}

        def say(what: str, value: Any) -> None:
            if what == "failed":
                failed.append(value)
                what, value = "frames", lengths[value[0]]
            done[what] += value
            total = {"texts": len(work.texts), "frames": frames}[what]
            if time.monotonic() - at[what] >= 1 or done[what] == total:
                at[what] = time.monotonic()
                {"texts": texts, "frames": encoded}[what](done[what])

        if len(devices) == 1:
            do(work, devices[0], threads, say)
        elif work.texts or work.windows:
            _on_all(work, devices, threads, say)
    yield from failed


def _on_all(work: Work, devices: Sequence[torch.device], threads: int, say: Say) -> None:
    context = torch.multiprocessing.get_context("spawn")
    told = context.Queue()
    threads = max(1, (threads or len(os.sched_getaffinity(0))) // len(devices))
    processes = [
        context.Process(
            target=_process, args=(work.share(i, len(devices)), str(device), threads, told, os.getpid()), daemon=True
        )
        for i, device in enumerate(devices)
    ]
    for process in processes:
        process.start()
    running = len(processes)
    try:
        while running:
            try:
                what, value = told.get(timeout=1)
            except queue.Empty:
                if dead := [p for p in processes if p.exitcode not in (None, 0)]:
                    raise UserError(
                        f"a process of {len(processes)} ended with code {dead[0].exitcode}; the same command goes on"
                    ) from None
                continue
            if what == "error":
                raise UserError(value)
            if what == "ended":
                running -= 1
            else:
                say(what, value)
    finally:
        for process in processes:
            if running:
                process.terminate()
            process.join()


def _process(work: Work, device: str, threads: int, told: Any, parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)  # nobody is left to tell, and the next call makes what is missing

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        do(work, torch.device(device), threads, lambda what, value: told.put((what, value)))
        told.put(("ended", None))
    except UserError as error:
        told.put(("error", str(error)))
    except Exception as error:
        told.put(("error", f"{device}: {type(error).__name__}: {error}"))

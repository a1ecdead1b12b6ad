"""Windows and texts become samples: files are decoded side by side, encoded as they come, each window by itself, and
written behind the encoder's back.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.data import store
from kinema.data.cutting import Window
from kinema.data.decode import frames_at
from kinema.data.scanning import reason
from kinema.data.targets import Target
from kinema.errors import UserError

HOLD = 4  # decoded windows that wait for the encoder


@dataclass(frozen=True)
class Work:
    """What is to be made, by whom: `part` names the shards that it goes into."""

    target: Target
    folder: Path
    texts: dict[str, dict[str, Any]]
    windows: list[Window]
    part: str

    def share(self, number: int, count: int) -> "Work":
        """One of `count` parts with about as many frames as the others."""
        loads, ours, texts = [0] * count, [], [*self.texts.items()][number::count]
        for _, group in groupby(self.windows, key=lambda w: w.video):
            windows = [*group]
            least = loads.index(min(loads))
            loads[least] += sum(w.bucket.frames for w in windows)
            if least == number:
                ours += windows
        return Work(self.target, self.folder, dict(texts), ours, f"{self.part}w{number}")


Say = Callable[[str, Any], None]


def do(work: Work, device: torch.device, threads: int, say: Say) -> None:
    """Makes texts, then samples. `say` hears ("texts", count), ("frames", count) and ("failed", (key, why))."""
    if work.texts:
        keep = work.target.open_text(device)
        writer = store.Writer(work.folder / "texts", work.part)
        try:
            for key, text in work.texts.items():
                tensors = keep.unconditional() if key == store.UNCONDITIONAL else keep(text)
                writer.put(key, tensors, text or {"text": work.target.text.unconditional})
                say("texts", 1)
        finally:
            writer.close()
        del keep  # the largest network there is, no longer needed
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if work.windows:
        encode(work, decoded(work.windows, work.target.fps, threads), device, say)


def encode(work: Work, source: Iterable[tuple[Window, Tensor | str]], device: torch.device, say: Say) -> None:
    """Encodes windows as they come, each by itself, and writes them behind the encoder's back."""
    encoder, writer = work.target.open_codec(device), store.Writer(work.folder / "shards", work.part)
    writing: list[Future] = []
    try:
        with ThreadPoolExecutor(1) as behind:
            for window, pixels in source:
                if isinstance(pixels, str):
                    say("failed", (window.key, pixels))
                    continue
                tensors = encoder.video(pixels)
                writing.append(behind.submit(_write, writer, window, tensors, work.target.fps))
                while len(writing) > 2:
                    writing.pop(0).result()
                say("frames", window.bucket.frames)
            for future in writing:
                future.result()
    finally:
        writer.close()


def _write(writer: store.Writer, window: Window, tensors: dict[str, Tensor], fps: int) -> None:
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    record = {
        "video": str(window.video),
        "source": window.source,
        "start": window.start,
        "fps": fps,
        "bucket": asdict(window.bucket),
        "crop": window.place,
    }
    writer.put(window.key, kept, record)


def decoded(windows: Sequence[Window], fps: int, threads: int = 0) -> Iterator[tuple[Window, Tensor | str]]:
    """(window, its pixels `[F, 3, H, W]` uint8, or what is wrong with its file), as they are decoded.

    Files are decoded side by side, by as many `threads` as there are cores; few windows wait at a time.
    """
    files = [[*group] for _, group in groupby(windows, key=lambda w: w.video)]
    cores = threads or len(os.sched_getaffinity(0))
    readers = min(cores, len(files))
    todo, ready, stop = iter(files), queue.Queue(HOLD), threading.Event()
    taking = threading.Lock()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            while not stop.is_set():
                with taking:
                    file = next(todo, None)
                if file is None or not all(put(item) for item in _pixels(file, fps, max(1, cores // readers))):
                    break
        except BaseException as error:
            put(error)
        put(None)

    for _ in range(readers):
        threading.Thread(target=read, daemon=True).start()
    try:
        while readers:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                readers -= 1
            else:
                yield item
    finally:
        stop.set()


def _pixels(windows: list[Window], fps: int, threads: int) -> Iterator[tuple[Window, Tensor | str]]:
    """The windows of one file, in one pass over it where they do not overlap."""
    chains: list[list[Window]] = []
    for window in sorted(windows, key=lambda w: w.start):
        for chain in chains:
            if chain[-1].start + (chain[-1].bucket.frames - 1) / fps <= window.start + 1e-9:
                chain.append(window)
                break
        else:
            chains.append([window])
    for chain in chains:
        waiting = [*chain]
        try:
            times = [w.start + i / fps for w in chain for i in range(w.bucket.frames)]
            size = (chain[0].bucket.height, chain[0].bucket.width)
            frames = frames_at(chain[0].video, times, size, chain[0].place, threads)
            for window in chain:
                pixels = torch.stack([next(frames) for _ in range(window.bucket.frames)])
                waiting.remove(window)
                yield window, pixels.permute(0, 3, 1, 2)
        except UserError as error:
            yield from ((window, reason(error, window.video)) for window in waiting)

"""From a folder of videos to prepared data: `kinema prepare videos/ --captions FILE --for FAMILY -o DATA`.

list → scan every file → cut into windows, each in a bucket → encode what is not there yet → index. Each step is a
function of the files and the options, and what was made is kept under a hash of all that made it. So the same command
goes on after a kill, redoes nothing that is on disk, and takes up files that were added; on data that is finished it
only compares. A file that is broken is reported and left out.
"""

import json
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kinema import seeds
from kinema.data import store
from kinema.data.buckets import Bucket, fitting
from kinema.data.clips import SLOWEST
from kinema.data.decode import Scanned, digest, frames_at, scan
from kinema.data.listing import Footage, footage
from kinema.data.targets import PIECE, Target, files_of, key_of, sample_key, text_key
from kinema.errors import UserError

NOTES = "notes"  # what was found out about files, so that it need not be found out again
PLACES = {"model", "revision"}  # of the manifest: where a model was, and not what it is
HOLD = 4  # decoded windows that wait for the encoder

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Cut:
    """How videos become samples.

    segment  seconds of the pieces that a video is cut into; None takes one window from its start
    crop     what is kept of a frame that is wider or higher than its bucket: the middle, or a place of each file's own
    upscale  the most that a video may be enlarged to fill a bucket
    """

    buckets: tuple[Bucket, ...]
    segment: float | None = None
    crop: Literal["centre", "random"] = "centre"
    upscale: float = 1.0


@dataclass(frozen=True)
class Window:
    """What becomes one sample: `bucket.frames` frames of a file from `start` seconds on."""

    key: str
    video: Path
    source: str
    start: float
    bucket: Bucket
    place: tuple[float, float]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """All samples of a folder, all their texts by key, and what was left out, by name, with the reason."""

    windows: list[Window]
    texts: dict[str, dict[str, Any]]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Report:
    """What is in a folder now. `made` samples are new; `missing` are made by other parts, or by the next call."""

    samples: int
    made: int
    missing: int
    left_out: dict[str, str] = field(default_factory=dict)


def prepare(
    videos: Path,
    captions: Path | None,
    target: Target,
    cut: Cut,
    folder: Path,
    devices: Sequence[torch.device],
    progress: Progress,
    part: tuple[int, int] = (0, 1),
    threads: int = 0,
) -> Report:
    """Makes what `folder` lacks, on all `devices` at once; of several machines, `part` (i, n) makes every n-th sample.

    UserError if nothing can be made, or the folder holds data of other models or options.
    """
    with store.locked(folder):
        notes = Notes(folder, f"{part[0]}-{part[1]}")
        facts = _facts(target, notes) | {"cut": _plain(cut)}
        _claim(folder, facts)
        planned = plan(videos, captions, target, cut, facts, notes, progress)
        failed = {w.key: why for w in planned.windows if (why := notes.failed(w.key)) is not None}
        wanted = [w for w in planned.windows if w.key not in failed]
        there, said = _there(folder)
        samples = [
            w for n, w in enumerate(planned.windows) if w.key not in there | failed.keys() and n % part[1] == part[0]
        ]
        texts = [key for n, key in enumerate(sorted(planned.texts)) if key not in said and n % part[1] == part[0]]
        if store.UNCONDITIONAL not in said and part[0] == 0:
            texts.append(store.UNCONDITIONAL)
        work = Work(
            target, folder, {key: planned.texts.get(key, {}) for key in texts}, samples, f"p{part[0]}of{part[1]}"
        )
        for key, why in _run(work, devices, progress, threads):
            failed[key] = why
            notes.fail(key, why)
        notes.close()
        there, said = _there(folder)
        kept = [w for w in wanted if w.key in there]
        left_out = planned.left_out | {
            f"{w.video} at {w.start:g} s" if w.start else str(w.video): failed[w.key]
            for w in planned.windows
            if w.key in failed
        }
        missing = sum(w.key not in there and w.key not in failed for w in wanted) + sum(
            t not in said for t in planned.texts
        )
        if not kept and not missing:
            raise UserError(f"nothing could be prepared: {_first(left_out)}")
        if not missing:
            finish(folder, facts, kept, planned, there, said, left_out)
        return Report(len(kept), sum(w.key in there for w in samples), missing, left_out)


def plan(
    videos: Path,
    captions: Path | None,
    target: Target,
    cut: Cut,
    facts: dict[str, Any],
    notes: "Notes",
    progress: Progress,
) -> Planned:
    """Scans what was not scanned before, and cuts every video into windows."""
    found, left_out = footage(videos, captions)
    scans = _scans([*dict.fromkeys(one.video for one in found)], notes, progress)
    windows, texts, seen = [], {}, {}
    for one in found:
        scanned = scans[one.video]
        if isinstance(scanned, str):
            left_out[str(one.video)] = scanned
            continue
        try:
            cuts = cut_up(one, scanned, target, cut)
        except UserError as error:
            left_out[str(one.video)] = str(error)
            continue
        for start, bucket, told in cuts:
            said = {text_key(facts, text): text for text in target.texts(told, one.motion)}
            place = (0.5, 0.5) if cut.crop == "centre" else _place(scanned.digest)
            key = sample_key(facts, scanned.digest, start, bucket, place)
            if key in seen:
                left_out[f"{one.video} at {start:g} s"] = f"is the same as {seen[key]}"
                continue
            seen[key] = one.video
            texts |= said
            keys = tuple(text_key(facts, text) for text in target.texts(told, one.motion))
            windows.append(Window(key, one.video, scanned.digest, start, bucket, place, keys))
    if not windows:
        raise UserError(f"none of {len(found)} videos can be prepared: {_first(left_out)}")
    return Planned(windows, texts, left_out)


def cut_up(one: Footage, scanned: Scanned, target: Target, cut: Cut) -> list[tuple[float, Bucket, tuple]]:
    """(start, bucket, texts) of the windows of a video. UserError, without its name, if there are none."""
    if scanned.rate < SLOWEST * target.fps:
        raise UserError(
            f"has {scanned.rate:g} frames a second: of {target.fps}, some would be shown twice; lower --fps"
        )
    fits = fitting(cut.buckets, scanned.height, scanned.width, cut.upscale)
    if not fits:
        smallest = min(cut.buckets, key=lambda b: b.height * b.width)
        raise UserError(
            f"is {scanned.height}x{scanned.width}, too small for {smallest.height}x{smallest.width}; allow --upscale"
        )
    shortest = fits[-1].frames

    def count(start: float) -> int:
        until = None if one.end is None else int((one.end - start) * target.fps + 1e-6) + 1
        there = scanned.frames_at(target.fps, start)
        return there if until is None else min(there, until)

    def longest(frames: int) -> Bucket | None:
        return next((bucket for bucket in fits if bucket.frames <= frames), None)

    if target.family == "ttt":
        made = _long_windows(one, count(one.start), fits, target.fps)
    elif cut.segment is not None:
        made, number = [], 0
        most = int(cut.segment * target.fps + 1e-6) + 1
        while len(one.told) == 1 or number < len(one.told):
            start = one.start + number * cut.segment
            bucket = longest(min(count(start), most))
            if bucket is None:
                break
            made.append((start, bucket, (one.told[number if len(one.told) > 1 else 0],)))
            number += 1
    elif len(one.told) > 1:
        raise UserError(f"has {len(one.told)} captions; cut it into pieces of --segment seconds")
    else:
        bucket = longest(count(one.start))
        made = [(one.start, bucket, one.told)] if bucket else []
    if not made:
        there = count(one.start)
        raise UserError(f"has {there} frames at {target.fps} a second from {one.start:g} s on, fewer than {shortest}")
    return made


def _long_windows(one: Footage, frames: int, fits: list[Bucket], fps: int) -> list[tuple[float, Bucket, tuple]]:
    """Windows of whole pieces, each with its text, one after the other; a single text is that of every piece."""
    step = PIECE * fps
    pieces = max(0, frames - 1) // step
    told = one.told * pieces if len(one.told) == 1 else one.told[:pieces]
    made, at = [], 0
    while bucket := next((b for b in fits if (b.frames - 1) // step <= len(told) - at), None):
        taken = (bucket.frames - 1) // step
        made.append((one.start + at * PIECE, bucket, told[at : at + taken]))
        at += taken
        if at >= len(told):
            break
    return made


# --- encoding --------------------------------------------------------------------------------------------------------


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
            yield from ((window, _reason(error, window.video)) for window in waiting)


# --- processes -------------------------------------------------------------------------------------------------------


def _run(work: Work, devices: Sequence[torch.device], progress: Progress, threads: int) -> Iterator[tuple[str, str]]:
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


# --- what is known ---------------------------------------------------------------------------------------------------


class Notes:
    """What was found out about files and samples: JSON lines that are only ever added to, a file for each part.

    What is known of a file holds as long as its size and its time of change do.
    """

    def __init__(self, folder: Path, part: str):
        self._files: dict[str, Any] = {}
        self._failed: dict[str, str] = {}
        path = folder / f"{NOTES}-{part}.jsonl"
        for file in sorted(folder.glob(f"{NOTES}-*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    said = json.loads(line)
                except ValueError:  # the last line of a process that was killed
                    continue
                if "failed" in said:
                    self._failed[said["failed"]] = said["why"]
                else:
                    self._files[said["path"]] = said
        torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._out = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed with the notes
        if torn:
            self._out.write("\n")
        self._lock = threading.Lock()

    def of(self, path: Path, what: str, make: Callable[[], Any]) -> Any:
        """What is known as `what` of a file, made and noted where it is not."""
        stat = path.stat()
        name, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = self._files.get(f"{what}:{name}")
        if known is None or known["stamp"] != stamp:
            known = {"path": f"{what}:{name}", "stamp": stamp, "is": make()}
            self._files[known["path"]] = known
            self._write(known)
        return known["is"]

    def knows(self, path: Path, what: str) -> bool:
        try:
            stat = path.stat()
        except OSError:
            return False
        known = self._files.get(f"{what}:{path.resolve()}")
        return known is not None and known["stamp"] == [stat.st_size, stat.st_mtime_ns]

    def failed(self, key: str) -> str | None:
        return self._failed.get(key)

    def fail(self, key: str, why: str) -> None:
        self._failed[key] = why
        self._write({"failed": key, "why": why})

    def close(self) -> None:
        self._out.close()

    def _write(self, said: dict[str, Any]) -> None:
        with self._lock:
            self._out.write(json.dumps(said, ensure_ascii=False) + "\n")
            self._out.flush()


def _scans(videos: list[Path], notes: Notes, progress: Progress) -> dict[Path, Scanned | str]:
    """What is in each file, or what is wrong with it."""

    def look(path: Path) -> Scanned | str:
        try:
            known = notes.of(path, "scan", lambda: _looked(path))
        except OSError as error:  # perhaps for now only, so it is not noted
            return error.strerror or str(error)
        return known if isinstance(known, str) else Scanned(**known)

    new = [path for path in videos if not notes.knows(path, "scan")]
    with progress("files", len(new)) as each, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as readers:
        last = 0.0
        for done, _ in enumerate(readers.map(look, new), start=1):
            if time.monotonic() - last >= 1 or done == len(new):
                last = time.monotonic()
                each(done)
    return {path: look(path) for path in videos}


def _looked(path: Path) -> dict[str, Any] | str:
    try:
        return asdict(scan(path))
    except UserError as error:
        return _reason(error, path)


def _reason(error: UserError, path: Path) -> str:
    """What is wrong with a file, without its name."""
    return str(error).removeprefix(f"{path} ").rstrip(".")


def _facts(target: Target, notes: Notes) -> dict[str, Any]:
    def hashed(path: str, part: str) -> str:
        return key_of(
            *((file.name, notes.of(file, "sha256", lambda f=file: digest(f))) for file in files_of(path, part))
        )

    part = "tokenizer" if target.family == "ursa" else "text_encoder"
    digests = {"codec": hashed(target.codec.path, "vae"), "text": hashed(target.text.path, part)}
    return target.facts(digests)


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    path, plain = folder / store.MANIFEST, json.loads(json.dumps(facts))
    if path.exists() and any((folder / part).exists() for part in ("shards", "texts")):
        there = store.read_manifest(folder)
        for name in plain.keys() - PLACES:
            if there.get(name) != plain[name]:
                raise UserError(
                    f"{folder} holds data with {name} {there.get(name)}, not {plain[name]}; choose another folder with "
                    "-o, or delete it"
                )
        return
    others = [p.name for p in folder.iterdir() if not p.name.startswith((".", NOTES, store.MANIFEST))]
    if others:
        raise UserError(f"{folder} holds other things ({others[0]}); choose another folder with -o")
    store.write_text(path, json.dumps({"format": store.FORMAT, "complete": False, **plain}, indent=1))


def _there(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The shard of every sample and of every text that is on disk."""
    found = []
    for part in ("shards", "texts"):
        reader = store.Reader(folder / part)
        found.append(reader.keys())
        reader.close()
    return found[0], found[1]


def finish(
    folder: Path,
    facts: dict[str, Any],
    kept: list[Window],
    planned: Planned,
    there: dict[str, str],
    said: dict[str, str],
    left_out: dict[str, str],
) -> None:
    """Writes the index, the lists for people and, last, that all is there."""
    from safetensors.torch import save

    kept = sorted(kept, key=lambda w: w.key)
    sizes = sorted({w.bucket for w in kept})
    shards, texts = sorted({*there.values()}), sorted({*said.values()})
    told = [key for w in kept for key in w.texts]
    index = {
        "key": _bytes_of([w.key for w in kept]),
        "bucket": torch.tensor([sizes.index(w.bucket) for w in kept], dtype=torch.int32),
        "shard": torch.tensor([shards.index(there[w.key]) for w in kept], dtype=torch.int32),
        "text": _bytes_of(told),
        "text_shard": torch.tensor([texts.index(said[key]) for key in told], dtype=torch.int32),
        "text_end": torch.tensor([len(w.texts) for w in kept], dtype=torch.int64).cumsum(0),
    }
    value = save(index)
    draft = folder / f".{store.INDEX}.{os.getpid()}"
    draft.write_bytes(value)
    draft.replace(folder / store.INDEX)
    lines = (
        json.dumps(
            {
                "key": w.key,
                "video": str(w.video),
                "start": w.start,
                "bucket": str(w.bucket),
                "texts": [planned.texts[key] for key in w.texts],
            },
            ensure_ascii=False,
        )
        for w in kept
    )
    store.write_text(folder / store.SAMPLES, "".join(f"{line}\n" for line in lines))
    reasons = (json.dumps({"what": name, "why": why}, ensure_ascii=False) for name, why in left_out.items())
    store.write_text(folder / store.SKIPPED, "".join(f"{line}\n" for line in reasons))
    manifest = {
        "format": store.FORMAT,
        "complete": True,
        **facts,
        "samples": len(kept),
        "buckets": {str(size): sum(w.bucket == size for w in kept) for size in sizes},
        "shards": shards,
        "text_shards": texts,
        "skipped": len(left_out),
        "digest": key_of({name: facts[name] for name in facts.keys() - PLACES}, [(w.key, w.texts) for w in kept]),
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    if (folder / store.MANIFEST).read_text(encoding="utf-8") != text:
        store.write_text(folder / store.MANIFEST, text)


def verify(folder: Path, progress: Progress) -> list[str]:
    """Reads everything there is, and says what is wrong; what is damaged is taken out, to be made again."""
    manifest = store.read_manifest(folder)
    wrong = [] if manifest.get("complete") else [f"{folder} is not finished; run kinema prepare again"]
    for part in ("texts", "shards"):
        reader = store.Reader(folder / part)
        found, damaged = [*reader.records()], []
        with progress(part, len(found)) as each:
            for done, (key, shard, record) in enumerate(found, start=1):
                if zlib.crc32(reader.value(shard, key)) != record["crc"]:
                    damaged.append((folder / part / shard, key))
                if done % 64 == 0 or done == len(found):
                    each(done)
        reader.close()
        for path, key in damaged:
            wrong.append(f"{path}: {key} is damaged and was taken out; run kinema prepare again")
            store.drop(path, key)
    if wrong:
        return wrong
    from kinema.data.prepared import Prepared

    data = Prepared(folder)
    try:
        return data.damage()
    finally:
        data.close()


def _place(source: str) -> tuple[float, float]:
    """Where a file's frames are cropped, at random but always alike."""
    draw = seeds.keys(seeds.key_of("crop", source), "crop", [0]).uniform(2)[0].tolist()
    return draw[0], draw[1]


def _plain(cut: Cut) -> dict[str, Any]:
    return {**asdict(cut), "buckets": [str(bucket) for bucket in cut.buckets]}


def _bytes_of(keys: Sequence[str]) -> Tensor:
    """`[N, 32]` uint8 of hexadecimal keys."""
    data = bytearray(b"".join(bytes.fromhex(key) for key in keys))
    return torch.frombuffer(data, dtype=torch.uint8).reshape(-1, 32) if data else torch.zeros(0, 32, dtype=torch.uint8)


def _first(left_out: dict[str, str], count: int = 3) -> str:
    said = [f"{name}: {why}" for name, why in left_out.items()]
    return "; ".join(said[:count]) + (f" and {len(said) - count} more" if len(said) > count else "")

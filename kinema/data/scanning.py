"""What is in video files, found out once: a file is scanned again only where its size or its time of change differ."""

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kinema.data.decode import Scanned, scan
from kinema.errors import UserError

NOTES = "notes"  # what was found out about files, so that it need not be found out again

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


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


def scans(videos: list[Path], notes: Notes, progress: Progress) -> dict[Path, Scanned | str]:
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
        return reason(error, path)


def reason(error: UserError, path: Path) -> str:
    """What is wrong with a file, without its name."""
    return str(error).removeprefix(f"{path} ").rstrip(".")

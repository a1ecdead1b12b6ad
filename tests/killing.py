"""Children that are killed without warning, at a moment that comes late in one and early in another."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def killed_until_done(work: Callable[[], object], kills: int, longest: float, seed: int = 0) -> int:
    """Runs `work` in a child again and again, kills `kills` of them with SIGKILL within `longest` seconds, then lets
    one end. Returns how many really were killed before they were done."""
    hit = 0
    for attempt in range(kills + 1):
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if attempt < kills:
            time.sleep(longest * ((attempt * 0.618034 + seed * 0.314159) % 1))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            hit += 1
        else:
            assert os.waitstatus_to_exitcode(status) == 0
    return hit


def values(folder: Path) -> dict[str, bytes]:
    """All samples and texts of prepared data, by key."""
    from kinema.data import store

    found = {}
    for part in ("shards", "texts"):
        reader = store.Reader(folder / part)
        for key, shard, record in reader.records():
            assert f"{part}/{key}" not in found, "a sample is there twice"
            found[f"{part}/{key}"] = reader.value(shard, key) + repr(sorted(record.items())).encode()
        reader.close()
    return found

"""From a folder of videos to prepared data: `kinema prepare videos/ --captions FILE --for FAMILY -o DATA`.

list → scan every file → cut into windows, each in a bucket → encode what is not there yet → index. Each step is a
function of the files and the options, and what was made is kept under a hash of all that made it. So the same command
goes on after a kill, redoes nothing that is on disk, and takes up files that were added; on data that is finished it
only compares. A file that is broken is reported and left out.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kinema.data import store
from kinema.data.cutting import Cut, first_of, plan
from kinema.data.decode import digest
from kinema.data.encoding import Work
from kinema.data.ledger import claim, finish, there_in
from kinema.data.on_devices import run
from kinema.data.scanning import Notes, Progress
from kinema.data.targets import Target, files_of, key_of
from kinema.errors import UserError


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
        claim(folder, facts)
        planned = plan(videos, captions, target, cut, facts, notes, progress)
        failed = {w.key: why for w in planned.windows if (why := notes.failed(w.key)) is not None}
        wanted = [w for w in planned.windows if w.key not in failed]
        there, said = there_in(folder)
        samples = [
            w for n, w in enumerate(planned.windows) if w.key not in there | failed.keys() and n % part[1] == part[0]
        ]
        texts = [key for n, key in enumerate(sorted(planned.texts)) if key not in said and n % part[1] == part[0]]
        if store.UNCONDITIONAL not in said and part[0] == 0:
            texts.append(store.UNCONDITIONAL)
        work = Work(
            target, folder, {key: planned.texts.get(key, {}) for key in texts}, samples, f"p{part[0]}of{part[1]}"
        )
        for key, why in run(work, devices, progress, threads):
            failed[key] = why
            notes.fail(key, why)
        notes.close()
        there, said = there_in(folder)
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
            raise UserError(f"nothing could be prepared: {first_of(left_out)}")
        if not missing:
            finish(folder, facts, kept, planned, there, said, left_out)
        return Report(len(kept), sum(w.key in there for w in samples), missing, left_out)


def _facts(target: Target, notes: Notes) -> dict[str, Any]:
    def hashed(path: str, part: str) -> str:
        return key_of(
            *((file.name, notes.of(file, "sha256", lambda f=file: digest(f))) for file in files_of(path, part))
        )

    part = "tokenizer" if target.family == "ursa" else "text_encoder"
    digests = {"codec": hashed(target.codec.path, "vae"), "text": hashed(target.text.path, part)}
    return target.facts(digests)


def _plain(cut: Cut) -> dict[str, Any]:
    return {**asdict(cut), "buckets": [str(bucket) for bucket in cut.buckets]}

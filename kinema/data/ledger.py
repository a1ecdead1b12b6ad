"""What a folder of prepared data says of itself: whose it is, what is in it, and whether that is all and unharmed.

A folder is claimed before anything is made in it; the index and, last, that it is complete are written when all is.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.data import store
from kinema.data.cutting import Planned, Window
from kinema.data.scanning import NOTES, Progress
from kinema.data.targets import key_of
from kinema.errors import UserError
from kinema.files import whole, write_text

PLACES = {"model", "revision"}  # of the manifest: where a model was, and not what it is


def claim(folder: Path, facts: dict[str, Any]) -> None:
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
    write_text(path, json.dumps({"format": store.FORMAT, "complete": False, **plain}, indent=1))


def there_in(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
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
    with whole(folder / store.INDEX) as draft:
        draft.write_bytes(value)
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
    write_text(folder / store.SAMPLES, "".join(f"{line}\n" for line in lines))
    reasons = (json.dumps({"what": name, "why": why}, ensure_ascii=False) for name, why in left_out.items())
    write_text(folder / store.SKIPPED, "".join(f"{line}\n" for line in reasons))
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
        write_text(folder / store.MANIFEST, text)


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


def _bytes_of(keys: Sequence[str]) -> Tensor:
    """`[N, 32]` uint8 of hexadecimal keys."""
    data = bytearray(b"".join(bytes.fromhex(key) for key in keys))
    return torch.frombuffer(data, dtype=torch.uint8).reshape(-1, 32) if data else torch.zeros(0, 32, dtype=torch.uint8)

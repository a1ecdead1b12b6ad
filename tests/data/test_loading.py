"""Prepared samples are a function of (seed, n): read ahead or not, by one rank or two, before and after a stop."""

import threading
import time

import pytest
import torch

from kinema import seeds
from kinema.data import store
from kinema.data.buckets import Bucket
from kinema.data.cutting import Planned, Window
from kinema.data.latents import Latents
from kinema.data.ledger import finish
from kinema.data.prefetch import Ahead
from kinema.data.prepared import Prepared, Visits
from kinema.data.targets import key_of
from kinema.errors import UserError
from kinema.files import write_text

CPU = torch.device("cpu")
SIZES = (Bucket(9, 32, 48), Bucket(5, 48, 32))
FACTS = {"family": "wan", "model": "none", "revision": "", "codec": {}, "text": {}, "cut": {}}


def filled(folder, counts=(7, 5)):
    """A folder as `prepare` leaves it, whose sample n of bucket b is full of 10 b + n."""
    shards, texts = store.Writer(folder / "shards", "a", shard=1 << 15), store.Writer(folder / "texts", "a")
    windows, told = [], {}
    for b, (size, count) in enumerate(zip(SIZES, counts, strict=True)):
        for n in range(count):
            key, text = key_of(b, n), key_of("text", b, n)
            latents = torch.full(((size.frames - 1) // 4 + 1, 16, size.height // 8, size.width // 8), 10.0 * b + n)
            shards.put(key, {"clean": latents.half()}, {"bucket": vars(size)})
            shards.commit()
            told[text] = {"text": f"{b} {n}"}
            texts.put(text, {"text": torch.full((3 + n, 4), float(n)).bfloat16()}, told[text])
            windows.append(Window(key, folder / "x.mp4", "", 0.0, size, (0.5, 0.5), (text,)))
    texts.put(store.UNCONDITIONAL, {"text": torch.zeros(2, 4).bfloat16()}, {"text": ""})
    shards.close()
    texts.close()
    readers = [store.Reader(folder / part) for part in ("shards", "texts")]
    there, said = (reader.keys() for reader in readers)
    assert len(set(there.values())) > 1, "several shards"
    for reader in readers:
        reader.close()
    write_text(folder / store.MANIFEST, "")
    finish(folder, FACTS, windows, Planned(windows, told, {}), there, said, {})
    return folder


def read(source, samples, count, seed=0):
    return source(samples, seeds.keys(seed, "train", samples, samples, count))


def test_ranks_passes_and_resumed_runs_read_the_same_samples(tmp_path):
    folder = str(filled(tmp_path))
    one = Latents(folder, dropout=0.0).open(3, CPU)
    whole = [read(one, list(range(step * 4, step * 4 + 4)), 4, 3) for step in range(12)]
    ranks = [Latents(folder, dropout=0.0).open(3, CPU) for _ in range(2)]
    for step, batch in enumerate(whole):
        values = batch.video.flatten(1)
        assert (values == values[:, :1]).all()
        assert [f"{int(v) // 10} {int(v) % 10}" for v in values[:, 0]] == list(batch.captions)
        parts = [read(rank, [4 * step + 2 * r, 4 * step + 2 * r + 1], 4, 3) for r, rank in enumerate(ranks)]
        assert torch.equal(torch.cat([part.video for part in parts]), batch.video)
    assert {batch.video.shape[1:] for batch in whole} == {(3, 16, 4, 6), (2, 16, 6, 4)}
    again = Latents(folder, dropout=0.0).open(3, CPU)
    assert torch.equal(read(again, [28, 29, 30, 31], 4, 3).video, whole[7].video)
    seen = [caption for batch in whole for caption in batch.captions]
    assert set(seen) == {f"0 {n}" for n in range(7)} | {f"1 {n}" for n in range(5)}
    texts = whole[0].cond["text"]
    assert texts.shape[1] % 8 == 0 and texts.dtype == torch.float32


def test_buckets_may_share_a_step_in_whole_passes(tmp_path):
    folder = str(filled(tmp_path))
    source = Latents(folder, dropout=0.0, mix=2).open(0, CPU)
    shapes = [
        [read(source, [8 * s + 4 * half + i for i in range(4)], 8).video.shape for half in (0, 1)] for s in range(6)
    ]
    assert any(a != b for a, b in shapes)
    with pytest.raises(UserError, match=r"run\.data\.mix"):
        read(source, list(range(8)), 8)


def test_unfinished_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no prepared data"):
        Prepared(tmp_path)
    folder = filled(tmp_path)
    (folder / store.INDEX).write_bytes(b"x")
    with pytest.raises(UserError, match=r"index\.safetensors"):
        Prepared(folder)


def test_what_is_read_ahead_is_what_would_have_been_read(tmp_path):
    data = Prepared(filled(tmp_path))
    ahead, alone = Visits(data, 0, ("clean",)), Visits(data, 0, ("clean",))
    for step in (0, 1, 2, 2, 5, 6, 3):
        samples = [4 * step + i for i in range(4)]
        fresh = Visits(data, 0, ("clean",))
        assert ahead(samples, 4).numbers == fresh(samples, 4).numbers
    assert torch.equal(ahead([0, 1], 4).tensors["clean"], alone([0, 1], 4).tensors["clean"])


def test_next_batches_are_made_while_one_is_used_and_repeated_ones_once():
    made, begun = [], threading.Event()

    def make(samples):
        made.append(samples)
        if samples == (8, 9):
            begun.set()
        return samples

    ahead = Ahead(make, depth=2, threads=1)
    assert ahead([0, 1]) == (0, 1) and ahead([4, 5]) == (4, 5)
    assert begun.wait(5), "the one after the next two begins by itself"
    assert ahead([4, 5]) == (4, 5) and ahead([8, 9]) == (8, 9)
    time.sleep(0.05)
    assert len(made) == len(set(made)), "the batch of two turns is made once"


def test_an_error_of_reading_reaches_the_one_who_asked():
    def make(samples):
        raise UserError(f"no {samples[0]}")

    ahead = Ahead(make)
    for first in (0, 2):
        with pytest.raises(UserError, match=f"no {first}"):
            ahead([first])

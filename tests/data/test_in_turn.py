"""Datasets that take turns: every part sees the samples it would see alone, in batches that are shared out evenly."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from kinema import seeds
from kinema.data.batch import Batch, Source
from kinema.data.in_turn import InTurn
from kinema.errors import UsageError
from kinema.seeds import Keys

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Counted:
    """Videos that are the sample's number, in a range of their own, with the noise that their keys draw."""

    first: int

    def open(self, seed: int, device: torch.device) -> Source:
        def source(samples: Sequence[int], keys: Keys) -> Batch:
            numbers = torch.tensor([[float(self.first + n)] for n in samples])
            captions = tuple(str(self.first + n) for n in samples)
            return Batch(numbers, keys, {"text": keys.normal(2)}, {"text": numbers}, captions)

        return source


def test_parts_take_turns_and_keep_their_own_samples_and_noise():
    source = InTurn((Counted(0), Counted(100), Counted(200))).open(0, CPU)
    samples = [7, 8, 9, 10, 11]
    keys = seeds.keys(0, "train", samples)
    batch = source(samples, keys)
    assert batch.video[:, 0].tolist() == [102, 202, 3, 103, 203]
    assert batch.captions == ("102", "202", "3", "103", "203")
    assert torch.equal(batch.uncond["text"], batch.video)
    assert torch.equal(batch.cond["text"], keys.normal(2)) and torch.equal(batch.keys.key, keys.key)
    alone = source(samples[2:3], keys[2:3])  # of one part only
    assert torch.equal(alone.video, batch.video[2:3]) and torch.equal(alone.cond["text"], batch.cond["text"][2:3])


def test_no_parts_are_refused():
    with pytest.raises(UsageError, match="no parts"):
        InTurn(())

import math

import pytest
import torch

from kinema import seeds

MASK = (1 << 64) - 1


def unsigned(x: int) -> int:
    return x & MASK


def splitmix64(state: int, n: int) -> list[int]:
    """The reference, on Python's integers: n outputs of the generator started at `state`."""
    outputs = []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def of_keys(*keys: int) -> seeds.Keys:
    signed = [key - (1 << 64) if key >> 63 else key for key in keys]
    return seeds.Keys(torch.tensor(signed), torch.arange(len(keys)), len(keys), 0)


def test_bits_are_splitmix64():
    keys = [0, 1, 1234567, MASK, 1 << 63]
    drawn = of_keys(*keys).bits(5).tolist()
    assert [[unsigned(x) for x in row] for row in drawn] == [splitmix64(key, 5) for key in keys]
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_covers_the_unit_interval_evenly():
    u = seeds.keys(0, "test", range(64)).uniform(4096)
    assert u.dtype == torch.float32
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=64, min=0, max=1)
    expected = u.numel() / 64
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 63 + 5 * math.sqrt(2 * 63)


def test_normal_has_the_moments_and_tails_of_a_gaussian():
    z = seeds.keys(0, "test", range(64)).normal(4096).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for edge in (1.0, 2.0, 3.0):
        p = math.erfc(edge / math.sqrt(2))
        assert abs((z.abs() > edge).double().mean() - p) < 5 * math.sqrt(p / n)
    assert z.isfinite().all()


def test_neighbouring_draws_rows_and_streams_are_uncorrelated():
    keys = seeds.keys(0, "test", range(256))
    z = keys.normal(1024).double()
    noise = 5 / math.sqrt(z.numel())
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < noise
    assert abs((z[1:] * z[:-1]).mean()) < noise
    for other in (keys.fold("other"), seeds.keys(0, "tesu", range(256)), seeds.keys(1, "test", range(256))):
        assert abs((z * other.normal(1024).double()).mean()) < noise


def test_integers_are_even():
    drawn = seeds.keys(0, "test", range(64)).integers(7, 1000)
    counts = torch.bincount(drawn.flatten(), minlength=7).double()
    assert len(counts) == 7
    assert (counts - 64000 / 7).abs().max() < 5 * math.sqrt(64000 / 7)


def test_a_sample_draws_the_same_in_any_batch():
    whole = seeds.keys(3, "train", range(8))
    parts = [seeds.keys(3, "train", [i], [i], 8) for i in range(8)]
    assert torch.equal(whole.normal(2, 3), torch.cat([part.normal(2, 3) for part in parts]))
    assert torch.equal(whole.fold("time").uniform(), torch.cat([part.fold("time").uniform() for part in parts]))
    assert torch.equal(whole[2:5].normal(4), whole.normal(4)[2:5])


def test_a_longer_draw_begins_with_the_shorter_one():
    keys = seeds.keys(0, "test", range(3))
    assert torch.equal(keys.normal(10)[:, :4], keys.normal(4))


def test_folding_is_independent_of_what_was_drawn_before():
    keys = seeds.keys(0, "test", range(3))
    before = keys.fold("a").normal(4)
    keys.normal(100), keys.fold("b").normal(100)
    assert torch.equal(keys.fold("a").normal(4), before)
    assert not torch.equal(keys.fold("a").fold("b").normal(4), keys.fold("b").fold("a").normal(4))
    assert keys.fold("a").shared != keys.fold("b").shared


def test_all_micro_batches_and_ranks_share_the_key_of_their_step():
    batch = 8
    for step in range(3):
        samples = range(step * batch, (step + 1) * batch)
        parts = [seeds.keys(5, "train", samples[i : i + 2], range(i, i + 2), batch) for i in range(0, batch, 2)]
        assert {part.shared for part in parts} == {seeds.keys(5, "train", samples).shared}
    shared = {seeds.keys(5, "train", range(step * batch, (step + 1) * batch)).shared for step in range(3)}
    assert len(shared) == 3


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_permutation_has_every_number_once(n):
    order = seeds.permutation(n, 0, "data", 1)
    assert torch.equal(order.sort().values, torch.arange(n))


def test_permutations_differ_by_name_and_have_no_favourite_place():
    assert not torch.equal(seeds.permutation(100, 0, "data", 1), seeds.permutation(100, 0, "data", 2))
    first = torch.tensor([int(seeds.permutation(4, epoch)[0]) for epoch in range(2000)])
    counts = torch.bincount(first, minlength=4).double()
    assert (counts - 500).abs().max() < 5 * math.sqrt(500)


def test_shared_is_in_range_and_even():
    drawn = torch.tensor([seeds.shared(5, "step", step) for step in range(5000)])
    counts = torch.bincount(drawn, minlength=5).double()
    assert len(counts) == 5
    assert (counts - 1000).abs().max() < 5 * math.sqrt(1000)
    assert seeds.shared(5, "step", 7) == seeds.shared(5, "step", 7)


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    seeds.keys(0, "test", range(3)).normal(5)
    seeds.permutation(5, 1)
    assert torch.equal(torch.get_rng_state(), before)

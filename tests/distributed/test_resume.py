"""A run goes on where it stopped, on as many ranks as there are now."""

import jobs
import pytest
import torch

pytestmark = pytest.mark.xdist_group("distributed")


def test_four_two_one_four_ranks_train_the_run_of_one(pool, tmp_path):
    straight, seen, _ = pool.run(1, jobs.resume, str(tmp_path / "straight"), 8)[0]
    visits: dict[int, list[float]] = {}
    for world, steps, plan in ((4, 2, {}), (2, 4, {"tensor": 2}), (1, 6, {}), (4, 8, {"replicate": 2})):
        answers = pool.run(world, jobs.resume, str(tmp_path / "moved"), steps, plan)
        for _, drawn, _ in answers:
            visits |= dict(drawn)
        copies = {copy: [n for n, _ in drawn] for _, drawn, copy in answers}
        assert len(copies) == world // plan.get("tensor", 1)
        each = [n for numbers in copies.values() for n in set(numbers)]
        assert sorted(each) == list(range(4 * (steps - 2), 4 * steps)), "each sample of these steps on one rank"
    assert visits == dict(seen), "every sample once, with the noise it has on one rank"
    state, _, _ = answers[0]
    for name, tensor in straight.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-9, rtol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("plan", [{"replicate": 2}, {"tensor": 2}], ids=str)
def test_resumed_run_is_bitwise_the_straight_one_on_the_same_ranks(pool, tmp_path, plan):
    straight = pool.run(4, jobs.resume, str(tmp_path / "straight"), 6, plan)
    pool.run(4, jobs.resume, str(tmp_path / "twice"), 3, plan)
    for (state, _, _), (again, _, _) in zip(
        straight, pool.run(4, jobs.resume, str(tmp_path / "twice"), 6, plan), strict=True
    ):
        assert state.keys() == again.keys()
        assert all(torch.equal(state[name], again[name]) for name in state)


def test_every_rank_reads_back_its_own_part_of_the_average(pool, tmp_path):
    written = pool.run(4, jobs.trained_parts, str(tmp_path))
    read = pool.run(4, jobs.parts, str(tmp_path))
    name = "student.ema.blocks.0.ffn.0.weight"
    assert not torch.equal(written[0][name], written[1][name])
    for ours, theirs in zip(written, read, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

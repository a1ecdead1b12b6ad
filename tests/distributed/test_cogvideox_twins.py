"""CogVideoX, whole and with adapters, on other numbers of processes: the same losses and weights."""

from pathlib import Path

import jobs_cogvideox
import pytest
import torch

pytestmark = pytest.mark.xdist_group("distributed")

LAYOUTS = {
    "fsdp 2": (2, {}),
    "tensor 2": (2, {"tensor": 2}),
    "fsdp x tensor 2x2": (4, {"tensor": 2}),
}


@pytest.mark.parametrize("edited", [False, True], ids=["whole", "lora"])
def test_a_laid_out_run_equals_that_of_one_process(pool, tmp_path, edited):
    losses, state = pool.run(1, jobs_cogvideox.train, str(tmp_path / "alone"), edited)[0]
    assert len(losses) == 4 and losses[-1] < losses[0]
    for name, (world, plan) in LAYOUTS.items():
        folder = Path(tmp_path / name.replace(" ", "-"))
        for others, there in pool.run(world, jobs_cogvideox.train, str(folder), edited, plan):
            assert others == pytest.approx(losses, rel=1e-5), name  # logged in float32
            assert there.keys() == state.keys()
            for key in state:
                message = f"{name}, {key}"
                torch.testing.assert_close(
                    there[key], state[key], atol=1e-9, rtol=1e-8, msg=lambda m, s=message: f"{s}: {m}"
                )


def test_a_file_of_adapters_is_read_into_shards(pool, tmp_path):
    """Each rank reads its part, and the base is recognised although no rank has all of it."""
    written = pool.run(1, jobs_cogvideox.write, str(tmp_path))[0]
    for plan in ({}, {"tensor": 2}):
        for read in pool.run(2, jobs_cogvideox.read, str(tmp_path), plan):
            assert all(torch.equal(read[name], written[name]) for name in written)

"""Rollouts of a causal Wan laid out over processes: the same video, gradients and work as in one."""

import jobs
import pytest
import torch
from world import SIZE

from kinema.models.wan.spec import WanCausal
from kinema.models.wan.transformer import WanTransformer
from kinema.objectives.dmd import DMD
from kinema.objectives.gan import GAN
from kinema.objectives.sid import SiD

pytestmark = pytest.mark.xdist_group("distributed")

LAYOUTS = {
    "fsdp 2": (2, {}),
    "tensor 2": (2, {"tensor": 2}),
    "fsdp 2, recomputed": (2, {"recompute": "block"}),
    "fsdp x tensor 2x2, recomputed": (4, {"tensor": 2, "recompute": "block"}),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network whose weights are all random: a fresh one ends in zeros, which hide what comes before."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in WanTransformer(SIZE).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    named = {
        name: 0.25 * torch.randn(shape, generator=generator) + ("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }
    return str(WanCausal(size=SIZE).export(named, tmp_path_factory.mktemp("weights") / "causal"))


@pytest.fixture(scope="module")
def alone(pool, weights):
    return pool.run(1, jobs.roll, weights)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_laid_out_rollout_equals_that_of_one_process(pool, weights, alone, layout):
    world, plan = LAYOUTS[layout]
    for video, calls, gradients in pool.run(world, jobs.roll, weights, plan):
        assert calls == alone[1] and calls.count(False) == 2 and calls.count(True) == 8  # once, and in graded passes
        torch.testing.assert_close(video, alone[0], atol=1e-5, rtol=1e-5)  # the path's arithmetic is float32
        for name, gradient in alone[2].items():
            torch.testing.assert_close(
                gradients[name], gradient, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert gradients["blocks.1.cross_attn.k.weight"].any()


@pytest.mark.parametrize("kind", [DMD, SiD, GAN])
def test_a_laid_out_game_equals_that_of_one_process(pool, weights, tmp_path, kind):
    """Six steps of critic and student in turns, with accumulation, and gradients through the other's network."""
    rows_alone, state_alone = pool.run(1, jobs.match, str(tmp_path / "alone"), kind, weights, 1)[0]
    for rows, state in pool.run(2, jobs.match, str(tmp_path / "two"), kind, weights, 2):
        assert [row[0] for row in rows] == [row[0] for row in rows_alone] and len(rows) == 9
        for (_, metrics, gradients), (_, metrics_alone, gradients_alone) in zip(rows, rows_alone, strict=True):
            assert gradients.keys() == gradients_alone.keys()
            for name in [name for name in metrics_alone if name.startswith("loss/")]:
                assert metrics[name] == pytest.approx(metrics_alone[name], rel=1e-3, abs=1e-6)
            for name, gradient in gradients_alone.items():
                torch.testing.assert_close(gradients[name], gradient, atol=1e-4, rtol=1e-3)
        for name, tensor in state_alone.items():
            torch.testing.assert_close(state[name], tensor, atol=1e-4, rtol=1e-3)

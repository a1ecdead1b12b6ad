"""The same run on other numbers of processes, laid out in other ways: the same losses, gradients and weights."""

import jobs
import pytest
import torch

pytestmark = pytest.mark.xdist_group("distributed")

LAYOUTS = {
    "fsdp 2": (2, {}),
    "zero2 2": (2, {"reshard": False}),
    "replicas 2": (2, {"replicate": 2}),
    "tensor 2": (2, {"tensor": 2}),
    "fsdp 4": (4, {}),
    "hsdp 2x2": (4, {"replicate": 2}),
    "fsdp x tensor 2x2": (4, {"tensor": 2}),
    "replicas x tensor 2x2": (4, {"replicate": 2, "tensor": 2}),
    "fsdp 4, recomputed": (4, {"recompute": "block"}),
}


@pytest.fixture(scope="module")
def alone(pool, tmp_path_factory):
    return pool.run(1, jobs.train, str(tmp_path_factory.mktemp("alone")))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_laid_out_run_equals_that_of_one_process(pool, tmp_path, alone, layout):
    """Two roles learn in turns, with accumulation, passes without gradient, and gradients through a frozen network."""
    world, plan = LAYOUTS[layout]
    for rows, state in pool.run(world, jobs.train, str(tmp_path), 6, plan):
        assert len(rows) == 9  # 6 updates of the critic and 3 of the student
        for (role, metrics, gradients), (role_alone, metrics_alone, gradients_alone) in zip(
            rows, alone[0], strict=True
        ):
            assert role == role_alone and gradients.keys() == gradients_alone.keys()
            assert metrics == pytest.approx(metrics_alone, rel=1e-5)  # logged in float32
            close(gradients, gradients_alone)
        close(state, alone[1])


TOKEN_LAYOUTS = [("dimo", "zero2 2"), ("dimo", "fsdp x tensor 2x2"), ("reinforce", "hsdp 2x2")]


@pytest.fixture(scope="module")
def tokens_alone(pool, tmp_path_factory):
    made = {}
    for kind in ("dimo", "reinforce"):
        made[kind] = pool.run(1, jobs.distil, str(tmp_path_factory.mktemp(kind)), kind, 4)[0]
    return made


@pytest.mark.parametrize(("kind", "layout"), TOKEN_LAYOUTS)
def test_a_laid_out_distillation_of_tokens_equals_that_of_one_process(pool, tmp_path, tokens_alone, kind, layout):
    """Its heads run loops outside the network's own forward pass, and two heads at once."""
    world, plan = LAYOUTS[layout]
    rows_alone, state_alone = tokens_alone[kind]
    for rows, state in pool.run(world, jobs.distil, str(tmp_path), kind, 4, plan):
        assert [row[0] for row in rows] == [row[0] for row in rows_alone] and len(rows) == 7
        for (_, metrics, gradients), (_, metrics_alone, gradients_alone) in zip(rows, rows_alone, strict=True):
            assert metrics == pytest.approx(metrics_alone, rel=1e-5, abs=1e-6)
            close(gradients, gradients_alone)
        counted = ("memory.passes",)  # of a rank
        close(*({name: t for name, t in made.items() if name not in counted} for made in (state, state_alone)))


def close(here, there):
    assert here.keys() == there.keys()
    for name in there:
        torch.testing.assert_close(
            here[name], there[name], atol=1e-9, rtol=1e-8, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("shards", ["plan", "all", "none"])
def test_a_frozen_teacher_may_lie_otherwise_and_in_bfloat16(pool, tmp_path, shards):
    """Under replicate 2 × shard 2, a teacher in shards of 2, of 4, or whole on each rank is the same teacher."""
    (rows, state), *_ = pool.run(4, jobs.train, str(tmp_path / "four"), 2, {"replicate": 2}, jobs.teacher(shards))
    ((rows_alone, state_alone),) = pool.run(1, jobs.train, str(tmp_path / "one"), 2, {}, jobs.teacher("plan"))
    assert [role for role, _, _ in rows] == ["student", "critic", "critic"] == [role for role, _, _ in rows_alone]
    close(state, state_alone)

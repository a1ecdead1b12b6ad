"""The twins on two GPUs, through NCCL: equal up to rounding, whose size is stated here."""

import jobs
import jobs_ttt
import pytest
import torch
from pool import Pool

from kinema.models.ttt.gated_deltanet import GatedDeltaNet
from kinema.models.ttt.lact import LaCT
from kinema.models.ttt.ttt_layer import TTTMLP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
LAYOUTS = {"fsdp": {}, "zero2": {"reshard": False}, "replicas": {"replicate": 2}, "tensor": {"tensor": 2}}
BFLOAT16 = {"compute": "bfloat16", "recompute": "block"}


@pytest.fixture(scope="module")
def gpus(stores):
    pool = Pool(2, device="cuda")
    yield pool
    pool.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_train_like_one_in_float32(gpus, tmp_path, layout):
    (rows, state), _ = gpus.run(2, jobs.train, str(tmp_path / "two"), 6, LAYOUTS[layout], dtype="float32")
    ((rows_alone, state_alone),) = gpus.run(1, jobs.train, str(tmp_path / "one"), 6, dtype="float32")
    for (_, metrics, _), (_, metrics_alone, _) in zip(rows, rows_alone, strict=True):
        assert metrics == pytest.approx(metrics_alone, rel=1e-4)
    for name in state_alone:
        torch.testing.assert_close(state[name], state_alone[name], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_train_like_one_in_bfloat16(gpus, tmp_path, layout):
    plan = {**LAYOUTS[layout], **BFLOAT16}
    (rows, _), _ = gpus.run(2, jobs.train, str(tmp_path / "two"), 6, plan, dtype="float32")
    ((rows_alone, _),) = gpus.run(1, jobs.train, str(tmp_path / "one"), 6, BFLOAT16, dtype="float32")
    for (_, metrics, gradients), (_, metrics_alone, gradients_alone) in zip(rows, rows_alone, strict=True):
        assert metrics == pytest.approx(metrics_alone, rel=3e-2)
        ours, theirs = (torch.cat([g.flatten() for g in gs.values()]) for gs in (gradients, gradients_alone))
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99


@pytest.mark.parametrize("mixer", [LaCT(), GatedDeltaNet(), TTTMLP(8, n=8, passes="parallel")], ids=lambda m: m.kind)
def test_a_video_on_two_gpus_is_that_of_one(gpus, tmp_path, mixer):
    losses, state = gpus.run(1, jobs_ttt.train, str(tmp_path / "one"), mixer, 3)[0]
    for others, there in gpus.run(2, jobs_ttt.train, str(tmp_path / "two"), mixer, 3, {"context": 2}):
        assert others == [pytest.approx(row, rel=1e-5) for row in losses]  # logged in float32
        for key in state:
            torch.testing.assert_close(there[key], state[key], atol=1e-9, rtol=1e-8)

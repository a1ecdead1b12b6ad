"""One long video on several ranks: the same losses, gradients and weights as on one."""

import jobs_ttt
import pytest
import torch

pytestmark = pytest.mark.xdist_group("distributed")
# kind, segments, processes, plan; unequal shares, and ranks that share nothing but weights
LAYOUTS = [
    ("ttt_mlp", 4, 4, {"context": 2}),
    ("lact", 5, 4, {"context": 4}),
    ("gated_deltanet", 2, 4, {"context": 2, "replicate": 2, "recompute": "block"}),
]


@pytest.mark.parametrize(("kind", "segments", "processes", "plan"), LAYOUTS)
def test_a_shared_video_is_that_of_one_process(pool, tmp_path, kind, segments, processes, plan):
    losses, state = pool.run(1, jobs_ttt.train, str(tmp_path / "alone"), kind, segments)[0]
    for others, there in pool.run(processes, jobs_ttt.train, str(tmp_path / "shared"), kind, segments, plan):
        assert others == [pytest.approx(row, rel=1e-5) for row in losses]  # logged in float32
        assert there.keys() == state.keys()
        for key in state:
            torch.testing.assert_close(
                there[key], state[key], atol=1e-9, rtol=1e-8, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_shares_that_cannot_be_are_refused(pool, tmp_path):
    with pytest.raises(AssertionError, match="2 segments cannot be shared by 4 ranks"):
        pool.run(4, jobs_ttt.train, str(tmp_path), "none", 2, {"context": 4})

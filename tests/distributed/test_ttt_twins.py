"""One long video on several ranks: the same losses, gradients and weights as on one."""

import jobs_ttt
import pytest
import torch

from kinema.models.ttt.full_attention import NoMixer
from kinema.models.ttt.gated_deltanet import GatedDeltaNet
from kinema.models.ttt.lact import LaCT
from kinema.models.ttt.ttt_layer import TTTMLP

pytestmark = pytest.mark.xdist_group("distributed")
# mixer, segments, processes, plan; unequal shares, and ranks that share nothing but weights
LAYOUTS = [
    (TTTMLP(8, n=8, passes="parallel"), 4, 4, {"context": 2}),
    (LaCT(), 5, 4, {"context": 4}),
    (LaCT(group="segment"), 3, 2, {"context": 2}),
    (GatedDeltaNet(), 2, 4, {"context": 2, "replicate": 2, "recompute": "block"}),
]


@pytest.mark.parametrize(("mixer", "segments", "processes", "plan"), LAYOUTS)
def test_a_shared_video_is_that_of_one_process(pool, tmp_path, mixer, segments, processes, plan):
    losses, state = pool.run(1, jobs_ttt.train, str(tmp_path / "alone"), mixer, segments)[0]
    for others, there in pool.run(processes, jobs_ttt.train, str(tmp_path / "shared"), mixer, segments, plan):
        assert others == [pytest.approx(row, rel=1e-5) for row in losses]  # logged in float32
        assert there.keys() == state.keys()
        for key in state:
            torch.testing.assert_close(
                there[key], state[key], atol=1e-9, rtol=1e-8, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_shares_that_cannot_be_are_refused(pool, tmp_path):
    with pytest.raises(AssertionError, match="2 segments cannot be shared by 4 ranks"):
        pool.run(4, jobs_ttt.train, str(tmp_path), NoMixer(), 2, {"context": 4})

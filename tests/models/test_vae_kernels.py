"""The kernel of the fast decoder lays every activated frame where the plain functions lay it; run as
`test_fused_kernels.py` says."""

import on_triton
import pytest
import torch
from tiny_causal import noise

GPU = on_triton.GPU
HALF = torch.bfloat16 if GPU else torch.float16
pytestmark = on_triton.marks


def given(name, *shape, dtype=torch.float32):
    """Eighths, whose sums are exact: it is no matter in which order these are rounded."""
    return (noise(name, *shape) * 8).round().div(8).to(dtype).to("cuda" if GPU else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("frames", "fine", "shortcut", "channels"), [(1, False, True, 12), (3, True, False, 7)])
def test_frames_are_activated_and_laid_as_by_the_plain_functions(frames, fine, shortcut, channels, beside, dtype):
    from kinema.models.wan import vae_kernels

    rows, columns = 6, 10
    coarse = (2, frames, rows // 2, columns // 2, 4 * channels)
    raw = given("raw", *(coarse if fine else (2, frames, rows, columns, channels)), dtype=dtype)
    bias, gamma = (given(name, channels, dtype=dtype) for name in ("bias", "gamma"))
    more = given("shortcut", 2, frames, rows, columns, channels, dtype=dtype) if shortcut else None
    before = given("before", 2, 2, rows, columns, channels, dtype=dtype)
    args, bound = (raw, bias, more, gamma, before, fine, beside), max(torch.finfo(dtype).eps, 1e-5)
    for function, kernel in vae_kernels.KERNELS.items():
        made, plain = kernel(*args), function(*args)
        assert len(made) == len(plain)
        for a, b in zip(made, plain, strict=True):
            assert a.is_contiguous()
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)

"""Where Triton's kernels can be tested: on a GPU, or in Triton's interpreter (`make kernels`)."""

import os
from importlib.util import find_spec

import pytest
import torch

GPU = torch.cuda.is_available()
marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        find_spec("triton") is None or not (GPU or os.environ.get("TRITON_INTERPRET") == "1"),
        reason="there is neither a GPU nor Triton's interpreter",
    ),
]

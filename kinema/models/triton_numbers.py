"""How Triton kernels read and write numbers: they are float32 inside, whatever the tensors are."""

import triton  # type: ignore[reportMissingImports]
import triton.language as tl  # type: ignore[reportMissingImports]


@triton.jit
def load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, at, inside, x):
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside)

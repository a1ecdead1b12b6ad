"""The kernels written for a Wan block are the plain functions, at sizes that divide by nothing.

They run on a GPU or, where there is none, in Triton's interpreter, with TRITON_INTERPRET=1 and Triton installed. The
interpreter cuts bfloat16 off where GPUs round it, and rounds to 8 bits wrongly: there it is float16 that has to be
exact, and 8-bit numbers are kept in float32 and rounded by torch.
"""

import on_triton
import pytest
import torch
from tiny_causal import noise

from kinema.models import attention, fp8, fused

GPU = on_triton.GPU
HALF = torch.bfloat16 if GPU else torch.float16
pytestmark = on_triton.marks
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF])
SIZES = pytest.mark.parametrize(
    ("batch", "times", "tokens", "dim"), [(2, 3, 6, 44), (1, 1, 5, 37), (2, 1, 3, 64), (1, 2, 4, 1536)]
)


def given(name, *shape, dtype=torch.float32):
    return noise(name, *shape).to(dtype).to("cuda" if GPU else "cpu")


def eighths(name, *shape, dtype=torch.float32):
    """Numbers whose products and sums are exact in float32: it is no matter in which order these are rounded."""
    return (given(name, *shape, dtype=torch.float32) * 8).round().div(8).to(dtype)


def cells(name, batch, times, dim):
    """Scale, shift and gate as a pass has them: views of one tensor of six."""
    return eighths(name, batch, times, 6, 1, dim).unbind(2)[:3]


def same(made, function, args, dtype):
    """Within float32's rounding of the function in float64; where that is rounded further, within one such rounding."""
    exact = function(*(x.double() if isinstance(x, torch.Tensor) else x for x in args))
    bound = 1e-5 if dtype == torch.float32 else 1.01 * torch.finfo(dtype).eps
    made, exact = (each if isinstance(each, tuple) else (each,) for each in (made, exact))
    for a, b in zip(made, exact, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound * float(b.std()))


def same_rows(made, plain):
    """8-bit rows of the same scales; a number in a hundred, between two steps, may be rounded to the other one.

    The kernels multiply by a scale's inverse; half ones among numbers that divide by the greatest are such.
    """
    numbers = made.numbers.to(torch.float8_e4m3fn)
    torch.testing.assert_close(made.scale, plain.scale, rtol=2e-6, atol=0)
    off = (numbers.float() - plain.numbers.float()).abs()
    assert (off <= (plain.numbers.float().abs() / 8).clamp(min=2.0**-9)).all() and (off > 0).float().mean() < 1e-2


@pytest.fixture
def kernels(monkeypatch):
    from kinema.models import fused_kernels

    if not GPU:
        monkeypatch.setattr(fused_kernels, "EIGHT", torch.float32)
    return fused_kernels


def cases(batch, times, tokens, dim, dtype):
    """Of each function of a norm, its arguments."""
    x, y = (eighths(name, batch, tokens * times, dim, dtype=dtype) for name in "xy")
    scale, shift, gate = cells("vectors", batch, times, dim)
    weight, bias = (given(name, dim, dtype=dtype) for name in ("weight", "bias"))
    return {
        fused.modulated: (x, scale, shift, 1e-6),
        fused.gated_affine: (x, gate, y, weight, bias, 1e-6),
        fused.added_modulated: (x, y, scale, shift, 1e-6),
        fused.gated_modulated: (x, gate, y, scale, shift, 1e-6),
    }


@DTYPES
@SIZES
def test_norms_are_the_plain_functions(kernels, batch, times, tokens, dim, dtype):
    for function, args in cases(batch, times, tokens, dim, dtype).items():
        made, plain = kernels.KERNELS[function](*args), function(*args)
        if dtype == torch.float32:
            same(made, function, args, dtype)
        for a, b in zip(made, plain, strict=True) if isinstance(made, tuple) else [(made, plain)]:
            bound = max(torch.finfo(dtype).eps, 1e-5)
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)
            assert a.is_contiguous() and (dtype == torch.float32 or (a != b).float().mean() < 1e-2)


@SIZES
def test_norms_quantise_as_the_plain_functions_do(kernels, batch, times, tokens, dim):
    for function, args in cases(batch, times, tokens, dim, HALF).items():
        made, plain = kernels.KERNELS[function](*args, True), function(*args, True)
        if not isinstance(made, fp8.Rows):
            (total, made), (expected, plain) = made, plain
            assert torch.equal(total, expected)
        same_rows(made, plain)
    x = given("x", batch, tokens, dim, dtype=HALF)
    x[0, 0] = 0
    same_rows(kernels.as_operand(x, True), fused.as_operand(x, True))
    assert kernels.as_operand(x) is x


@DTYPES
def test_rows_that_lie_apart_are_read_where_they_lie(kernels, dtype):
    x, y = given("xy", 2, 5, 3 * 44, dtype=dtype).chunk(3, dim=-1)[1:]
    scale, shift, _ = cells("vectors", 1, 5, 44)  # of one video for two
    torch.testing.assert_close(
        kernels.added_modulated(x, y, scale, shift, 1e-6)[1], fused.added_modulated(x, y, scale, shift, 1e-6)[1]
    )
    x = x.transpose(1, 2)
    torch.testing.assert_close(kernels.activated(x), fused.activated(x))


@DTYPES
@pytest.mark.parametrize(("batch", "tokens", "heads", "head_dim"), [(2, 3, 3, 14), (1, 5, 2, 8), (1, 2, 12, 128)])
def test_turned_writes_keys_and_values_into_their_places_and_nowhere_else(
    kernels, batch, tokens, heads, head_dim, dtype
):
    qkv = given("qkv", batch, tokens, 3 * heads * head_dim, dtype=dtype)
    weights = [given(name, heads * head_dim, dtype=dtype) for name in ("q", "k")]
    angles = given("angles", tokens, head_dim // 2)
    found = []
    for function in (kernels.turned, fused.turned):
        rings = [torch.full((batch, tokens + 4, heads, head_dim), 7.0, dtype=dtype).to(qkv.device) for _ in "kv"]
        places = [ring[:, 3 : 3 + tokens] for ring in rings]
        q = function(qkv, *weights, angles.cos(), angles.sin(), 1e-6, *places)
        found.append((q, *rings))
    for a, b in zip(*found, strict=True):
        bound = max(2 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
        assert dtype == torch.float32 or (a != b).float().mean() < 1e-2
    assert found[0][0].shape == (batch, tokens, heads, head_dim) and torch.equal(found[0][2], found[1][2])
    if dtype == torch.float32:

        def plain(*args):
            rings = [torch.empty(qkv.shape[0], tokens, heads, head_dim, dtype=torch.float64) for _ in "kv"]
            rings = [ring.to(qkv.device) for ring in rings]
            q = fused.turned(*args, 1e-6, *rings)
            return (q, *rings)

        made = found[0][0], *(ring[:, 3 : 3 + tokens] for ring in found[0][1:])
        same(made, plain, (qkv, *weights, angles.cos(), angles.sin()), dtype)


@pytest.mark.parametrize("width", [37, 64, 129, 8960])
def test_activated_is_gelu_and_its_scale_is_known_before(kernels, width):
    x = given("x", 2, 3, width) * torch.tensor([3.0, 0.01, 1.0], device="cuda" if GPU else "cpu")[:, None]
    x[1, 1] = -x[1, 1].abs()  # nothing in it is above 0
    x[1, 0, 0], x[1, 0, 1] = 1000, -1000
    same(kernels.activated(x), fused.activated, (x,), torch.float32)
    same_rows(kernels.activated(x, True), fused.activated(x, True))
    half = x.to(HALF)
    made, plain = kernels.activated(half), fused.activated(half)
    torch.testing.assert_close(made, plain, rtol=2 * torch.finfo(HALF).eps, atol=1e-6)
    same_rows(kernels.activated(half, True), fused.activated(half, True))


@DTYPES
@pytest.mark.parametrize(("parts", "heads", "head_dim"), [(2, 3, 10), (5, 2, 16)])
def test_parts_are_put_together_in_one_kernel(kernels, parts, heads, head_dim, dtype):
    out = given("out", parts, 2, heads, 4, head_dim, dtype=dtype)
    normaliser = 3 * given("normaliser", parts, 2, heads, 4)
    first = given("first", 2, 7, heads, head_dim, dtype=dtype).transpose(1, 2)
    for each in (out, out.transpose(2, 3).contiguous().transpose(2, 3)):  # whichever way attention lays them
        made, plain = kernels.put_together(each, normaliser, first), attention.put_together(each, normaliser, first)
        assert made.stride() == plain.stride() and torch.equal(made[:, :, :7], first)
        bound = max(2 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(made, plain, rtol=bound, atol=bound)


def test_each_kernel_can_be_called_as_its_function(kernels):
    from inspect import signature

    for function, kernel in kernels.KERNELS.items():
        assert function.__name__ == kernel.__name__ and signature(function) == signature(kernel)

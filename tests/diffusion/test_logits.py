"""Logits in chunks are the whole ones: draws, cross-entropies and directions, in value and gradient, for any chunk."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from heads import Largest, Linear, plain
from known import draw as keys

from kinema.diffusion.logits import Logits, categorical, compare, cross_entropy, draw, steer, tokens

N, D, K = 30, 6, 17
CHUNKS = [1, 7, 64]


def made(rows: int = 1024, dtype=torch.float64, name: str = "a") -> Logits:
    draws = keys(1, name)
    head = Linear(draws.fold("w").normal(K, D)[0].to(dtype))
    hidden = draws.fold("h").normal(2, 3, 5, D)[0].to(dtype).requires_grad_()
    return Logits(hidden, head, dtype, rows)


def gradients(logits: Logits) -> tuple:
    return logits.hidden.grad, logits.head.weight.grad


@pytest.mark.parametrize("rows", CHUNKS)
def test_draws_do_not_depend_on_the_chunk(rows):
    u = keys(1).uniform(2, 3, 5)[0].double()
    whole, parts = (draw(replace(made(), rows=n), u, temperature=0.7) for n in (N, rows))
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.tokens, tokens(replace(made(), rows=rows), u, temperature=0.7))
    torch.testing.assert_close(whole, parts, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rows", CHUNKS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_in_value_and_gradient(rows, smoothing):
    targets, weight = keys(1).integers(K, 2, 3, 5)[0], keys(1, "w").normal(2, 3, 5)[0].double()
    ours, theirs = made(rows), made()
    (cross_entropy(ours, targets, smoothing) * weight).sum().backward()
    z = theirs.hidden @ theirs.head.weight.T
    loss = F.cross_entropy(z.flatten(0, 2), targets.flatten(), reduction="none", label_smoothing=smoothing)
    (loss * weight.flatten()).sum().backward()
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rows", CHUNKS)
def test_steering_moves_the_logits_along_the_direction(rows):
    ours, theirs, other = made(rows), made(), made(name="b").detach()
    u = keys(1, "u").normal(N)[0].double()

    def direction(rows, student, others):
        g = (others[0].softmax(-1) - 0.5 * student().softmax(-1)) * u[rows, None]
        return g, {"first": g[:, 0]}

    loss, seen = steer(ours, (other,), direction, 0.25)
    (3 * loss).backward()
    z = theirs.hidden @ theirs.head.weight.T
    g = (other.whole().softmax(-1) - 0.5 * z.detach().softmax(-1)) * u.view(2, 3, 5, 1)
    (3 * 0.25 * (z * g).sum()).backward()
    assert loss.item() == pytest.approx(0.125 * g.square().sum().item())
    assert torch.allclose(seen["first"], g[..., 0].flatten())
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_row_that_is_not_finite_moves_nothing_and_is_counted():
    bad, good = made(), made()
    with torch.no_grad():
        other = made(name="b").detach()
        broken = replace(other, hidden=other.hidden.clone())
        broken.hidden[0, 1, 2] = torch.nan
    loss, seen = steer(bad, (broken,), lambda rows, student, others: (others[0], {}))
    loss.backward()
    mask = torch.ones(2, 3, 5, 1, dtype=torch.float64)
    mask[0, 1, 2] = 0
    keep = mask.flatten()

    def masked(rows, student, others):
        return others[0] * keep[rows, None], {}

    steer(good, (other,), masked)[0].backward()
    assert seen["nonfinite"].sum() == 1
    for a, b in zip(gradients(bad), gradients(good), strict=True):
        torch.testing.assert_close(a, b)


def test_guided_logits_are_the_head_of_the_guided_rows():
    cond = made()
    uncond = replace(cond, hidden=made(name="b").hidden)
    w = keys(1).uniform(2, 3, 5)[0].double()
    for scale, by in ((3.0, 3.0), (w, w[..., None])):
        combined = uncond + scale * (cond - uncond)
        torch.testing.assert_close(combined.whole(), uncond.whole() + by * (cond.whole() - uncond.whole()))
    torch.testing.assert_close(torch.cat([part.whole() for part in cond.chunk(2)]), cond.whole())


def test_rows_finer_than_bfloat16_keep_what_guidance_adds():
    head = Linear(torch.randn(K, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    a, b = (keys(1, name).normal(4, 64)[0].bfloat16() for name in "ab")
    cond, uncond = (Logits(x, head, torch.bfloat16) for x in (a, b))
    exact = (b.double() + 7 * (a.double() - b.double())) @ head.weight.detach().double().T
    made = (uncond + 7.0 * (cond - uncond)).whole()
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), exact, atol=2e-3, rtol=1e-4)


def test_directions_between_nearly_equal_networks_survive_bfloat16():
    """Their difference is far below the spacing of bfloat16 logits."""
    head = Linear((3 * torch.randn(K, 64, generator=torch.Generator().manual_seed(0))).bfloat16())
    near = (head.weight + 2e-2 * torch.randn(K, 64, generator=torch.Generator().manual_seed(1))).bfloat16().detach()
    hidden = keys(1).normal(4, 64)[0].bfloat16()
    teacher, critic = Logits(hidden, head, torch.bfloat16), Logits(hidden, Linear(near), torch.bfloat16)

    def judge(rows, zs):
        return {"g": zs[1].softmax(-1) - zs[0].softmax(-1)}

    made = compare((teacher, critic), judge)["g"]
    exact = (hidden.double() @ near.double().T).softmax(-1) - (hidden.double() @ head.weight.double().T).softmax(-1)
    assert (made - exact).norm() < 1e-3 * exact.norm()


def test_a_code_without_probability_is_never_drawn():
    z = torch.zeros(1, 5)
    z[0, 4] = -torch.inf
    u = torch.cat([keys(1).uniform(200_000)[0], torch.tensor([1 - 2.0**-24, 0.0])])
    drawn = categorical(z.expand(len(u), -1), u)
    assert set(drawn.tolist()) == {0, 1, 2, 3}


def test_a_draw_takes_the_first_code_whose_cumulative_probability_exceeds_the_number():
    z = torch.tensor([0.5, 0.25, 0.0, 0.25]).log().expand(5, -1)
    assert categorical(z, torch.tensor([0.0, 0.49, 0.5, 0.75, 0.99])).tolist() == [0, 0, 1, 3, 3]


def test_a_row_of_nothing_gives_some_code():
    assert 0 <= categorical(torch.full((1, 4), -torch.inf), torch.tensor([0.3])).item() < 4


def test_top_p_draws_from_the_fewest_codes_that_hold_it():
    z = torch.tensor([0.1, 0.6, 0.3]).log().expand(1000, -1)
    drawn = draw(plain(z), keys(1).uniform(1000)[0], top_p=0.65).tokens
    assert set(drawn.tolist()) == {1, 2}


def test_entropy_and_probability_of_a_draw_are_those_of_its_row():
    z = keys(1).normal(9, K)[0]
    drawn = draw(plain(z), keys(1, "u").uniform(9)[0])
    p = z.softmax(-1)
    torch.testing.assert_close(drawn.entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(drawn.log_prob, p.log()[torch.arange(9), drawn.tokens])


def test_no_tensor_is_as_large_as_all_logits():
    n, codes = 512, 300
    head = Linear(keys(1).normal(codes, 8)[0])

    def logits(name: str, grad: bool = True) -> Logits:
        return Logits(keys(1, name).normal(n, 8)[0].requires_grad_(grad), head, torch.float32, rows=32)

    with Largest() as watch:
        student, teacher = logits("s"), logits("t", grad=False)
        drawn = draw(student, keys(1).uniform(n)[0])
        cross_entropy(student, drawn.tokens, 0.1).mean().backward()
        steer(student, (teacher, teacher), lambda rows, s, o: (o[0] - o[1] + s(), {}))[0].backward()
    assert watch.elements <= 32 * codes, watch.by

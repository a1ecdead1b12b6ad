"""TTT layers and other global mixers: their mathematics by other means, their walks, and the network that has them."""

import zlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from world import COGVIDEOX

from kinema.errors import UserError
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.transformer import SIZES, CogVideoXSize
from kinema.models.lora import LoRA
from kinema.models.ttt import delta_rule, large_chunk, replay, scan
from kinema.models.ttt.edit import KINDS, TTT, mixers
from kinema.models.ttt.full_attention import FullAttention, NoMixer
from kinema.models.ttt.gated_deltanet import GatedDeltaNet
from kinema.models.ttt.lact import LaCT
from kinema.models.ttt.order import Segments, scan_order
from kinema.models.ttt.ttt_layer import TTTMLP, TTTLinear
from kinema.models.ttt.turn import Turn

CPU = torch.device("cpu")
SIZE = replace(COGVIDEOX, text_tokens=5, grid=(5, 4, 6))
SMALL: dict[str, dict] = {"ttt_linear": {"mini_batch": 8, "n": 8}, "ttt_mlp": {"mini_batch": 8, "n": 8}}
WIDE = {"passes": "parallel", "order": "segments"}
MIXERS = {
    **{name: kind(**SMALL.get(name, {})) for name, kind in KINDS.items()},
    "ttt_mlp parallel": TTTMLP(8, n=8, **WIDE),
    "lact frames": LaCT(heads=2, expand=2, group=2),
    "lact segments": LaCT(heads=1, group="segment"),
    "lact sequential": LaCT(group="segment", passes="sequential"),
    "deltanet frame": GatedDeltaNet(chunk=7, read="frame"),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def noise(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def randomised(module: nn.Module, std: float = 0.2) -> nn.Module:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(std * noise(name, *p.shape) + float("norm" in name and name.endswith("weight")))
    return module


def fast_weights(kind: str, batch: int = 2, heads: int = 3, d: int = 16):
    f = 4 * d if kind == "ttt_mlp" else d
    shapes = [(d, f), (1, f)] + [(f, d), (1, d)] * (kind == "ttt_mlp")
    state = tuple(0.2 * noise(f"state{n}", batch, heads, *shape) for n, shape in enumerate(shapes))
    norm = 1 + 0.1 * noise("weight", heads, d), 0.1 * noise("bias", heads, d)
    return state, norm


def streams(length: int, d: int = 16):
    q, k, target = (noise(name, 2, 3, length, d) for name in ("q", "k", "target"))
    return q, k, target, 0.01 * noise("eta", 2, 3, length).abs()


@pytest.mark.parametrize("kind", ["ttt_linear", "ttt_mlp"])
def test_scan_is_gradient_descent_on_each_mini_batch_and_its_dual(kind):
    state, norm = fast_weights(kind)
    q, k, target, eta = streams(24)
    out, last = scan.scan(q, k, target, eta, state, norm, 8)
    for n in range(0, 24, 8):
        here = slice(n, n + 8)
        weights = [w.clone().requires_grad_() for w in state]
        said = scan.read(tuple(weights), k[:, :, here], norm) - k[:, :, here]
        loss = (0.5 * (said - target[:, :, here]).square().sum(-1) * eta[:, :, here]).sum()
        stepped = tuple(w - g for w, g in zip(state, torch.autograd.grad(loss, weights), strict=True))
        other = scan.dual(state, q[:, :, here], k[:, :, here], target[:, :, here], eta[:, :, here], norm)
        torch.testing.assert_close(scan.read(stepped, q[:, :, here], norm), out[:, :, here], atol=1e-8, rtol=0)
        torch.testing.assert_close(other, out[:, :, here], atol=1e-9, rtol=0)
        state = scan.learned(state, k[:, :, here], target[:, :, here], eta[:, :, here], norm)
    for a, b in zip(last, state, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_replay_changes_neither_outputs_nor_gradients_and_a_state_goes_on(monkeypatch):
    state, norm = fast_weights("ttt_mlp")
    given = [*streams(40), *state, *norm]
    results = []
    for plan in (1, 2, 16, "two calls", "nothing twice"):
        monkeypatch.setattr(replay, "SHORT", (1 << 24) * (plan == "nothing twice"))
        q, k, target, eta, *rest = leaves = [x.clone().requires_grad_() for x in given]
        weights, own = tuple(rest[:4]), (rest[4], rest[5])
        if plan == "two calls":
            first, middle = scan.scan(q[:, :, :24], k[:, :, :24], target[:, :, :24], eta[:, :, :24], weights, own, 8)
            parts = q[:, :, 24:], k[:, :, 24:], target[:, :, 24:], eta[:, :, 24:]
            second, last = scan.scan(*parts, middle, own, 8)
            out = torch.cat([first, second], dim=2)
        else:
            every = 2 if plan == "nothing twice" else plan
            out, last = scan.scan(q, k, target, eta, weights, own, 8, snapshot_every=every)
        loss = (out * noise("loss", *out.shape)).sum() + sum(w.square().sum() for w in last)
        results.append([out, *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-12)
    with pytest.raises(ValueError, match="40 tokens are not mini-batches of 16"):
        scan.scan(*given[:4], state, norm, 16)


def test_bfloat16_streams_do_not_drift_from_double_ones():
    state, norm = fast_weights("ttt_mlp", d=8)
    q, k, target, eta = streams(3200, d=8)
    k = F.normalize(k, dim=-1)
    exact, _ = scan.scan(q, k, target, eta, state, norm, 16)
    rounded, last = scan.scan(
        *(x.bfloat16() for x in (q, k, target)),
        eta.float(),
        tuple(w.float() for w in state),
        tuple(p.float() for p in norm),
        16,
    )
    error = (rounded.double() - exact).flatten(0, 1).norm(dim=-1) / exact.flatten(0, 1).norm(dim=-1)
    assert last[0].dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert error[:, :320].mean() < 1e-2 and error[:, -320:].mean() < 1e-2


def test_lact_update_is_a_gradient_and_keeps_the_lengths():
    state = tuple(0.3 * noise(f"w{n}", 2, 2, *shape) for n, shape in enumerate([(8, 12), (12, 8), (8, 12)]))
    k, v = (noise(name, 2, 2, 10, 8) for name in "kv")
    eta = 0.1 * noise("rates", 2, 2, 10, 3).abs()
    weights = [w.clone().requires_grad_() for w in state]
    per_token = -(large_chunk.read(tuple(weights), k) * v).sum(-1)
    lengths = large_chunk.lengths_of(state)
    after = large_chunk.moved(state, large_chunk.step(state, k, v, eta), lengths)
    for n, (before, made) in enumerate(zip(state, after, strict=True)):
        (gradient,) = torch.autograd.grad((per_token * eta[..., n]).sum(), weights[n], retain_graph=True)
        moved = before - gradient
        scaled = moved / (moved.norm(dim=-2, keepdim=True) + 1e-5) * before.norm(dim=-2, keepdim=True)
        torch.testing.assert_close(made, scaled, atol=1e-13, rtol=0)
        torch.testing.assert_close(made.norm(dim=-2), before.norm(dim=-2), atol=1e-4, rtol=1e-4)


def test_one_step_for_a_video_in_pieces_is_the_whole_step(monkeypatch):
    given = [noise(name, 2, 2, 30, 8) for name in "qkv"] + [0.1 * noise("rates", 2, 2, 30, 3).abs()]
    given += [0.3 * noise(f"w{n}", 2, 2, *shape) for n, shape in enumerate([(8, 12), (12, 8), (8, 12)])]
    results = []
    for piece, short in ((30, 1 << 24), (7, 1 << 24), (7, 0)):
        monkeypatch.setattr(large_chunk, "PIECE", piece)
        monkeypatch.setattr(replay, "SHORT", short)
        leaves = [x.clone().requires_grad_() for x in given]
        state = tuple(leaves[4:])
        out, last = large_chunk.scan(*leaves[:4], state, large_chunk.lengths_of(state), (30,))
        loss = (out * noise("loss", *out.shape)).sum() + sum(w.square().sum() for w in last)
        results.append([out, *last, *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_delta_rule_in_chunks_is_the_recurrence():
    q, k, v, _ = streams(30)
    k, beta, log_decay = F.normalize(k, dim=-1), noise("beta", 2, 3, 30).sigmoid(), -noise("decay", 2, 3, 30).abs()
    beta[:, :, 4], log_decay[:, :, 4] = 0, 0  # a token that is not there
    zero = torch.zeros(2, 3, 16, 16)
    S, outputs, states = zero, [], []
    for j in range(30):
        S = log_decay[:, :, j, None, None].exp() * S
        S = S + beta[:, :, j, None, None] * k[:, :, j, :, None] * (v[:, :, j, None] - k[:, :, j, None] @ S)
        states.append(S)
        outputs.append(q[:, :, j, None] @ S / 4)
    out, (last,) = delta_rule.scan(q, k, v, beta, log_decay, (zero,), chunk=7, snapshot_every=2)
    torch.testing.assert_close(out, torch.cat(outputs, dim=2), atol=1e-13, rtol=0)
    torch.testing.assert_close(last, S, atol=1e-13, rtol=0)
    torch.testing.assert_close(states[4], states[3], atol=0, rtol=0)
    out, _ = delta_rule.scan(q, k, v, beta, log_decay, (zero,), chunk=7, groups=(12, 18))
    torch.testing.assert_close(out[:, :, :12], q[:, :, :12] @ states[11] / 4, atol=1e-13, rtol=0)


# --- walks -----------------------------------------------------------------------------------------------------------

STAGES = {  # C, S, crc of the walk there and of the walk back
    3: (1, 498, 0xC90A12E3, 0x6666F19A),
    9: (3, 502, 0xE0082D23, 0xBA2B7C08),
    18: (6, 471, 0xA5AAABAF, 0xA66B5D3C),
    63: (21, 458, 0xCFAC3B32, 0xF554C08E),
}


@pytest.mark.parametrize("seconds", STAGES)
def test_reference_walks_are_those_of_the_public_code(seconds):
    count, text, *crcs = STAGES[seconds]
    segments = Segments.of((12 * count + 1, 30, 45), count, 12, text)
    turn = Turn.at([torch.arange(1)] * 3, 16)
    for backward, crc in zip((False, True), crcs, strict=True):
        order = scan_order(segments, turn, backward=backward, kind="reference", multiple=64)
        index = order.index[0]
        assert len(index) % 64 == 0 and zlib.crc32(index[: segments.length].int().numpy().tobytes()) == crc
        assert torch.equal(index[order.inverse[0]], torch.arange(segments.length))


def test_segments_walk_back_with_their_own_prompt():
    segments = Segments.of((7, 1, 2), 3, 2, 1)
    order = scan_order(segments, Turn.at([torch.arange(1)] * 3, 16), backward=True)
    assert order.index[0].tolist() == [2, 16, 15, 14, 13, 1, 12, 11, 10, 9, 0, 8, 7, 6, 5, 4, 3]
    assert order.groups == (5, 5, 7)


@pytest.mark.parametrize(
    "frames, count, says", [(37, 2, "give 3 prompts"), (37, 4, "give 3 prompts"), (36, 3, "2 prompts and 25 frames")]
)
def test_wrong_lengths_name_the_right_number(frames, count, says):
    with pytest.raises(UserError, match=says):
        Segments.of((frames, 30, 45), count, 12, 10)


# --- the network -----------------------------------------------------------------------------------------------------


def network(mixer, size: CogVideoXSize = SIZE, std: float = 0.2):
    spec = CogVideoX(size, edits=(TTT(mixer),))
    return randomised(spec.load(spec.build(), CPU), std)


def inputs(segments: int, batch: int = 2, text: int = 5):
    x = noise("x", batch, 4 * segments + 1, 4, 4, 6)
    t = torch.tensor([[3.0], [500.0]])[:batch]
    return x, t, noise("text", batch, segments, 12, 8)[:, :, :text]


@pytest.mark.parametrize("name", MIXERS)
def test_one_segment_with_closed_gates_is_the_plain_network(name):
    plain = CogVideoX(SIZE)
    module, base = network(MIXERS[name]), randomised(plain.load(plain.build(), CPU))
    x, t, text = inputs(1)
    for key, p in module.named_parameters():
        if ".gate." in key:
            nn.init.zeros_(p)
    torch.testing.assert_close(module(x, t, text=text[:, 0]), base(x, t, text=text[:, 0]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", MIXERS)
def test_padding_changes_nothing_and_everything_learns(name):
    module = network(MIXERS[name])
    x, t, text = inputs(3)
    valid = torch.ones(2, 3, 5, dtype=torch.bool)
    valid[0, 1, 3:], valid[1, 2, 4:] = False, False
    out = module(x, t, text=text, valid=valid)
    out.square().sum().backward()
    # nothing reads the text that leaves the last block, so of that one's gates some stay
    moved = {name: p.grad for name, p in mixers(module).items() if name.startswith("blocks.0.")}
    assert not [name for name, grad in moved.items() if grad is None or not grad.abs().sum() > 0]
    with torch.no_grad():
        _, _, longer = inputs(3, text=12)
        more = torch.cat([valid, torch.zeros(2, 3, 7, dtype=torch.bool)], dim=2)
        longer = torch.where(more[..., None], torch.cat([text, longer[:, :, 5:]], dim=2), longer + 9)
        torch.testing.assert_close(module(x, t, text=longer, valid=more), out, atol=1e-11, rtol=0)
        assert (module(x, t, text=text) - out).abs().max() > 1e-3


def test_segments_are_attended_to_as_in_a_loop():
    module = network(NoMixer())
    attn = module.blocks[0].attn
    x, _t, text = inputs(3)
    with torch.no_grad():
        _, words, _, span = module.long.share(x, text, None, (13, 2, 3), torch.float64)
        tokens = noise("tokens", 2, words.shape[1] + 13 * 6, 64)
        at_once = attn(tokens, span)
        one = replace(span, segments=1, frames=5)
        video, total = tokens[:, 15:].unflatten(1, (13, 6)), torch.zeros(2, 13, 6, 64)
        for i in range(3):
            frames = video[:, 4 * i : 4 * i + 5].flatten(1, 2)
            y = attn(torch.cat([tokens[:, 5 * i : 5 * i + 5], frames], dim=1), one)
            torch.testing.assert_close(at_once[:, 5 * i : 5 * i + 5], y[:, :5], atol=1e-12, rtol=0)
            total[:, 4 * i : 4 * i + 5] += y[:, 5:].unflatten(1, (5, 6))
        total[:, 4:-1:4] /= 2
    torch.testing.assert_close(at_once[:, 15:].unflatten(1, (13, 6)), total, atol=1e-12, rtol=0)


def test_both_directions_at_once_are_two_passes():
    for mixer in (TTTMLP(8, n=8, **WIDE), LaCT(), GatedDeltaNet(), TTTMLP(8, n=8, passes="parallel")):
        module = network(mixer)
        x, _t, text = inputs(2)
        span = module.long.share(x, text, None, (9, 2, 3), torch.float64)[3]
        tokens = noise("tokens", 2, 10 + 9 * 6, 64)
        with torch.no_grad():
            there, back = module.blocks[0].mixer.both(tokens, span.forward, span.backward)
            torch.testing.assert_close(there, module.blocks[0].mixer(tokens, span.forward), atol=1e-12, rtol=0)
            torch.testing.assert_close(back, module.blocks[0].mixer(tokens, span.backward), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["ttt_mlp", "lact segments", "gated_deltanet"])
def test_a_state_handed_on_is_one_pass(name):
    """The first segment alone, then the rest from its state, as a stream would."""
    module = network(MIXERS[name])
    mixer, (x, _t, text) = module.blocks[0].mixer, inputs(3)
    order = module.long.share(x, text, None, (13, 2, 3), torch.float64)[3].forward
    tokens = noise("tokens", 2, 15 + 13 * 6, 64)
    with torch.no_grad():
        streams = tuple(order.gather(s) for s in mixer.turned(mixer.project(tokens), order.turn))
        valid = order.valid.expand(2, -1)
        whole, last = mixer.scanned(streams, valid, order.groups, mixer.initial_state(2))
        cut = 32 if name == "ttt_mlp" else order.groups[0]  # ttt: at a mini-batch
        first, state = mixer.scanned(
            tuple(s[:, :, :cut] for s in streams), valid[:, :cut], order.groups[:1], mixer.initial_state(2)
        )
        second, end = mixer.scanned(tuple(s[:, :, cut:] for s in streams), valid[:, cut:], order.groups[1:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=2), whole, atol=1e-12, rtol=0)
    for a, b in zip(end, last, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_rate_travels_with_its_token():
    """Token by token, each with the rate of its own row, in the order of the walk."""
    module = network(TTTMLP(8, n=8))
    mixer, (x, _t, text) = module.blocks[0].mixer, inputs(3)
    order = module.long.share(x, text, None, (13, 2, 3), torch.float64)[3].backward
    tokens = noise("tokens", 2, 15 + 13 * 6, 64)
    with torch.no_grad():
        q, k, target, eta = mixer.turned(mixer.project(tokens), order.turn)
        norm, state, out = mixer._norm(torch.float64), mixer.initial_state(2), torch.zeros_like(q)
        path = order.index[0][: 15 + 13 * 6]
        for batch in path.split(8):
            _, g1, g = scan._gradients(state, k[:, :, batch], target[:, :, batch], norm)
            hidden = F.gelu(k[:, :, batch] @ state[0] + state[1], approximate="tanh")
            W1, b1, W2, b2 = (w.clone() for w in state)
            for j, token in enumerate(batch.tolist()):
                rate = eta[:, :, token, None, None]
                one, two = g1[:, :, j, None], g[:, :, j, None]
                W1 -= rate * k[:, :, token, :, None] * one
                b1 -= rate * one
                W2 -= rate * hidden[:, :, j, :, None] * two
                b2 -= rate * two
            state = (W1, b1, W2, b2)
            out[:, :, batch] = scan.read(state, q[:, :, batch], norm)
        torch.testing.assert_close(mixer.walk((q, k, target, eta), order), out, atol=1e-11, rtol=0)


def test_new_mixers_change_nothing_but_would_learn():
    plain = CogVideoX(SIZE)
    base = randomised(plain.load(plain.build(), CPU))
    x, t, text = inputs(1)
    for mixer in (LaCT(), GatedDeltaNet(), FullAttention()):
        spec = CogVideoX(SIZE, edits=(TTT(mixer),))
        module = spec.load(spec.build(), CPU)
        module.load_state_dict(base.state_dict(), strict=False)
        out = module(x, t, text=text)
        torch.testing.assert_close(out, base(x, t, text=text[:, 0]), atol=1e-12, rtol=0)
        out.square().sum().backward()
        assert module.blocks[0].mixer.to_out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mixer, count", [(TTTMLP(), 39_521_328), (TTTLinear(), 38_132_784), (LaCT(), 44_890_000)])
def test_parameters_of_a_block_of_5B(mixer, count):
    size = replace(SIZES["5B"], layers=1)
    module = CogVideoX(size, edits=(TTT(mixer),)).build()
    there = sum(p.numel() for p in mixers(module).values())
    assert there == count if mixer.kind != "lact" else there == pytest.approx(count, abs=5000)


def test_lora_and_mixers_go_together():
    spec = CogVideoX(SIZE, edits=(LoRA(rank=2, alpha=1.0), TTT(LaCT())))
    learn = {name for name, p in spec.build().named_parameters() if p.requires_grad}
    assert learn == {name for name, _ in spec.build().named_parameters() if ".lora_" in name or ".mixer." in name}


@pytest.mark.parametrize("layout", ["kinema", "diffusers", "ttt_video"])
def test_exported_and_read_again_is_the_same_network(layout, tmp_path):
    mixer = TTTMLP(8, n=8, base_lr=0.2) if layout == "ttt_video" else LaCT(group=2)
    spec = CogVideoX(SIZE, edits=(TTT(mixer),))
    module = randomised(spec.load(spec.build(), CPU))
    spec.export(module, tmp_path / "out", layout)
    again = CogVideoX.from_pretrained(str(tmp_path / "out"))
    assert again.long is not None and again.long.mixer == mixer
    read = again.load(again.build(), CPU)
    assert all(torch.equal(p, module.get_parameter(name)) for name, p in read.named_parameters())
    wrong = CogVideoX.from_pretrained(str(tmp_path / "out"), edits=(TTT(GatedDeltaNet()),))
    with pytest.raises(UserError, match=f"mixer {mixer.kind}, not gated_deltanet"):
        wrong.load(wrong.build(), CPU)
    if isinstance(mixer, LaCT):  # without a direction it has other gates
        wrong = CogVideoX.from_pretrained(str(tmp_path / "out"), edits=(TTT(LaCT(group="video")),))
        with pytest.raises(UserError, match="was trained with group 2 of its mixer, not video"):
            wrong.load(wrong.build(), CPU)


def test_nested_names_of_the_public_code_are_read(tmp_path):
    mixer = TTTLinear(8, n=8)
    spec = CogVideoX(SIZE, edits=(TTT(mixer),))
    module = randomised(spec.load(spec.build(), CPU))
    spec.export(module, tmp_path / "flat", "ttt_video")
    flat = torch.load(tmp_path / "flat" / "model.pt", weights_only=True)
    torch.save({f"model.{name}": tensor for name, tensor in flat.items()}, tmp_path / "nested.pt")
    again = CogVideoX(SIZE, str(tmp_path / "nested.pt"), edits=(TTT(mixer),))
    read = again.load(again.build(), CPU)
    assert all(torch.equal(p, module.get_parameter(name)) for name, p in read.named_parameters())
    lacking = {
        name: tensor for name, tensor in flat.items() if not name.endswith("layers.1.seq_modeling_block.ssm.ttt.W1")
    }
    torch.save(lacking, tmp_path / "lacking.pt")
    again = CogVideoX(SIZE, str(tmp_path / "lacking.pt"), edits=(TTT(mixer),))
    with pytest.raises(UserError, match=r"not blocks\.1\.mixer\.W1"):
        again.load(again.build(), CPU)


def test_networks_that_cannot_be_long_say_so():
    with pytest.raises(UserError, match="rotary"):
        CogVideoX(replace(SIZE, positions="sincos"), edits=(TTT(),)).build()
    with pytest.raises(UserError, match="5 heads of lact"):
        CogVideoX(SIZE, edits=(TTT(LaCT(heads=5)),)).build()
    module = CogVideoX(SIZE).load(CogVideoX(SIZE).build(), CPU)
    x, t, text = inputs(3)
    with pytest.raises(UserError, match="TTT edit"):
        module(x, t, text=text)

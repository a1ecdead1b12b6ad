"""The causal Wan as it streams fastest: the same weights and the same numbers, laid over a network and not another one.

What is different: one matrix product for q, k and v; all else that touches tokens is fused (`models.fused`); keys and
values go straight into their places in the cache; the text is read once for each prompt; and on CUDA a pass is recorded
as a graph for each place a chunk can have in the ring and from then on replayed, so that nothing waits for Python.
Passes that this is not made for (with gradients, without a cache, several chunks at once) are the network's own.
Shapes: as in `transformer.py`.
"""

from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.diffusion.chunks import Chunks
from kinema.errors import UserError
from kinema.models import attention_eight, fp8, fused
from kinema.models.attention import attend, attend_balanced
from kinema.models.cache import Cache, Pass, Spans, Store
from kinema.models.causality import Sight, Turn, Window, anchoring, joined
from kinema.models.fused import Operand
from kinema.models.layers import compiled, kernels_run, rms_norm, rotary, rotary_widths, rotate, wide
from kinema.models.wan import layouts
from kinema.models.wan.causal import WanCausalTransformer
from kinema.models.wan.spec import WanCausal
from kinema.models.wan.transformer import Block, FusedSelfAttention, PatchEmbedding, patch_grid, unpatchify


class FastWanCausal:
    """Reads as `WanCausalTransformer` does: `fast(x, timestep, text=…, cache=…, write=…)`.

    compiled  fuse what is elementwise, by `models.fused_kernels` where they run and by torch.compile; else the same
              functions run as they are written
    graphs    record passes as CUDA graphs
    eight     compute the blocks' linear layers, all but the first and the last block's, in 8-bit floating point
    balanced  divide self-attention so that no processor is idle (`attention.attend_balanced`)
    eight_attention  compute all self-attention in 8-bit floating point (`models.attention_eight`)

    Raises UserError for 8 bits on a GPU that has none.
    """

    def __init__(
        self,
        module: WanCausalTransformer,
        compiled: bool,
        graphs: bool,
        eight: bool = False,
        balanced: bool = True,
        eight_attention: bool = False,
    ):
        self.module, self.compiled, self.graphs, self.balanced = module, compiled, graphs, balanced
        self.eight, self.eight_attention = eight, eight_attention
        self.dtype, self.device = module.patch_embedding.weight.dtype, module.patch_embedding.weight.device
        gpu = self.device.type == "cuda"
        if (eight or eight_attention) and gpu and torch.cuda.get_device_capability(self.device) < (8, 9):
            raise UserError(f"{torch.cuda.get_device_name(self.device)} has no 8-bit floating point; leave it out")
        self.heads = module.size.heads
        self.kernels: dict[Any, Any] = {}  # by the functions for which they stand
        if compiled and kernels_run(self.device, self.dtype):
            from kinema.models import attention_kernels, fused_kernels

            self.kernels = {**fused_kernels.KERNELS, **attention_kernels.KERNELS}
        elif gpu and eight_attention:
            raise UserError("attention in 8 bits on a GPU is a Triton kernel; install triton, or leave it out")
        self.blocks: list[Any] = list(module.blocks)
        last = len(self.blocks) - 1
        self.layers = [_Layer.of(block, eight and 0 < i < last) for i, block in enumerate(self.blocks)]
        self.modulation = torch.empty(len(self.layers), *self.blocks[0].modulation.shape[1:], device=self.device)
        self.modulation = self.modulation.to(wide(self.dtype))
        self.refresh()
        self._tapes: WeakKeyDictionary[Cache, _Tape] = WeakKeyDictionary()
        self._idle: dict[Any, _Tape] = {}  # of caches that nobody has any more
        self._pool: Any = None

    @torch.no_grad()
    def refresh(self) -> None:
        """To be called when weights changed, in place. Those of q, k and v that are separate were copied for good."""
        torch.cat([block.modulation for block in self.blocks], out=self.modulation)

    @property
    def window(self) -> Window:
        return self.module.window

    @property
    def chunks(self) -> Chunks:
        return self.module.chunks

    def new_cache(self, frames: int | None = None, graded: int = 0, window: Window | None = None) -> Cache:
        """As the network's. The memory of a cache like it that is no longer used, and its graphs, are taken over."""
        cache = self.module.new_cache(frames, graded, window)
        key = (cache.capacity, cache.window)
        tape = self._idle.pop(key, None)
        if tape is None:
            self._idle.clear()  # one kind of video at a time: what others left is given back
            tape = _Tape(cache.stores)
        cache.stores = tape.stores
        self._tapes[cache] = tape
        finalize(cache, self._idle.__setitem__, key, tape).atexit = False
        return cache

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        *,
        text: Tensor,
        cache: Cache | None = None,
        write: bool = False,
        first_position: int = 0,
        **more: Any,
    ) -> Tensor:
        """As `WanCausalTransformer.forward`."""
        if cache is None or torch.is_grad_enabled() or more.get("lengths") or more.get("clean") is not None:
            if cache is not None and cache in self._tapes:
                self._tapes[cache].stale = True
            return self.module(x, timestep, text=text, cache=cache, write=write, first_position=first_position, **more)
        if cache not in self._tapes:
            self._tapes[cache] = _Tape(cache.stores)
        tape, frames, size = self._tapes[cache], x.shape[1], self.module.size
        if not cache.has_text:
            self._hear(cache, tape, text)
        grid = patch_grid(x, size.patch)
        tokens = grid[1] * grid[2]
        Sight((frames,), cache.window)  # says so where the window does not hold the chunk
        view = cache.begin(frames, len(x), tokens, False, self._anchor, x.device)
        like = torch.empty(len(x), 0, self.heads, size.head_dim, dtype=self.dtype, device=x.device)
        for store in cache.stores:
            store.make_room(view, like)
        tape.turn(grid, first_position + cache.frames, size.head_dim, wide(self.dtype), x.device)
        if view.turn is not None:
            self._move_sinks(cache.stores, view, view.turn)
        if self.eight_attention:
            tape.make_eights(cache.stores)
            if tape.stale:  # the ring was written by other passes
                self._keep_eights(tape, ((0, view.capacity),))
            elif view.turn is not None:
                self._keep_eights(tape, ((0, view.anchors),))
            tape.stale = False
        if self.graphs:
            flow = self._replayed(tape, cache, view, x, timestep, grid)
        else:
            flow = self._pass(x, timestep, tape, cache, view, grid)
        if view.begin < view.anchors:
            _keep_sinks(cache.stores, view, frames * tokens)
        if write:
            cache.commit(frames)
        return flow

    def _pass(
        self, x: Tensor, timestep: Tensor, tape: "_Tape", cache: Cache, view: Pass, grid: tuple[int, int, int]
    ) -> Tensor:
        """What the device does in a pass; it reads nothing of the host but shapes and places."""
        run, module, eps = self._run, self.module, self.module.size.eps
        e_BKD, e0_BK6D = module.embed_time(timestep, self.dtype)
        vectors = (self.modulation[:, None, None] + e0_BK6D).unsqueeze(-2).unbind(0)  # of each layer [B, K, 6, 1, D]
        x_BLD = module.patch_embedding(x.to(self.dtype))
        first = vectors[0].unbind(2)
        h = run(fused.modulated, x_BLD, first[1], first[0], eps, self.layers[0].eight)
        for i, layer in enumerate(self.layers):
            eight = layer.eight
            _, _, gate1, shift2, scale2, gate2 = vectors[i].unbind(2)
            store, text = cache.stores[i], cache.texts[i]
            assert store.k is not None and store.v is not None and text.k is not None and text.v is not None
            eights = tape.eights[i] if self.eight_attention else None
            y = self._attended(layer, h, tape.angles, store.k.data, store.v.data, view, eights)
            y = _linear(run(fused.as_operand, y, True) if eight else y, layer.o)
            x_BLD, h = run(fused.gated_affine, x_BLD, gate1, y, *layer.norm3, eps, eight)
            q = run(rms_norm, _linear(h, layer.text_q), layer.text_norm_q, eps)
            y = attend(q.unflatten(-1, (self.heads, -1)).transpose(1, 2), text.k, text.v).transpose(1, 2).flatten(2)
            y = _linear(run(fused.as_operand, y, True) if eight else y, layer.text_o)
            x_BLD, h = run(fused.added_modulated, x_BLD, y, scale2, shift2, eps, eight)
            y = _linear(self._hidden(layer, h), layer.down)
            if i + 1 < len(self.layers):
                shift, scale = vectors[i + 1].unbind(2)[:2]
                x_BLD, h = run(fused.gated_modulated, x_BLD, gate2, y, scale, shift, eps, self.layers[i + 1].eight)
            else:
                shift, scale = (module.head.modulation.to(e_BKD.dtype) + e_BKD[:, :, None]).unsqueeze(-2).unbind(2)
                x_BLD, h = run(fused.gated_modulated, x_BLD, gate2, y, scale, shift, eps, False)
        return unpatchify(module.head.head(h), grid, module.size.patch)

    def _attended(
        self,
        layer: "_Layer",
        h: Operand,
        turn: Turn,
        ring_k: Tensor,
        ring_v: Tensor,
        view: Pass,
        eights: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Self-attention to the ring, into which the pass's own keys and values are written, `[B, L, D]`; in 8 bits if
        `eights`, the ring in these, are given."""
        qkv = _linear(h, layer.qkv)
        at = view.own[0] if len(view.own) == 1 else None
        places = [ring[:, at[0] : at[1]] if at else _like_heads(qkv, ring) for ring in (ring_k, ring_v)]
        q = self._run(fused.turned, qkv, layer.norm_q, layer.norm_k, *turn, self.module.size.eps, *places)
        if at is None:  # a chunk that lies around the end of the ring
            begin = 0
            for a, b in view.own:
                for ring, place in zip((ring_k, ring_v), places, strict=True):
                    ring[:, a:b] = place[:, begin : begin + b - a]
                begin += b - a
        if eights is not None:
            self._keep(ring_k, ring_v, *eights, view.own)
            y = attention_eight.attend_eight(q, *eights, view.seen, self._run, None if self.balanced else 0)
            return y.transpose(1, 2).flatten(2)
        k, v = (joined([ring[:, a:b].transpose(1, 2) for a, b in view.seen]) for ring in (ring_k, ring_v))
        q = q.transpose(1, 2)
        y = attend_balanced(q, k, v, self._run) if self.balanced else attend(q, k, v)
        return y.transpose(1, 2).flatten(2)

    def _hidden(self, layer: "_Layer", h: Operand) -> Operand:
        if layer.eight:
            return self._run(fused.activated, _linear(h, layer.up), True)
        weight, bias = layer.up
        assert isinstance(h, Tensor) and isinstance(weight, Tensor)
        if h.is_cuda and h.dtype == torch.bfloat16:  # the activation in the product's own last step
            return torch.ops.aten._addmm_activation(bias, h.flatten(0, 1), weight.T, use_gelu=True).unflatten(
                0, h.shape[:2]
            )
        return self._run(fused.activated, _linear(h, layer.up))

    def _move_sinks(self, stores: list[Store], view: Pass, turn: Turn) -> None:
        """Puts the sinks' keys into the ring as this pass is to see them."""
        for store in stores:
            assert store.k is not None and store.sinks is not None
            moved = self._run(rotate, store.sinks.transpose(1, 2), *turn)
            store.k[:, : view.anchors] = moved.transpose(1, 2)

    def _keep_eights(self, tape: "_Tape", spans: Spans) -> None:
        """Puts what lies in all layers' rings there into 8 bits."""
        for store, eights in zip(tape.stores, tape.eights, strict=True):
            assert store.k is not None and store.v is not None
            self._keep(store.k, store.v, *eights, spans)

    def _keep(self, ring_k: Tensor, ring_v: Tensor, k: Tensor, v: Tensor, spans: Spans) -> None:
        for a, b in spans:
            self._run(attention_eight.keep, ring_k[:, a:b], ring_v[:, a:b], k[:, a:b], v[..., a:b])

    def _hear(self, cache: Cache, tape: "_Tape", text: Tensor) -> None:
        """Computes the text's keys and values, into the memory that graphs know if there is any of that size."""
        module, length = self.module, self.module.size.text_len
        if text.shape[1] < length:  # all rows, for all prompts alike: graphs have one length
            text = F.pad(text, (0, 0, 0, length - text.shape[1]))
        text_BSD, cache.text_bias = module.embed_text(text, self.dtype)
        for i, (block, kept) in enumerate(zip(self.blocks, cache.texts, strict=True)):
            attention = block.cross_attn
            pair = attention.heads(attention.norm_k(attention.k(text_BSD))), attention.heads(attention.v(text_BSD))
            if i < len(tape.texts) and tape.texts[i][0].shape == pair[0].shape:
                for mine, new in zip(tape.texts[i], pair, strict=True):
                    mine.copy_(new)
            else:
                tape.texts[i:], tape.graphs = [pair], {}
            kept.k, kept.v = tape.texts[i]

    def _replayed(
        self, tape: "_Tape", cache: Cache, view: Pass, x: Tensor, timestep: Tensor, grid: tuple[int, int, int]
    ) -> Tensor:
        """The pass as a graph: run as it is the first time, which also compiles, recorded the second time."""
        tape.stores, rings = cache.stores, [store.k for store in cache.stores]
        if len(tape.rings) != len(rings) or any(a is not b for a, b in zip(tape.rings, rings, strict=True)):
            tape.rings, tape.graphs = rings, {}
        key = (tuple(x.shape), x.dtype, tuple(timestep.shape), view.own, view.seen, tuple(grid))
        if key not in tape.graphs:
            tape.graphs[key] = None
            return self._pass(x, timestep, tape, cache, view, grid)
        recording = tape.graphs[key]
        if recording is None:
            recording = tape.graphs[key] = self._record(tape, cache, view, x, timestep, grid)
        recording.x.copy_(x)
        recording.timestep.copy_(timestep)
        recording.graph.replay()
        return recording.flow.clone()

    def _record(
        self, tape: "_Tape", cache: Cache, view: Pass, x: Tensor, timestep: Tensor, grid: tuple[int, int, int]
    ) -> "_Recording":
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        x, timestep, graph = x.clone(), timestep.clone(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            # Thread-local: another thread may be decoding what was made, and allocate, while this one records.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                flow = self._pass(x, timestep, tape, cache, view, grid)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(x.device).wait_stream(stream)
        return _Recording(graph, x, timestep, flow)

    def _run(self, function: Any, *args: Any) -> Any:
        if not self.compiled:
            return function(*args)
        return (self.kernels.get(function) or compiled(function))(*args)

    def _anchor(self, shift: int) -> Turn:
        return anchoring(shift, self.module.size.head_dim, self.device, wide(self.dtype))


class Rehearsal:
    """A causal Wan that learns, read as usual, whose passes without gradients are those of a fast copy of it.

    The copy's matrices are in `dtype`, rounded once for each update of the network (`refresh`) as autocast would round
    them in each pass; all else is copied as it is. Memory and graphs last from one rollout to the next.
    """

    def __init__(self, spec: WanCausal, module: WanCausalTransformer, dtype: torch.dtype, compiled: bool, graphs: bool):
        self.module = module
        copy: Any = replace(spec, fuse_qkv=True).build().to(module.patch_embedding.weight.dtype)
        for part in copy.modules():
            if isinstance(part, PatchEmbedding) or type(part) is nn.Linear:
                part.to(dtype)
        copy = copy.to_empty(device=module.patch_embedding.weight.device).eval().requires_grad_(False)
        self._targets = dict(copy.named_parameters())
        self.refresh()
        self.fast = FastWanCausal(copy, compiled, graphs)

    def __call__(self, x: Tensor, timestep: Tensor, *, cache: Cache | None = None, **more: Any) -> Tensor:
        backbone = self.module if cache is None or torch.is_grad_enabled() else self.fast
        return backbone(x, timestep, cache=cache, **more)

    def __getattr__(self, name: str) -> Any:
        """All else is the network's own."""
        return getattr(self.module, name)

    def new_cache(self, frames: int | None = None, graded: int = 0, window: Window | None = None) -> Cache:
        return self.fast.new_cache(frames, graded, window)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the network's weights as they are now."""
        for name, tensor in layouts.fused((name, p.detach()) for name, p in self.module.named_parameters()):
            self._targets[name].copy_(tensor)
        if fast := vars(self).get("fast"):
            fast.refresh()


Linear = tuple[Tensor | fp8.Rows, Tensor]  # weight [out, in] and bias


@dataclass(frozen=True, eq=False)
class _Layer:
    """A block's weights, as a pass reads them."""

    eight: bool
    qkv: Linear
    norm_q: Tensor
    norm_k: Tensor
    o: Linear
    norm3: tuple[Tensor, Tensor]
    text_q: Linear
    text_norm_q: Tensor
    text_o: Linear
    up: Linear
    down: Linear

    @classmethod
    @torch.no_grad()
    def of(cls, block: Block, eight: bool) -> "_Layer":
        own, text = block.self_attn, block.cross_attn
        if isinstance(own, FusedSelfAttention):
            qkv = own.to_qkv.weight, own.to_qkv.bias
        else:
            qkv = tuple(
                torch.cat([getattr(part, name) for part in (own.q, own.k, own.v)]) for name in ("weight", "bias")
            )

        def read(weight: Tensor, bias: Tensor) -> Linear:
            return fp8.quantised(weight) if eight else weight.detach(), bias.detach()

        def of(linear: nn.Linear) -> Linear:
            return read(linear.weight, linear.bias)

        return cls(
            eight=eight,
            qkv=read(*qkv),
            norm_q=own.norm_q.weight.detach(),
            norm_k=own.norm_k.weight.detach(),
            o=of(own.o),
            norm3=(block.norm3.weight.detach(), block.norm3.bias.detach()),
            text_q=of(text.q),
            text_norm_q=text.norm_q.weight.detach(),
            text_o=of(text.o),
            up=of(block.ffn[0]),  # type: ignore[arg-type]
            down=of(block.ffn[2]),  # type: ignore[arg-type]
        )


@dataclass(eq=False)
class _Recording:
    """A recorded pass and the memory it reads and writes."""

    graph: Any
    x: Tensor
    timestep: Tensor
    flow: Tensor


@dataclass(eq=False)
class _Tape:
    """What the passes of one cache share: the rotation of the chunk at hand, and what graphs were recorded with."""

    stores: list[Store]
    rings: list[Tensor | None] = field(default_factory=list)
    texts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    graphs: dict[Any, _Recording | None] = field(default_factory=dict)
    eights: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    stale: bool = False  # whether the rings may hold what the eights do not
    angles: Turn = (torch.empty(0), torch.empty(0))
    _at: Any = None

    def make_eights(self, stores: list[Store]) -> None:
        """Room for the rings' keys and values in 8 bits, if it is not there."""
        rings = [store.k for store in stores if store.k is not None]
        self.stores = stores
        if len(self.eights) != len(rings) or any(
            k.shape != ring.shape for (k, _), ring in zip(self.eights, rings, strict=True)
        ):
            self.eights, self.graphs = [attention_eight.room(ring) for ring in rings], {}
            self.stale = True

    def turn(
        self, grid: tuple[int, int, int], begin: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Sets `angles` `[L, P]` to those of a chunk whose first frame is at `begin`, in place if it can."""
        if self._at == (grid, begin):
            return
        self._at = (grid, begin)
        places = [torch.arange(begin, begin + grid[0], device=device)]
        places += [torch.arange(n, device=device) for n in grid[1:]]
        made = rotary(places, rotary_widths(head_dim), dtype)
        if made[0].shape == self.angles[0].shape:
            for mine, new in zip(self.angles, made, strict=True):
                mine.copy_(new)
        else:
            self.angles, self.graphs = made, {}


def _linear(x: Operand, layer: Linear) -> Tensor:
    weight, bias = layer
    if isinstance(weight, fp8.Rows):
        assert isinstance(x, fp8.Rows)
        return fp8.linear(x, weight, bias)
    assert isinstance(x, Tensor)
    return F.linear(x, weight, bias)


def _like_heads(qkv: Tensor, ring: Tensor) -> Tensor:
    return ring.new_empty(*qkv.shape[:2], *ring.shape[2:])


def _keep_sinks(stores: list[Store], view: Pass, tokens: int) -> None:
    """Keeps the sinks' keys as they were first rotated: as they lie in the ring when it begins."""
    part = slice(view.begin, min(view.anchors, view.begin + tokens))
    for store in stores:
        assert store.k is not None and store.sinks is not None
        store.sinks[:, part] = store.k[:, part]

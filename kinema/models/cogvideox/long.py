"""CogVideoX for long videos (arXiv 2504.05298): attention stays inside segments of the length it was trained on, and a
global mixer between it and the residual stream carries what all segments must agree on.

A segment has a prompt of its own and shares its first latent frame with the one before, whose two attention outputs are
averaged. Names of the network's tensors do not change; each block gets a `mixer` besides.

Shapes: B batch, C segments, S text tokens of a segment, T frames of patches, P patches of a frame, D model dim, N
heads, E head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kinema.errors import UserError
from kinema.models.attention import attend
from kinema.models.cogvideox import positions
from kinema.models.cogvideox.transformer import Attention, Block, CogVideoXSize, Grid, patch_counts, residual
from kinema.models.ttt.edit import MixerKind
from kinema.models.ttt.full_attention import NoMixer
from kinema.models.ttt.mixer import Passes, mix
from kinema.models.ttt.order import ScanOrder, Segments, scan_order
from kinema.models.ttt.ranks import Alone, Ranks, share_of, shared
from kinema.models.ttt.turn import Turn


@dataclass(frozen=True, eq=False)
class Span:
    """What the blocks are told of the segments that this rank has.

    local              the rotation of a segment's video tokens, whose first frame is frame 0
    bias               `[B · C, 1, 1, keys]` that hides padding from attention, None where there is none
    forward, backward  the walks of a mixer
    shares             latent frames of each rank
    """

    segments: int
    text: int
    frames: int
    local: Turn
    bias: Tensor | None
    forward: ScanOrder | None
    backward: ScanOrder | None
    shares: tuple[int, ...]

    @property
    def texts(self) -> int:
        """Text tokens of all segments."""
        return self.segments * self.text


class Long:
    """How a network of this size takes long videos; `ranks` are who shares them."""

    def __init__(self, size: CogVideoXSize, spec: MixerKind):
        self.size, self.spec = size, spec
        self.stride = patch_counts(size.grid, size.patch)[0] - 1
        self.ranks: Ranks = Alone()

    def share(
        self, x: Tensor, text: Tensor, valid: Tensor | None, grid: Grid, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Grid, Span]:
        """The part of video, text `[B, c · S, …]` and grid that this rank has, and what blocks are told about it.

        `text` is `[B, C, S, D]` and `valid` `[B, C, S]`, which says which rows are words; of one segment C may be left
        out. Raises UserError if the video is not as many segments as there are prompts.
        """
        if text.ndim == 3:
            text, valid = text[:, None], None if valid is None else valid[:, None]
        segments = Segments.of(grid, text.shape[1], self.stride, text.shape[2])
        if segments.count < self.ranks.size:
            raise UserError(
                f"{segments.count} segments cannot be shared by {self.ranks.size} ranks; set run.plan.context to at "
                f"most {segments.count}"
            )
        own = share_of(segments.count, self.ranks.rank, self.ranks.size)
        frames, patch = segments.frames_of(own), self.size.patch[0]
        span = self._span(segments, own, frames, valid, x.device, dtype)
        part = x[:, frames.start * patch : frames.stop * patch]
        return part, text[:, own.start : own.stop].flatten(1, 2), (len(frames), *grid[1:]), span

    def _span(
        self,
        segments: Segments,
        own: range,
        frames: range,
        valid: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Span:
        places = self._places(segments, device)
        local = Turn.at([places[0][: segments.stride + 1], *places[1:]], self.size.head_dim, dtype)
        everywhere = Turn.at(places, self.size.head_dim, dtype)
        orders: list[ScanOrder | None] = [None, None]
        if self.spec.kind != NoMixer.kind:
            there = self.ranks.size > 1
            walk = self.spec.walk
            layout = shared(segments, self.ranks.size) if there else None
            turn = everywhere.frames(frames.start, frames.stop) if there else everywhere
            back = turn
            if self.spec.order == "reference":
                back = everywhere.flipped().frames(frames.start, frames.stop)
            for n, way in enumerate((turn, back)):
                orders[n] = scan_order(
                    segments,
                    way,
                    valid,
                    n == 1,
                    self.spec.order,
                    walk.multiple,
                    walk.compact,
                    walk.group,
                    walk.even,
                    layout,
                )
        bias = None if valid is None else _hidden(valid[:, own.start : own.stop], segments, dtype)
        everyone = (share_of(segments.count, rank, self.ranks.size) for rank in range(self.ranks.size))
        shares = tuple(self.size.patch[0] * len(segments.frames_of(share)) for share in everyone)
        return Span(len(own), segments.text, len(frames), local, bias, orders[0], orders[1], shares)

    def _places(self, segments: Segments, device: torch.device) -> list[Tensor]:
        rows, columns = patch_counts(self.size.grid, self.size.patch)[1:]
        base = (rows, columns) if self.size.positions == "crop" else None
        return positions.places((segments.frames, segments.rows, segments.columns), base, device)


def lengthen(module: nn.Module, size: CogVideoXSize, spec: MixerKind) -> Long:
    """Puts mixers into the blocks and segments into their attention. UserError for networks that cannot be long."""
    if size.positions == "sincos" or size.table:
        raise UserError(
            "a long video has frames beyond any position this CogVideoX adds to its tokens; use one with rotary "
            "positions only, such as CogVideoX-5B"
        )
    spec.check(size.dim, size.head_dim)
    blocks = [LongBlock(block, size, spec) for block in module.get_submodule("blocks").children()]
    module.set_submodule("blocks", nn.ModuleList(blocks))
    return Long(size, spec)


class LongBlock(Block):
    """The block it is given, with attention to segments and, unless there is none, a mixer after it."""

    def __init__(self, block: nn.Module, size: CogVideoXSize, spec: MixerKind):
        nn.Module.__init__(self)
        assert isinstance(block, Block)
        self.norm_attn, self.norm_mlp = block.norm_attn, block.norm_mlp
        self.modulate_attn, self.modulate_mlp = block.modulate_attn, block.modulate_mlp
        self.attn, self.mlp = SegmentAttention(block.attn), block.mlp
        self.passes: Passes = spec.passes
        self.mixer = None if isinstance(spec, NoMixer) else spec.build(size.dim, size.head_dim)

    def forward(self, video: Tensor, text: Tensor, e_B1E: Tensor, turn: Span) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        def between(x_BLD: Tensor) -> Tensor:
            y = self.attn(x_BLD, turn)
            if self.mixer is None:
                return y
            assert turn.forward is not None and turn.backward is not None
            return mix(self.mixer, self.passes, y, turn.forward, turn.backward, turn.texts)

        video, text = residual(between, self.norm_attn, self.modulate_attn(e_B1E), video, text)
        return residual(self.mlp, self.norm_mlp, self.modulate_mlp(e_B1E), video, text)


class SegmentAttention(Attention):
    """Attention of each segment to its own text and frames: one call for all of them, everything projected once."""

    def __init__(self, attn: Attention):
        nn.Module.__init__(self)
        self.head_dim = attn.head_dim
        self.q, self.k, self.v, self.out = attn.q, attn.k, attn.v, attn.out
        self.norm_q, self.norm_k = attn.norm_q, attn.norm_k
        self.ranks: Ranks = Alone()

    def forward(self, x_BLD: Tensor, turn: Span) -> Tensor:  # type: ignore[override]
        halo = self.ranks.rank > 0  # the first segment begins with the last frame of the rank to the left
        tokens = (x_BLD.shape[1] - turn.texts) // turn.frames
        if self.ranks.size > 1:
            x_BLD, left = self.ranks.from_left(x_BLD, tokens)
            if halo:
                x_BLD = torch.cat([x_BLD[:, : turn.texts], left, x_BLD[:, turn.texts :]], dim=1)
        q, k = self.norm_q(self.heads(self.q(x_BLD))), self.norm_k(self.heads(self.k(x_BLD)))
        q, k = (self._cut(x, turn, tokens, turn.local) for x in (q, k))
        v = self._cut(self.heads(self.v(x_BLD)), turn, tokens)
        bias = None if turn.bias is None else turn.bias.to(q.dtype)
        y = attend(q, k, v, bias).unflatten(0, (-1, turn.segments))  # B C N S+L E
        text, video = y.split([turn.text, y.shape[3] - turn.text], dim=3)
        joined = self._joined(video.unflatten(3, (-1, tokens)), halo)
        y_BNLE = torch.cat([text.transpose(1, 2).flatten(2, 3), joined], dim=2)
        return self.out(y_BNLE.transpose(1, 2).flatten(2))

    def _cut(self, x_BNLE: Tensor, span: Span, tokens: int, turn: Turn | None = None) -> Tensor:
        """`[B · C, N, S + (stride + 1) · P, E]`: each segment's text and frames, which turn if a `turn` is given."""
        text = x_BNLE[:, :, : span.texts].unflatten(2, (span.segments, -1))
        video = x_BNLE[:, :, span.texts :].unflatten(2, (-1, tokens))
        stride = (video.shape[2] - 1) // span.segments
        starts = video[:, :, :-1].unflatten(2, (span.segments, stride))
        ends = video[:, :, stride::stride, None]
        windows = torch.cat([starts, ends], dim=3).flatten(3, 4)  # B N C L E
        windows = windows if turn is None else turn.rotate(windows)
        return torch.cat([text, windows], dim=3).transpose(1, 2).flatten(0, 1)

    def _joined(self, y: Tensor, halo: bool) -> Tensor:
        """`[B, N, T · P, E]` of this rank's frames, of the segments' `[B, C, N, stride + 1, P, E]`."""
        first, between, last = y[:, :, :, :1], y[:, :, :, 1:-1], y[:, :, :, -1:]
        both = len(last[0]) - (self.ranks.rank == self.ranks.size - 1)  # segments whose last frame has a second answer
        after = first[:, 1:]
        if self.ranks.size > 1:
            first, right = self.ranks.from_right(first)
            after = torch.cat([first[:, 1:], right], dim=1)[:, :both]
        last = torch.cat([(last[:, :both] + after) / 2, last[:, both:]], dim=1)
        frames = torch.cat([between, last], dim=3).transpose(1, 2).flatten(2, 4)
        return frames if halo else torch.cat([first[:, 0].flatten(2, 3), frames], dim=2)


def _hidden(valid: Tensor, segments: Segments, dtype: torch.dtype) -> Tensor:
    """0 at words and video, -inf at padding."""
    keys = segments.text + (segments.stride + 1) * segments.tokens
    bias = torch.zeros(valid.shape[0] * valid.shape[1], 1, 1, keys, dtype=dtype, device=valid.device)
    bias[..., : segments.text].masked_fill_(~valid.flatten(0, 1)[:, None, None], -torch.inf)
    return bias

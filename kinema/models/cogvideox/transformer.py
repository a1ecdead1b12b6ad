"""The CogVideoX transformer (arXiv 2408.06072) in its five published variants: text-to-video and image-to-video.

Unusual: text and video are one sequence with shared weights and separate modulation ("expert adaptive layer norm").
Shapes: B batch, T latent frames, C channels, H W latent rows and columns, L video tokens (frames, rows, columns; the
last fastest), S text tokens, D model dim, N heads, E width of the time embedding.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema import seeds
from kinema.errors import UsageError, UserError
from kinema.models.attention import attend
from kinema.models.cogvideox import positions
from kinema.models.layers import (
    LayerNorm,
    WideLinear,
    compute_dtype,
    gated_sum,
    modulated_affine_norm,
    rotate,
    sinusoid,
    wide,
)
from kinema.models.protocols import TensorPlan

if TYPE_CHECKING:
    from kinema.models.cogvideox.long import Long, Span
    from kinema.models.ttt.edit import MixerKind

Grid = tuple[int, int, int]  # of patches: frames, rows, columns


@dataclass(frozen=True)
class CogVideoXSize:
    """The dimensions of a CogVideoX network and what else its forward pass must know.

    positions    how video tokens know their place: "sincos" is added to them; "crop" and "slice" are rotary, with rows
                 and columns fitted into `grid` or counted from 0
    table        a learned code is added too; such a network takes videos of `grid` and `text_tokens` and no others
    grid         latent (frames, rows, columns) that it was trained on
    ofs_dim      width of the embedding of the constant `ofs`, 0 where there is none
    text_tokens  the length its prompts were padded to in training
    norm_eps     of all norms but those of q and k, which have 1e-6
    """

    heads: int
    layers: int
    head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    positions: Literal["sincos", "crop", "slice"] = "crop"
    table: bool = False
    grid: tuple[int, int, int] = (13, 60, 90)
    time_dim: int = 512
    ofs_dim: int = 0
    ofs: float = 2.0
    text_dim: int = 4096
    text_tokens: int = 226
    spatial_scale: float = 1.875
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.head_dim % 16:
            raise UsageError(f"head_dim {self.head_dim} is not a multiple of 16, which rotary positions need; use one")

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def image_channels(self) -> int:
        """Channels of the image condition, 0 for text-to-video."""
        return self.in_channels - self.out_channels


_5B = CogVideoXSize(heads=48, layers=42)
_1_5 = replace(_5B, patch=(2, 2, 2), positions="slice", grid=(21, 300, 300))
SIZES = {
    "2B": CogVideoXSize(heads=30, layers=30, positions="sincos"),
    "5B": _5B,
    "5B-I2V": replace(_5B, in_channels=32, table=True),
    "1.5-5B": _1_5,
    "1.5-5B-I2V": replace(_1_5, in_channels=32, ofs_dim=512),
}


def tensor_plan(size: CogVideoXSize) -> TensorPlan:
    """Heads and the hidden channels of the MLP are split; what the time contributes is computed by every rank."""
    return TensorPlan(
        heads=size.heads,
        shared={"blocks.*.attn": 1},
        columns=(*(f"blocks.*.attn.{part}" for part in "qkv"), "blocks.*.mlp.up"),
        norms=(),
        rows=("blocks.*.attn.out", "blocks.*.mlp.down"),
        head_norms=("blocks.*.attn.norm_q", "blocks.*.attn.norm_k"),
    )


class CogVideoXTransformer(nn.Module):
    """Predicts the velocity alpha·noise - sigma·data of a noisy latent video.

    Norms, modulation, times and rotations are computed in float32 (float64 for float64 weights); the residual streams,
    matrix products and attention in the compute dtype, which is autocast's or else that of the weights.
    """

    def __init__(self, size: CogVideoXSize):
        super().__init__()
        self.size = size
        features = math.prod(size.patch)
        self.patch_embed = nn.Linear(size.in_channels * features, size.dim)
        self.text_embed = nn.Linear(size.text_dim, size.dim)
        self.time_embed = _embedding(size.dim, size.time_dim)
        if size.ofs_dim:
            self.ofs_embed = _embedding(size.ofs_dim, size.ofs_dim)
        if size.table:
            self.pos_table = nn.Parameter(torch.empty(1, size.text_tokens + _tokens(size.grid, size.patch), size.dim))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm_final = LayerNorm(size.dim, size.norm_eps)
        self.norm_out = LayerNorm(size.dim, size.norm_eps)
        self.modulate_out = WideLinear(size.time_dim, 2 * size.dim)
        self.proj_out = nn.Linear(size.dim, size.out_channels * features)
        self.long: Long | None = None  # what makes it take long videos, see `lengthen`

    def lengthen(self, spec: "MixerKind") -> None:
        """Makes this network take long videos, segment by segment, with a global mixer in each block."""
        from kinema.models.cogvideox.long import lengthen

        self.long = lengthen(self, self.size, spec)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        *,
        text: Tensor,
        image: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Velocity `[B, T, out, H, W]` of `x` `[B, T, C, H, W]`.

        `timestep` `[B, 1]` is the noise level 0 … 999 as a float. `text` is `[B, S, text_dim]`, padding included: these
        networks attend to it as to any word. `image` `[B, T, C, H, W]` is the condition of image-to-video networks. A
        long network also takes a prompt for each segment, `[B, C, S, text_dim]`, and `valid` `[B, C, S]`, which is
        False at padding that it shall not see.
        Raises ValueError for times per frame and sizes that are no multiples of the patch; UsageError for whatever
        differs from what a learned position table was made for, an image where none is taken, and the reverse.
        """
        size, dtype = self.size, compute_dtype(self.patch_embed.weight)
        if timestep.shape[1:] != (1,):
            raise ValueError(
                f"CogVideoX takes one time per video, [B, 1], not times of shape {list(timestep.shape)}; "
                "use a law of times for whole videos"
            )
        if image is None and size.image_channels:
            raise UsageError("this CogVideoX continues an image; give it one, with --image or as cond['image']")
        if image is not None and not size.image_channels:
            raise UsageError("this CogVideoX takes no image; leave it away, or use image-to-video weights")
        x = x if image is None else torch.cat([x, image.to(x.dtype)], dim=2)
        grid, span = patch_grid(x, size.patch), None
        turn: tuple[Tensor, Tensor] | Span | None
        if self.long is not None:
            x, text, grid, span = self.long.share(x, text, valid, grid, wide(dtype))
            turn = span
        elif text.ndim == 4 or valid is not None:
            raise UserError("this CogVideoX takes one prompt, and sees its padding; make it long by a TTT edit")
        else:
            turn = self._turn(grid, text.shape[1], x.device, wide(dtype))
        e_B1E = F.silu(self._time(timestep, wide(dtype)))
        video, text = self.patch_embed(patchify(x.to(dtype), size.patch)), self.text_embed(text.to(dtype))
        video, text = self._placed(video, text, grid)
        for block in self.blocks:
            video, text = block(video, text, e_B1E, turn)
        shift, scale = self.modulate_out(e_B1E).chunk(2, dim=-1)
        video = modulated_affine_norm(self.norm_final(video), self.norm_out, scale, shift)
        out = unpatchify(self.proj_out(video), grid, size.patch)
        return out if self.long is None or span is None else self.long.ranks.whole(out, span.shares)

    def _time(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        e_B1E = self.time_embed(sinusoid(timestep, self.size.dim, dtype))
        if self.size.ofs_dim:
            ofs = torch.full((1, 1), self.size.ofs, device=timestep.device)
            e_B1E = e_B1E + self.ofs_embed(sinusoid(ofs, self.size.ofs_dim, dtype))
        return e_B1E

    def _placed(self, video: Tensor, text: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Video and text with the codes that are added to them."""
        size = self.size
        if size.positions == "sincos":
            video = video + positions.sincos(grid, size.dim, size.spatial_scale, video.device).to(video.dtype)
        if size.table:
            made_for = patch_counts(size.grid, size.patch)
            if grid != made_for or text.shape[1] != size.text_tokens:
                raise UsageError(
                    f"the learned positions of this CogVideoX are for {made_for} patches and {size.text_tokens} text "
                    f"tokens, not {grid} and {text.shape[1]}; use the size of videos it was trained with"
                )
            table = self.pos_table.to(video.dtype)
            video, text = video + table[:, size.text_tokens :], text + table[:, : size.text_tokens]
        return video, text

    def _turn(
        self, grid: tuple[int, int, int], text: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """cos and sin `[S + L, P]` of the rotation of q and k, which leaves text as it is."""
        size = self.size
        if size.positions == "sincos":
            return None
        _, rows, columns = patch_counts(size.grid, size.patch)
        base = (rows, columns) if size.positions == "crop" else None
        cos, sin = positions.rope(grid, size.head_dim, base, device, dtype)
        return F.pad(cos, (0, 0, text, 0), value=1.0), F.pad(sin, (0, 0, text, 0))


class Block(nn.Module):
    """x += gate · m(LN(x)(1 + scale) + shift) for m = attention, then MLP, with modulations of video and of text."""

    def __init__(self, size: CogVideoXSize):
        super().__init__()
        self.norm_attn, self.norm_mlp = (LayerNorm(size.dim, size.norm_eps) for _ in range(2))
        self.modulate_attn, self.modulate_mlp = (WideLinear(size.time_dim, 6 * size.dim) for _ in range(2))
        self.attn = Attention(size)
        self.mlp = MLP(size.dim)

    def forward(
        self, video: Tensor, text: Tensor, e_B1E: Tensor, turn: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Video `[B, L, D]` and text `[B, S, D]`; `e_B1E` is the activated time embedding, wide."""
        video, text = residual(lambda y: self.attn(y, turn), self.norm_attn, self.modulate_attn(e_B1E), video, text)
        return residual(self.mlp, self.norm_mlp, self.modulate_mlp(e_B1E), video, text)


def residual(
    inner: Callable[[Tensor], Tensor], norm: LayerNorm, modulation: Tensor, video: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    """x + gate · inner(norm(x)(1 + scale) + shift) of text and video, which `inner` sees as one sequence, text first.

    `modulation` `[B, 1, 6D]`, wide, is shift, scale and gate of the video, then those of the text.
    """
    shift, scale, gate, text_shift, text_scale, text_gate = modulation.chunk(6, dim=-1)
    parts = (
        modulated_affine_norm(text, norm, text_scale, text_shift),
        modulated_affine_norm(video, norm, scale, shift),
    )
    y_text, y_video = inner(torch.cat(parts, dim=1)).split([text.shape[1], video.shape[1]], dim=1)
    return gated_sum(video, gate, y_video), gated_sum(text, text_gate, y_text)


class Attention(nn.Module):
    """Full attention over text and video; q and k are normed per head, and the weights say how many heads there are."""

    def __init__(self, size: CogVideoXSize):
        super().__init__()
        self.head_dim = size.head_dim
        self.q, self.k, self.v, self.out = (nn.Linear(size.dim, size.dim) for _ in range(4))
        self.norm_q, self.norm_k = (LayerNorm(size.head_dim, 1e-6) for _ in range(2))

    def heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x_BLD: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k = self.norm_q(self.heads(self.q(x_BLD))), self.norm_k(self.heads(self.k(x_BLD)))
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        return self.out(attend(q, k, self.heads(self.v(x_BLD))).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BLD), approximate="tanh"))


def patch_counts(sizes: tuple[int, int, int], patch: tuple[int, int, int]) -> Grid:
    """How many patches fit into latent (frames, rows, columns); what is left over is not counted."""
    return sizes[0] // patch[0], sizes[1] // patch[1], sizes[2] // patch[2]


def patch_grid(x: Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """How many patches `[B, T, C, H, W]` has along (T, H, W). Raises ValueError where they do not fill it."""
    sizes = (x.shape[1], x.shape[3], x.shape[4])
    if any(n % p for n, p in zip(sizes, patch, strict=True)):
        raise ValueError(f"latents of {sizes} frames, rows, columns do not divide into patches of {patch}")
    return patch_counts(sizes, patch)


def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """`[B, T, C, H, W]` to `[B, L, C·pt·ph·pw]`, features in that order."""
    pt, ph, pw = patch
    x = x.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(1, (-1, pt))  # B T pt C H ph W pw
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify`."""
    x = tokens.unflatten(2, (-1, *patch)).unflatten(1, grid)  # B T H W C pt ph pw
    return x.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)


def initial_weights(module: CogVideoXTransformer, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Weights to train from nothing, float32 on the CPU; each tensor depends on the seed and its name alone.

    Modulations and the last projection are zero, so that at first every block is the identity and the prediction zero
    (adaLN-zero, arXiv 2212.09748).
    """
    size = module.size
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(seeds.key_of(seed, "init", name))
        tensor = torch.zeros(parameter.shape)
        if name == "pos_table":
            code = positions.sincos(patch_counts(size.grid, size.patch), size.dim, size.spatial_scale)
            tensor[0, size.text_tokens :] = code
        elif "norm" in name:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.startswith(("time_embed", "ofs_embed")) and tensor.ndim > 1:
            tensor.normal_(0, 0.02, generator=generator)
        elif tensor.ndim > 1 and "modulate" not in name and not name.startswith("proj_out"):
            nn.init.xavier_uniform_(tensor, generator=generator)
        yield name, tensor


def _embedding(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(WideLinear(width, out), nn.SiLU(), WideLinear(out, out))


def _tokens(sizes: tuple[int, int, int], patch: tuple[int, int, int]) -> int:
    return math.prod(patch_counts(sizes, patch))

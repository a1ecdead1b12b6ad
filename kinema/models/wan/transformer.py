"""The bidirectional Wan 2.1 transformer (arXiv 2503.20314), with the parameter names of the original checkpoints.

Unusual: text is a short sequence plus a few rows that stand for all of its zero padding, which Wan attends to.
Shapes: B batch, T latent frames, C channels, H W latent rows and columns, L = T·(H/2)·(W/2) tokens, D model dim,
N heads, S text rows, K = 1 or T times per sample.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema import seeds
from kinema.models.attention import attend
from kinema.models.cache import Text
from kinema.models.causality import Attend
from kinema.models.layers import (
    LayerNorm,
    RMSNorm,
    WideLinear,
    compute_dtype,
    gated_sum,
    modulated_norm,
    rotary,
    rotary_widths,
    rotate,
    sinusoid,
    wide,
)
from kinema.models.protocols import TensorPlan


@dataclass(frozen=True)
class WanSize:
    """The dimensions of a Wan network. `text_len` is the length its prompts were zero-padded to in training."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


SIZES = {
    "1.3B": WanSize(dim=1536, ffn_dim=8960, heads=12, layers=30),
    "14B": WanSize(dim=5120, ffn_dim=13824, heads=40, layers=40),
}


def tensor_plan(size: WanSize) -> TensorPlan:
    """Heads and the hidden channels of the FFN are split; what the time contributes is computed by every rank."""
    attention, parts = ("blocks.*.self_attn", "blocks.*.cross_attn"), ("q", "k", "v")
    return TensorPlan(
        heads=size.heads,
        shared={"blocks.*.self_attn": 1, "blocks.*.cross_attn": 2},
        columns=(*(f"{name}.{part}" for name in attention for part in parts), "blocks.*.ffn.0"),
        norms=tuple(f"{name}.norm_{part}" for name in attention for part in "qk"),
        rows=(*(f"{name}.o" for name in attention), "blocks.*.ffn.2"),
    )


class WanTransformer(nn.Module):
    """Predicts the flow (noise - data) of a noisy latent video.

    Norms, modulation, times and rotations are computed in float32 (float64 for float64 weights); the residual stream,
    matrix products and attention in the compute dtype, which is autocast's or else that of the weights.
    """

    def __init__(self, size: WanSize):
        super().__init__()
        self.size = size
        self.patch_embedding = PatchEmbedding(size.in_channels, size.dim, size.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(size.text_dim, size.dim), nn.GELU(approximate="tanh"), nn.Linear(size.dim, size.dim)
        )
        self.time_embedding = nn.Sequential(
            WideLinear(size.freq_dim, size.dim), nn.SiLU(), WideLinear(size.dim, size.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), WideLinear(size.dim, 6 * size.dim))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.head = Head(size)

    def forward(self, x: Tensor, timestep: Tensor, *, text: Tensor) -> Tensor:
        """Flow `[B, T, out, H, W]` of `x` `[B, T, C, H, W]`.

        `timestep` is 1000 t (0 data, 1000 noise), float32 `[B, 1]` for the whole video or `[B, T]` per frame. `text` is
        `[B, S, text_dim]` with zero rows beyond each prompt's end; S up to text_len, the rows up to there are implied.
        Raises ValueError if frames, rows or columns do not fit the patch size, or the text is too long.
        """
        grid, x_BLD, e_BKD, given = self.embed(x, timestep, text)
        for block in self.blocks:
            x_BLD = block(x_BLD, *given)
        return unpatchify(self.head(x_BLD, e_BKD), grid, self.size.patch)

    def embed(self, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[tuple[int, int, int], Tensor, Tensor, tuple]:
        """The grid of patches, its tokens `[B, L, D]`, the time embedding `[B, K, D]`, and what every block is given.

        That is the time's modulation `[B, K, 6, D]`, the rotation of the grid's positions, the text and its bias.
        """
        dtype = compute_dtype(self.patch_embedding.weight)
        grid = patch_grid(x, self.size.patch)
        x_BLD = self.patch_embedding(x.to(dtype))
        e_BKD, e0_BK6D = self.embed_time(timestep, dtype)
        text_BSD, text_bias = self.embed_text(text, dtype)
        positions = [torch.arange(n, device=x.device) for n in grid]
        turn = rotary(positions, rotary_widths(self.size.head_dim), wide(dtype))
        return grid, x_BLD, e_BKD, (e0_BK6D, turn, text_BSD, text_bias)

    def embed_time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the head `[B, K, D]` and the blocks `[B, K, 6, D]` are told of the times, wide."""
        e_BKD = self.time_embedding(sinusoid(timestep, self.size.freq_dim, wide(dtype)))
        return e_BKD, self.time_projection(e_BKD).unflatten(-1, (6, -1))

    def embed_text(self, text: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The text `[B, S, D]` as blocks read it, with the rows that stand for its padding, and its attention bias."""
        text, bias = pad_text(text.to(dtype), self.size.text_len)
        return self.text_embedding(text), bias


class Block(nn.Module):
    """x += gate · SelfAttn(LN(x)); x += CrossAttn(LN(x), text); x += gate · FFN(LN(x)); the outer two modulated."""

    def __init__(self, size: WanSize):
        super().__init__()
        self.eps = size.eps
        self.self_attn = SelfAttention(size)
        self.norm3 = LayerNorm(size.dim, size.eps)
        self.cross_attn = CrossAttention(size)
        self.ffn = nn.Sequential(
            nn.Linear(size.dim, size.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(size.ffn_dim, size.dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, size.dim))

    def forward(
        self,
        x_BLD: Tensor,
        e0_BK6D: Tensor,
        turn: tuple[Tensor, Tensor],
        text_BSD: Tensor | None,
        text_bias: Tensor | None = None,
        attention: Attend = attend,
        kept: Text | None = None,
    ) -> Tensor:
        """`attention` is how tokens attend to each other; `kept` has the text's keys and values or is to keep them."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_of(self.modulation, e0_BK6D)
        x = x_BLD.unflatten(
            1, (e0_BK6D.shape[1], -1)
        )  # [B, K, tokens of one time, D], to broadcast against [B, K, 1, D]
        y = self.self_attn(modulated_norm(x, scale1, shift1, self.eps).flatten(1, 2), turn, attention)
        x = gated_sum(x, gate1, y.view_as(x)).flatten(1, 2)
        x = x + self.cross_attn(self.norm3(x), text_BSD, text_bias, kept)
        x = x.view(x_BLD.shape[0], e0_BK6D.shape[1], -1, x_BLD.shape[2])
        y = self.ffn(modulated_norm(x, scale2, shift2, self.eps))
        return gated_sum(x, gate2, y).flatten(1, 2)


class Attention(nn.Module):
    """Projections and the norms of q and k, which are over all heads together; the weights say how many heads."""

    def __init__(self, size: WanSize):
        super().__init__()
        self.head_dim = size.head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(size.dim, size.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(size.dim, size.eps), RMSNorm(size.dim, size.eps)

    def heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def output(self, x_BNLD: Tensor) -> Tensor:
        return self.o(x_BNLD.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    def forward(self, x_BLD: Tensor, turn: tuple[Tensor, Tensor], attention: Attend = attend) -> Tensor:
        q, k, v = self.project(x_BLD)
        q = rotate(self.heads(self.norm_q(q)), *turn)
        k = rotate(self.heads(self.norm_k(k)), *turn)
        return self.output(attention(q, k, self.heads(v)))

    def project(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        return self.q(x_BLD), self.k(x_BLD), self.v(x_BLD)


class FusedSelfAttention(SelfAttention):
    """The same with one matrix product for q, k and v, whose rows are in that order."""

    def __init__(self, size: WanSize):
        super().__init__(size)
        del self.q, self.k, self.v
        self.to_qkv = nn.Linear(size.dim, 3 * size.dim)

    def project(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        return self.to_qkv(x_BLD).chunk(3, dim=-1)


class CrossAttention(Attention):
    def forward(
        self, x_BLD: Tensor, text_BSD: Tensor | None, text_bias: Tensor | None = None, kept: Text | None = None
    ) -> Tensor:
        q = self.heads(self.norm_q(self.q(x_BLD)))
        k, v = (None, None) if kept is None else (kept.k, kept.v)
        if k is None or v is None:
            assert text_BSD is not None
            k, v = self.heads(self.norm_k(self.k(text_BSD))), self.heads(self.v(text_BSD))
            if kept is not None:
                kept.k, kept.v = k, v
        return self.output(attend(q, k, v, text_bias))


class Head(nn.Module):
    """Modulated norm and projection to patches, features in the order (patch frame, row, column, channel)."""

    def __init__(self, size: WanSize):
        super().__init__()
        self.eps = size.eps
        self.head = nn.Linear(size.dim, math.prod(size.patch) * size.out_channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, size.dim))

    def forward(self, x_BLD: Tensor, e_BKD: Tensor) -> Tensor:
        shift, scale = modulation_of(self.modulation, e_BKD[:, :, None])
        x = x_BLD.unflatten(1, (e_BKD.shape[1], -1))
        return self.head(modulated_norm(x, scale, shift, self.eps)).flatten(1, 2)


class PatchEmbedding(nn.Module):
    """A 3-D convolution whose kernel is its stride, computed as a matrix product: `[B, T, C, H, W]` to tokens."""

    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, channels, *patch))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        pt, ph, pw = self.weight.shape[2:]
        x = x.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(1, (-1, pt))  # B T pt C H ph W pw
        patches = x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)  # the order of the kernel: C pt ph pw
        return F.linear(patches, self.weight.flatten(1), self.bias)


def modulation_of(table: Tensor, e_BKnD: Tensor) -> tuple[Tensor, ...]:
    """The wide vectors `[B, K, 1, D]` of a learned table `[1, n, D]` plus the time's contribution."""
    return (table.to(e_BKnD.dtype) + e_BKnD).chunk(table.shape[1], dim=2)


def patch_grid(x: Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """How many patches `[B, T, C, H, W]` has along (T, H, W)."""
    sizes = (x.shape[1], x.shape[3], x.shape[4])
    if any(n % p for n, p in zip(sizes, patch, strict=True)):
        raise ValueError(f"latents of {sizes} frames, rows, columns do not divide into patches of {patch}")
    return sizes[0] // patch[0], sizes[1] // patch[1], sizes[2] // patch[2]


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """`[B, L, pt·ph·pw·C]` to `[B, T, C, H, W]`."""
    x = tokens.unflatten(2, (*patch, -1)).unflatten(1, grid)  # B T H W pt ph pw C
    return x.permute(0, 1, 4, 7, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(1, 2)


def pad_text(text: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
    """Appends rows that act in attention like zero padding of `text` `[B, S, D]` to `length` rows; also their bias.

    n identical keys weigh n·exp(score), as one key does whose score is raised by log n. So few zero rows stand for all
    of them: one where log n is precise, and, where it is not (bfloat16 would miss n by up to 1.6 %), more for what the
    rows before left out. The bias `[1, 1, 1, S + rows]` is None if nothing is missing.
    """
    missing = length - text.shape[1]
    if missing < 0:
        raise ValueError(
            f"text of {text.shape[1]} rows is longer than the {length} this network was trained with; cut it"
        )
    if missing == 0:
        return text, None
    slack = torch.finfo(text.dtype).eps * 2
    rows, rest = [], float(missing)
    while rest > 1e-4 * missing:
        score = float(torch.tensor(math.log(rest) - slack * (len(rows) < 2), dtype=text.dtype))
        rows.append(score)
        rest -= math.exp(score)
    bias = torch.cat([text.new_zeros(text.shape[1]), *(text.new_full((1,), score) for score in rows)])
    return F.pad(text, (0, 0, 0, len(rows))), bias[None, None, None]


def initial_weights(module: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Weights to train from nothing, float32 on the CPU; each tensor depends on the seed and its name alone."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(seeds.key_of(seed, "init", name))
        tensor = torch.zeros(parameter.shape)
        if name.endswith("modulation"):
            tensor.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        elif "norm" in name:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.startswith(("text_embedding", "time_embedding")) and tensor.ndim > 1:
            tensor.normal_(0, 0.02, generator=generator)
        elif tensor.ndim > 1 and name != "head.head.weight":  # zero there: the first prediction is zero
            nn.init.xavier_uniform_(tensor.view(len(tensor), -1), generator=generator)
        yield name, tensor

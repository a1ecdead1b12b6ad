"""URSA's transformer (arXiv 2510.24717): a Qwen3 decoder that attends both ways over text, one marker and video tokens.

Unusual: no time enters it, the noise level is seen from the tokens; the padding of the text is attended to; and what is
said about video token j is read one row before it, so the marker (BOV) speaks for token 0.
Shapes: B batch, L text tokens, T H W latent frames, rows, columns, N = T·H·W, S = L + 1 + N, D model dim, K codes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema import seeds
from kinema.diffusion.logits import Loop
from kinema.models.attention import attend
from kinema.models.layers import RMSNorm, compute_dtype, wide
from kinema.models.protocols import TensorPlan

R = TypeVar("R")


@dataclass(frozen=True)
class URSASize:
    """The dimensions of a URSA network.

    words     size of the text's vocabulary; code k of the video is token words + k
    bov       the word that marks where the video begins
    text_len  how many text tokens, padding included, it was trained with; None takes any number
    head      "codes": the head has a row per code; "full": per word and code, as a language model's
    masked    whether there is a token [MASK] = K besides the codes, for masked paths
    """

    dim: int
    ffn_dim: int
    heads: int
    kv_heads: int
    layers: int
    codes: int
    words: int = 151_669
    bov: int = 151_652
    head_dim: int = 128
    theta: float = 1e6
    eps: float = 1e-6
    text_len: int | None = 320
    head: Literal["codes", "full"] = "codes"
    masked: bool = False

    @property
    def vocabulary(self) -> int:
        return self.words + self.codes + self.masked


SIZES = {
    "1.7B": URSASize(dim=2048, ffn_dim=6144, heads=16, kv_heads=8, layers=28, codes=64_000),
    "0.6B": URSASize(dim=1024, ffn_dim=3072, heads=16, kv_heads=8, layers=28, codes=64_000),
    "1.7B-IBQ": URSASize(dim=2048, ffn_dim=6144, heads=16, kv_heads=8, layers=28, codes=131_072),
}


def tensor_plan(size: URSASize) -> TensorPlan:
    """Groups of heads and the hidden channels of the MLP are split; every rank has all embeddings and codes."""
    return TensorPlan(
        heads=size.kv_heads,
        shared={"blocks.*.self_attn": 1, "blocks.*.mlp": 1},
        columns=(
            *(f"blocks.*.self_attn.{part}_proj" for part in "qkv"),
            "blocks.*.mlp.gate_proj",
            "blocks.*.mlp.up_proj",
        ),
        norms=(),
        rows=("blocks.*.self_attn.o_proj", "blocks.*.mlp.down_proj"),
        head_norms=("blocks.*.self_attn.q_norm", "blocks.*.self_attn.k_norm"),
    )


class URSATransformer(nn.Module):
    """From noisy video tokens and a text to one hidden row per video token, of which `lm_head` makes logits.

    Norms and rotations are computed in float32 (float64 for float64 weights); the residual stream, matrix products and
    attention in the compute dtype, which is autocast's or else that of the weights.
    """

    def __init__(self, size: URSASize):
        super().__init__()
        self.size = size
        self.embed_tokens = nn.Embedding(size.vocabulary, size.dim)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.dim, size.eps)
        self.lm_head = CodesHead(size)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        *,
        text: Tensor,
        noise: Tensor | None = None,
        sigma: float = 0.0,
    ) -> Tensor:
        """Hidden rows `[B, T, H, W, D]` of tokens `x` `[B, T, H, W]` and left-padded text ids `[B, L]`.

        `timestep` is ignored. With `noise` `[B, T, H, W, D]` the video's embeddings e become σ·rms·noise + √(1 - σ²)·e,
        rms over the table. Raises ValueError for a text of another length than the network was trained with.
        """
        size, expected = self.size, self.size.text_len
        if expected is not None and text.shape[1] != expected:
            raise ValueError(f"a text of {text.shape[1]} tokens, but this network reads {expected}; pad or cut it")
        ids, positions = build_inputs(text, x, size)
        embedded = self.embed_tokens(ids).to(compute_dtype(self.lm_head.weight))
        if noise is not None:
            start = text.shape[1] + 1
            rms = self.embed_tokens.weight.detach().square().mean().sqrt()
            video = perturb(embedded[:, start:], rms * noise.flatten(1, 3), sigma)
            embedded = torch.cat([embedded[:, :start], video], dim=1)
        rows = self.rows(embedded, positions)[:, text.shape[1] : -1]
        return self.norm(rows).unflatten(1, tuple(x.shape[1:]))

    def rows(self, embedded: Tensor, positions: Tensor) -> Tensor:
        """The residual stream `[B, S, D]` after the last block, of embeddings at positions `[S, 3]` or `[B, S, 3]`."""
        x = embedded
        turn = rotary_3d(positions, self.size.head_dim, self.size.theta, wide(x.dtype))
        for block in self.blocks:
            x = block(x, turn)
        return x


class Block(nn.Module):
    """x += Attention(norm(x)); x += MLP(norm(x))."""

    def __init__(self, size: URSASize):
        super().__init__()
        self.input_layernorm = RMSNorm(size.dim, size.eps)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = RMSNorm(size.dim, size.eps)
        self.mlp = MLP(size)

    def forward(self, x_BSD: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), turn)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class Attention(nn.Module):
    """Grouped queries; the norms of q and k are per head, before the rotation. The weights say how many heads."""

    def __init__(self, size: URSASize):
        super().__init__()
        self.head_dim = size.head_dim
        width, kv_width = size.heads * size.head_dim, size.kv_heads * size.head_dim
        self.q_proj = nn.Linear(size.dim, width, bias=False)
        self.k_proj = nn.Linear(size.dim, kv_width, bias=False)
        self.v_proj = nn.Linear(size.dim, kv_width, bias=False)
        self.o_proj = nn.Linear(width, size.dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(size.head_dim, size.eps), RMSNorm(size.head_dim, size.eps)

    def forward(self, x_BSD: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (part(x_BSD).unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        y_BNSD = attend(rotate_halves(q, *turn), rotate_halves(k, *turn), v)
        return self.o_proj(y_BNSD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, size: URSASize):
        super().__init__()
        self.gate_proj = nn.Linear(size.dim, size.ffn_dim, bias=False)
        self.up_proj = nn.Linear(size.dim, size.ffn_dim, bias=False)
        self.down_proj = nn.Linear(size.ffn_dim, size.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class CodesHead(nn.Module):
    """The map from hidden rows to codes. It runs loops over its weight, see `kinema.diffusion.logits`."""

    def __init__(self, size: URSASize):
        super().__init__()
        self.first, self.codes = (size.words if size.head == "full" else 0), size.codes
        self.weight = nn.Parameter(torch.empty(self.first + size.codes, size.dim))

    def forward(self, hidden: Tensor, loop: Loop[R]) -> R:
        return loop(hidden, self.weight[self.first :] if self.first else self.weight)


def build_inputs(text: Tensor, tokens: Tensor, size: URSASize) -> tuple[Tensor, Tensor]:
    """Ids `[B, S]` = text, BOV, video tokens (time slowest), and their positions `[S, 3]`."""
    bov = torch.full_like(text[:, :1], size.bov)
    ids = torch.cat([text, bov, tokens.flatten(1) + size.words], dim=1)
    frames, height, width = tokens.shape[1:]
    return ids, sequence_positions(text.shape[1], (frames, height, width), device=tokens.device)


def sequence_positions(
    text: int, grid: tuple[int, int, int], blocks: int = 1, marked: bool = True, device: torch.device | str = "cpu"
) -> Tensor:
    """Positions `[text + blocks·(marked + N), 3]` along (time, row, column).

    Text token j is at (j, j, j). A block of video starts at p = text + block·(T + 1), with its marker, if it has one,
    at (p, p, p); token (t, h, w) is at (p + marked + t, h, w): time goes on counting, rows and columns start at 0.
    """
    words = torch.arange(text, device=device)[:, None].expand(-1, 3)
    time, rows, columns = (torch.arange(n, device=device) for n in grid)
    parts = [words]
    for block in range(blocks):
        start = text + block * (grid[0] + 1)
        if marked:
            parts.append(torch.full((1, 3), start, device=device))
        axes = torch.meshgrid(time + (start + marked), rows, columns, indexing="ij")
        parts.append(torch.stack(axes, dim=-1).flatten(0, 2))
    return torch.cat(parts)


def rotary_3d(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[..., 1, S, head_dim/2]` (1: all heads) of positions `[..., S, 3]`; angles in float64.

    Pair f turns by theta^(-2f/head_dim) per step along its axis: time, row, column in turn for the first 3/8·head_dim
    pairs, row and column in turn for the rest, so that every axis has high and low frequencies.
    """
    f = torch.arange(head_dim // 2, device=positions.device)
    axis = torch.where(f < 3 * (head_dim // 8), f % 3, 1 + (f - 3 * (head_dim // 8)) % 2)
    angle = positions[..., axis].double() * theta ** (-2.0 * f.double() / head_dim)
    return angle.cos().to(dtype).unsqueeze(-3), angle.sin().to(dtype).unsqueeze(-3)


def rotate_halves(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs (f, f + head_dim/2) by the angles whose cos and sin are given."""
    a, b = x_BNSD.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_BNSD.dtype)


def perturb(embedded: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """sigma·noise + √(1 - sigma²)·embedded."""
    return (sigma * noise + (1 - sigma**2) ** 0.5 * embedded).to(embedded.dtype)


def initial_weights(module: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Weights to train from nothing: norms 1, everything else normal with deviation 0.02, by seed and name alone."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(seeds.key_of(seed, "init", name))
        tensor = torch.ones(parameter.shape)
        if tensor.ndim > 1:
            tensor.normal_(0, 0.02, generator=generator)
        yield name, tensor

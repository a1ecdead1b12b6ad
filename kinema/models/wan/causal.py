"""The causal Wan transformer (as in Self Forcing, arXiv 2506.08009): Wan's blocks, whose frames see no later chunk.

It has three passes: over whole videos, over noisy videos beside clean ones (teacher forcing), and, with a cache, over
the next chunk of a video that is being made. Shapes: as in `transformer.py`.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from kinema.diffusion.chunks import Chunks
from kinema.models.cache import ApartAttention, Cache, CachedAttention
from kinema.models.causality import Attend, Sight, Window, anchoring, causal_attention
from kinema.models.layers import compute_dtype, rotary, rotary_widths, wide
from kinema.models.wan.transformer import WanSize, WanTransformer, patch_grid, unpatchify


class WanCausalTransformer(WanTransformer):
    """Predicts the flow (noise - data) of frames from their own chunk and the earlier ones that `window` shows."""

    def __init__(self, size: WanSize, chunks: Chunks, window: Window):
        super().__init__(size)
        self.chunks, self.window = chunks, window

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        *,
        text: Tensor,
        clean: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        cache: Cache | None = None,
        write: bool = False,
        first_position: int = 0,
        lengths: Sequence[int] | None = None,
        at: int | None = None,
    ) -> Tensor:
        """Flow `[B, T, out, H, W]` of `x` `[B, T, C, H, W]`; `timestep` and `text` are those of the bidirectional Wan.

        Without a cache x is a whole video: a frame sees its own chunk and what the window shows of the earlier ones.
        With `clean` `[B, T, C, H, W]` it sees its own chunk, noisy, and earlier chunks clean, which are told
        `clean_timestep` `[B, 1]` or `[B, T]` (0 if not given); the flow is that of x alone.

        With a `cache` x is the next chunk; `write` (under no_grad only) counts it as made, so that the next call
        continues after it, and until then every call is about the same frames. Under no_grad the text's keys and values
        are computed once and belong to the cache; with gradients the cache is a constant and only read. Such a pass may
        begin `at` an earlier frame, over several chunks at once: each sees what is cached before it, and itself.

        `first_position` moves all frames in time. `lengths` divides the frames otherwise than the model's own chunks.
        Raises ValueError for frames that do not fill chunks, or do not fit patches, window or cache.
        """
        frames, graded, dtype = x.shape[1], torch.is_grad_enabled(), compute_dtype(self.patch_embedding.weight)
        if cache is not None and clean is not None:
            raise ValueError("clean frames are given beside the noisy ones or in a cache, not both")
        if write and (cache is None or graded):
            raise ValueError("only a pass with a cache and under torch.no_grad() can write")
        if at is not None and (cache is None or not graded or not 0 <= at <= cache.frames):
            raise ValueError(
                f"a pass can begin at frame {at} only with gradients, and a cache that has the frames before it"
            )
        lengths = tuple(lengths) if lengths else self.chunks.lengths(frames) if cache is None else (frames,)
        first = at if at is not None else cache.frames if cache is not None else 0
        begin = first_position + first
        positions = torch.arange(begin, begin + frames, device=x.device)
        if clean is not None:
            context = timestep.new_zeros(1, 1) if clean_timestep is None else clean_timestep
            timestep = torch.cat([each.expand(len(x), frames) for each in (context, timestep)], dim=1)
            x, positions = torch.cat([clean.to(x.dtype), x], dim=1), positions.repeat(2)

        grid = patch_grid(x, self.size.patch)
        tokens = grid[1] * grid[2]
        places = [positions, *(torch.arange(n, device=x.device) for n in grid[1:])]
        turn = rotary(places, rotary_widths(self.size.head_dim), wide(dtype))
        window = self.window if cache is None else cache.window
        sight = Sight(lengths, window, clean is not None)
        attention = self._attention(sight, len(x), tokens, cache, graded, at, x.device, dtype)
        keeps = cache if not graded else None
        if keeps is not None and keeps.has_text:
            text_BSD, text_bias = None, keeps.text_bias
        else:
            text_BSD, text_bias = self.embed_text(text, dtype)
        if keeps is not None:
            keeps.text_bias = text_bias

        x_BLD = self.patch_embedding(x.to(dtype))
        e_BKD, e0_BK6D = self.embed_time(timestep, dtype)
        for i, block in enumerate(self.blocks):
            kept = keeps.texts[i] if keeps is not None else None
            x_BLD = block(x_BLD, e0_BK6D, turn, text_BSD, text_bias, attention[i], kept)
        if write and cache is not None:
            cache.commit(frames)
        if clean is not None:
            x_BLD, e_BKD = x_BLD[:, frames * tokens :], e_BKD[:, frames:]
        return unpatchify(self.head(x_BLD, e_BKD), (frames, *grid[1:]), self.size.patch)

    def new_cache(self, frames: int | None = None, graded: int = 0, window: Window | None = None) -> Cache:
        """A cache for videos of `frames` frames, given ones included; None: for endless ones, which need a window.

        `graded` is how many of the last frames are made with gradients and recomputed in the backward: what these saw
        is kept until then. Without recomputation 0 will do. `window` replaces the model's own. Raises ValueError
        without frames and window.
        """
        window = window or self.window
        if window.frames is None:
            if frames is None:
                raise ValueError("an endless video needs a window; give one, or say how many frames there are")
            return Cache(len(self.blocks), frames, window)
        most = window.frames + max(0, graded - self.chunks.size)
        return Cache(len(self.blocks), most if frames is None else min(frames, most), window)

    def _attention(
        self,
        sight: Sight,
        batch: int,
        tokens: int,
        cache: Cache | None,
        graded: bool,
        at: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Sequence[Attend]:
        """How each layer attends."""
        head_dim = self.size.head_dim
        whole = partial(causal_attention, sight, tokens, head_dim, device, dtype)
        if cache is None:
            return [whole()] * len(self.blocks)
        anchor = partial(anchoring, head_dim=head_dim, device=device, dtype=wide(dtype))
        if at is not None:
            begins = accumulate(sight.lengths, initial=at)
            views = [
                cache.begin(n, batch, tokens, True, anchor, device, begin)
                for n, begin in zip(sight.lengths, begins, strict=False)
            ]
            cuts = tuple(n * tokens for n in sight.lengths)
            return [ApartAttention(tuple(CachedAttention(store, v) for v in views), cuts) for store in cache.stores]
        several = len(sight.lengths) > 1
        if several and cache.frames:
            raise ValueError("several chunks at once can only begin a sequence; give the cache one chunk at a time")
        view = cache.begin(sight.frames, batch, tokens, graded, anchor, device)
        within = whole() if several else None
        return [CachedAttention(store, view, within) for store in cache.stores]

"""`kinema bench stream|vae`: how fast a causal Wan of random weights makes video, with and without decoding it."""

import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from kinema import seeds
from kinema.bench import flops
from kinema.bench.measure import (
    Clock,
    Watch,
    ceilings,
    forget_peak,
    kernels,
    like,
    peak,
    quantile,
    random_weights,
    report,
    synchronised,
    warmed,
)
from kinema.diffusion.denoiser import LatentDenoiser
from kinema.errors import UsageError
from kinema.models.causality import Window
from kinema.models.wan.fast import FastWanCausal
from kinema.models.wan.spec import WanCausal
from kinema.models.wan.transformer import SIZES, WanSize
from kinema.models.wan.vae import VideoAutoencoder
from kinema.models.wan.vae_fast import FastVideoAutoencoder
from kinema.streaming import Session

TINY = WanSize(dim=32, ffn_dim=64, heads=2, layers=2, text_dim=16, text_len=8, freq_dim=16)
VAE = {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
TINY_VAE = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}


@dataclass(frozen=True)
class Streaming:
    """What is streamed or decoded, and how.

    frames   latent frames of a video; a window of fewer keeps time and memory constant
    path     "plain": the networks as they are written; "fused": generated kernels (`models.wan.fast`, `vae_fast`);
             "graphs": and passes recorded as CUDA graphs; "balanced": and attention divided evenly over processors.
             On a CPU the fast paths run without generated kernels and graphs
    eight    the linear layers of the fast paths in 8-bit floating point
    eight_attention  and self-attention
    dtype    of all networks
    decode   also time streams to pixels
    videos   how many are timed, after some that are not (`measure.warmed`)
    """

    size: str = "1.3B"
    frames: int = 21
    chunk: int = 3
    height: int = 480
    width: int = 832
    window: int | None = None
    sink: int = 0
    path: Literal["plain", "fused", "graphs", "balanced"] = "balanced"
    eight: bool = False
    eight_attention: bool = False
    dtype: str = "bfloat16"
    decode: bool = True
    videos: int = 3

    @classmethod
    def tiny(cls) -> "Streaming":
        return cls("tiny", frames=9, height=32, width=48, dtype="float32", videos=1)

    @property
    def fast(self) -> bool:
        return self.path != "plain"

    @property
    def wan(self) -> WanSize:
        return SIZES.get(self.size, TINY)

    @property
    def latent(self) -> tuple[int, int, int]:
        return self.wan.in_channels, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        """Of a frame."""
        return self.height // 16 * (self.width // 16)


def stream(settings: Streaming, device: torch.device) -> dict[str, Any]:
    """Makes videos without and with decoding and returns the report."""
    spec = WanCausal(
        size=settings.wan, chunk=settings.chunk, window=settings.window, sink=settings.sink, fuse_qkv=settings.fast
    )
    dtype = getattr(torch, settings.dtype)
    found: dict[str, Any] = {"ceilings": ceilings(device, dtype, settings.eight)}
    denoiser = _denoiser(spec, settings, device, dtype)
    forget_peak(device)
    with torch.no_grad():
        found["diffusion"] = _diffusion(spec, denoiser, settings, device)
        found["diffusion"]["peak_gib"] = peak(device)
        found["ceilings_after"] = ceilings(device, dtype, settings.eight)
        if settings.decode:
            codec = autoencoder(settings, device, dtype)
            found["end_to_end"] = _end_to_end(spec, denoiser, codec, settings, device)
            found["end_to_end"]["peak_gib"] = peak(device)
        found["last_pass"] = _last_pass(denoiser, settings, device)
    reached = found["diffusion"]["tflops"]
    found["share_of_gemm_ceiling"] = round(reached / found["ceilings"]["gemm_tflops"], 3)
    return report("stream", settings, device, found)


def _diffusion(spec: WanCausal, denoiser: Any, settings: Streaming, device: torch.device) -> dict[str, Any]:
    try:
        chunks = spec.chunks.lengths(settings.frames)
    except ValueError as error:
        raise UsageError(str(error)) from None
    clock, each = Clock(device), []

    def video(settings: Streaming = settings) -> list[Any]:
        marks = [clock.mark()]
        for _ in _session(spec, denoiser, None, settings, device).latents():
            marks.append(clock.mark())
        return marks

    # In a window the places of the ring come again within a video: a few rounds record the passes to all of them.
    short = min(settings.frames, 6 * settings.window) if settings.window else settings.frames
    warmed(partial(video, replace(settings, frames=short)), device)
    with Watch(device) as card:
        for _ in range(settings.videos):
            synchronised(device)
            marks = video()
            each.append([clock.between(marks[0], mark) for mark in marks[1:]])
    pixels = 1 + 4 * (settings.frames - 1)
    passes = flops.chunk_passes(settings.wan, settings.frames, settings.tokens, spec.chunks, spec_window(spec))
    work = flops.rollout(passes, len(spec.steps_at)) + flops.text(settings.wan)
    totals = sorted(times[-1] for times in each)
    middle = next(times for times in each if times[-1] == totals[len(totals) // 2])
    blocks = [b - a for a, b in pairwise([0.0, *middle])]
    edge = max(1, len(blocks) // 10)
    return {
        "fps": round(pixels / middle[-1], 2),
        "fps_of_each_video": [round(pixels / total, 2) for total in totals],
        "seconds": round(middle[-1], 4),
        "block_ms": [round(1e3 * s, 1) for s in (blocks if len(blocks) <= 21 else [*blocks[:5], *blocks[-5:]])],
        "steady_fps": round(4 * settings.chunk / (sum(blocks[-edge:]) / edge), 2),
        "blocks": len(chunks),
        "work_tflop": round(work / 1e12, 3),
        "tflops": round(work / middle[-1] / 1e12, 3),
        "card": card.read(),
    }


def _end_to_end(
    spec: WanCausal, denoiser: Any, codec: Any, settings: Streaming, device: torch.device
) -> dict[str, Any]:
    firsts, totals, gaps, memory = [], [], [], []

    def video() -> list[float]:
        begin, arrivals = time.perf_counter(), []
        for _ in _session(spec, denoiser, codec, settings, device).frames():
            arrivals.append(time.perf_counter() - begin)
            if device.type == "cuda":
                memory.append(torch.cuda.memory_allocated(device))
        return arrivals

    warmed(video, device)
    memory.clear()
    with Watch(device) as card:
        for _ in range(settings.videos):
            synchronised(device)
            arrivals = video()
            firsts.append(arrivals[0])
            totals.append(arrivals[-1])
            gaps += [b - a for a, b in pairwise(arrivals)]
    pixels = 1 + 4 * (settings.frames - 1)
    return {
        "fps": round(pixels / sorted(totals)[len(totals) // 2], 2),
        "fps_of_each_video": [round(pixels / total, 2) for total in sorted(totals)],
        "first_frames_ms": round(1e3 * sorted(firsts)[len(firsts) // 2], 1),
        "first_frames_ms_each": [round(1e3 * first, 1) for first in sorted(firsts)],
        "gap_p50_ms": round(1e3 * quantile(gaps, 0.5), 1) if gaps else None,
        "gap_p95_ms": round(1e3 * quantile(gaps, 0.95), 1) if gaps else None,
        "memory_drift_mib": round((memory[-1] - memory[len(memory) // 2]) / 2**20, 1) if memory else None,
        "card": card.read(),
    }


def _last_pass(denoiser: Any, settings: Streaming, device: torch.device) -> dict[str, Any]:
    """One pass over the last chunk: its time, and what it is made of."""
    backbone, text = denoiser.backbone, _words(settings, device)([""])["text"]
    before = min(settings.frames, settings.window or settings.frames) - settings.chunk
    cache = backbone.new_cache(settings.frames)
    x, t = like((1, settings.chunk, *settings.latent), device), torch.full((1, 1), 500.0, device=device)

    def run(write: bool = False) -> None:
        backbone(x, t, text=text, cache=cache, write=write)

    for _ in range(before // settings.chunk):
        run(write=True)
    clock = Clock(device)
    for _ in range(3):
        run()
    marks = [clock.mark()]
    for _ in range(5):
        run()
        marks.append(clock.mark())
    each = sorted(clock.between(a, b) for a, b in pairwise(marks))
    seen = before + settings.chunk
    work = flops.forward(settings.wan, settings.chunk * settings.tokens, seen * settings.tokens)
    return {"ms": round(1e3 * each[2], 2), "work_tflop": round(work / 1e12, 3), **kernels(run, device)}


def vae(settings: Streaming, device: torch.device) -> dict[str, Any]:
    """Decodes videos chunk by chunk and returns the report."""
    dtype = getattr(torch, settings.dtype)
    found: dict[str, Any] = {"ceilings": ceilings(device, dtype)}
    codec = autoencoder(settings, device, dtype)
    latents = like((1, settings.frames, *settings.latent), device)
    pieces = latents.split(settings.chunk, dim=1)
    clock, each, made = Clock(device), [], latents

    def video() -> list[Any]:
        nonlocal made
        marks = [clock.mark()]
        for pixels in codec.stream(pieces):
            marks.append(clock.mark())
            made = pixels
        return marks

    forget_peak(device)
    with torch.no_grad():
        warmed(video, device)
        with Watch(device) as card:
            for _ in range(settings.videos):
                marks = video()
                each.append([clock.between(marks[0], mark) for mark in marks[1:]])
        assert bool(made.isfinite().all())
        found["peak_gib"] = peak(device)
        state: Any = None
        for piece in pieces[:2]:
            _, state = codec.decode_next(piece, state)
        found["piece"] = kernels(lambda: codec.decode_next(pieces[-1], state), device)
    totals = sorted(times[-1] for times in each)
    middle = next(times for times in each if times[-1] == totals[len(totals) // 2])
    pixels = 1 + 4 * (settings.frames - 1)
    blocks = [b - a for a, b in pairwise([0.0, *middle])]
    work = decoder_work(settings) * len(pieces)
    found |= {
        "fps": round(pixels / middle[-1], 2),
        "fps_of_each_video": [round(pixels / total, 2) for total in totals],
        "steady_fps": round(4 * settings.chunk / blocks[-1], 2),
        "block_ms": [round(1e3 * seconds, 1) for seconds in blocks[:21]],
        "tflops": round(work / middle[-1] / 1e12, 3),
        "card": card.read(),
        "ceilings_after": ceilings(device, dtype),
    }
    found["share_of_gemm_ceiling"] = round(found["tflops"] / found["ceilings"]["gemm_tflops"], 3)
    return report("vae", settings, device, found)


def decoder_work(settings: Streaming) -> float:
    """FLOPs of decoding a chunk in the middle of a video, counted without computing it."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        codec = VideoAutoencoder(_network(settings), 10**12, settings.chunk)
        z = torch.empty(1, settings.chunk, *settings.latent)
    kept: list = [None for _ in range(1000)]
    with torch.no_grad():
        codec._pieces(z.transpose(1, 2), kept, 0)
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                codec._pieces(z.transpose(1, 2), kept, 3)
    return float(counter.get_total_flops())


def autoencoder(settings: Streaming, device: torch.device, dtype: torch.dtype) -> VideoAutoencoder:
    with torch.device("meta"):
        network = _network(settings)
    network = random_weights(network, device, dtype).eval().requires_grad_(False)
    pixels = settings.height * settings.width
    if not settings.fast:
        return VideoAutoencoder(network, pixels, settings.chunk)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return FastVideoAutoencoder(network, pixels, settings.chunk, fused=device.type == "cuda")


def _network(settings: Streaming) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    options: dict[str, Any] = VAE if settings.size in SIZES else TINY_VAE
    return AutoencoderKLWan(z_dim=16, temperal_downsample=[False, True, True], **options)


def _denoiser(spec: WanCausal, settings: Streaming, device: torch.device, dtype: torch.dtype) -> LatentDenoiser:
    module: Any = random_weights(spec.build(), device, dtype).eval().requires_grad_(False)
    denoiser = spec.read(module)
    if not settings.fast:
        return denoiser
    gpu, balanced = device.type == "cuda", settings.path == "balanced"
    graphs = gpu and settings.path != "fused"
    return replace(
        denoiser, backbone=FastWanCausal(module, gpu, graphs, settings.eight, balanced, settings.eight_attention)
    )


class _words:
    """Random embeddings in place of a text encoder."""

    unconditional = ""

    def __init__(self, settings: Streaming, device: torch.device):
        self.text = like((1, settings.wan.text_len, settings.wan.text_dim), device)

    def __call__(self, prompts: Any) -> dict[str, Tensor]:
        return {"text": self.text}


def _session(spec: WanCausal, denoiser: Any, codec: Any, settings: Streaming, device: torch.device) -> Session:
    draw = seeds.keys(0, "bench", [0], device=device)
    return Session(spec, denoiser, _words(settings, device), codec, [""], draw, settings.latent, length=settings.frames)


def spec_window(spec: WanCausal) -> Window:
    return Window(spec.window, spec.sink, spec.reanchor)

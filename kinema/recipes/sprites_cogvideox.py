"""CogVideoX on the embedded world, at a size that trains on a laptop: a T5 encoder, an autoencoder, a transformer.

They become `sprites-cogvideox` as the parts of `sprites-wan` do: `text` and `vae` are joined by `kinema.shipping.base`,
then `cogvideox` is trained on them. `lora` teaches the result a new concept.
"""

from dataclasses import replace

from kinema.data.in_turn import InTurn
from kinema.data.scenes import NOVEL_SHAPES
from kinema.data.sprites import World
from kinema.data.sprites_data import SpriteCaptions, SpriteLatents, SpriteVideos, classes
from kinema.data.tokenizer import vocabulary
from kinema.diffusion.samplers import DPMpp2MSDE
from kinema.diffusion.schedule import ZeroSNR
from kinema.diffusion.times import Stratified
from kinema.errors import UserError
from kinema.models.caption_reader import CaptionReader
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.transformer import CogVideoXSize
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.cogvideox.vae_training import CogVideoXVAESize
from kinema.models.lora import LoRA
from kinema.models.text import T5
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.objectives.reading import Reading
from kinema.objectives.reconstruction import Reconstruction
from kinema.optim import Ema, Optim
from kinema.pretrained import describe
from kinema.recipes.sprites import EVERYTHING, PROMPTS, TRAINED, start_of_vae
from kinema.run import Preview, Run
from kinema.sampling import Pipeline

TOKENS = 40  # more than any caption has; padding is encoded and attended to, so all parts must agree on it
KL = 3e-3  # with 1e-4 things are a fifth as loud as backgrounds in the latents, and the transformer never hears them
NOISE = 1.0  # without it outlines are too quiet to be drawn right: see `Reconstruction`
CODEC = CogVideoXVAESize(channels=(16, 24, 24, 48), res_blocks=1, groups=8)
NOISY = ZeroSNR(shift=3.0)  # as 2B: where what moves, and how, is decided, there are twice as many steps as without
SIZE = CogVideoXSize(heads=5, layers=6, head_dim=32, grid=(9, 8, 8), time_dim=32, text_dim=64, text_tokens=TOKENS)


def text(steps: int = 3000, batch_size: int = 256) -> Run:
    """Teach a tiny T5 encoder to understand the captions of sprites."""
    reader = CaptionReader(len(vocabulary()), classes(), kind="t5")
    return Run(
        objective=Reading(Role(reader, Optim(lr=2e-3, warmup=50, anneal=steps))),
        data=SpriteCaptions(EVERYTHING, rows=TOKENS),
        steps=steps,
        batch_size=batch_size,
    )


def vae(
    steps: int = 4000,
    batch_size: int = 32,
    frames: int = 9,
    clips: int = 4096,
    lr: float = 1e-3,
    start: str | None = None,
) -> Run:
    """Train a tiny CogVideoX VAE on the pixels of sprites, from nothing or from the VAE in the folder `start`.

    Windows of 9 frames are cheap and teach it to see, but they are the first chunk alone: later ones have 8 frames,
    statistics of their own in the norms, and a past. So finish on whole clips (--frames 33 --batch_size 8).
    """
    start = start_of_vae(start, "AutoencoderKLCogVideoX", "sprites-cogvideox")
    optim = Optim(lr=lr, betas=(0.9, 0.99), weight_decay=0.0, warmup=30, anneal=steps, floor=0.01)
    return Run(
        objective=Reconstruction(Role(replace(CODEC, weights=start), optim, Ema(decay=0.998)), kl=KL, noise=NOISE),
        data=SpriteVideos(EVERYTHING, frames=frames, clips=clips),
        steps=steps,
        batch_size=batch_size,
    )


def cogvideox(
    steps: int = 20000,
    batch_size: int = 64,
    clips: int = 40960,
    block: int = 128,
    lr: float = 1e-3,
    base: str = "sprites-cogvideox",
) -> Run:
    """Train a tiny CogVideoX on sprites from nothing, with the text encoder and VAE of `base`."""
    codec, encoder = CogVideoXVAE(base), T5(base, tokens=TOKENS)
    optim = Optim(lr=lr, betas=(0.9, 0.98), warmup=200, anneal=steps)
    return Run(
        objective=Denoising(Role(CogVideoX(SIZE, schedule=NOISY), optim, Ema(decay=0.999)), times=Stratified()),
        data=SpriteLatents((TRAINED,), codec, encoder, clips=clips, rows=TOKENS, block=block),
        steps=steps,
        batch_size=batch_size,
        pipeline=Pipeline(encoder, codec, 33, 64, 64, fps=8, guidance=3.0, sampler=DPMpp2MSDE()),
        preview=Preview(PROMPTS, every=0),
    )


def lora(
    steps: int = 400,
    lr: float = 2e-3,
    clips: int = 16,
    known: int = 256,
    rank: int = 16,
    base: str = "sprites-cogvideox",
) -> Run:
    """Teach the shipped model the heart by low-rank adapters, from `clips` clips of it and `known` of what it knows.

    Each batch is half of one and half of the other: adapters that see hearts alone forget other shapes.
    """
    spec, pipeline = describe(base)
    if not isinstance(spec, CogVideoX):
        raise UserError(f"{base} is no CogVideoX; give the folder of one")
    spec = replace(spec, edits=(LoRA(rank=rank, alpha=rank / 2),))
    worlds = ((World(shapes=NOVEL_SHAPES), clips), (TRAINED, known))
    rows = spec.dimensions.text_tokens
    return Run(
        objective=Denoising(Role(spec, Optim(lr=lr, warmup=20, anneal=steps)), times=Stratified()),
        data=InTurn(tuple(SpriteLatents((w,), pipeline.codec, pipeline.text, clips=n, rows=rows) for w, n in worlds)),
        steps=steps,
        batch_size=16,
        pipeline=pipeline,
        save_every=100,
    )

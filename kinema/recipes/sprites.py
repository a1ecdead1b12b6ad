"""The embedded world: every method at a size that trains, samples and is judged on a laptop.

The shipped checkpoint `sprites-wan` is made by `text` and `vae`, joined by `kinema.shipping.base`, and then `wan`;
its card
has the commands. `learn` is what `kinema demo` runs.
"""

from kinema.data.scenes import NOVEL_SHAPES, SHAPES
from kinema.data.sprites import World
from kinema.data.sprites_data import SpriteCaptions, SpriteLatents, SpriteVideos, classes
from kinema.data.tokenizer import vocabulary
from kinema.diffusion.times import Shifted
from kinema.errors import UsageError
from kinema.models.caption_reader import CaptionReader
from kinema.models.text import UMT5
from kinema.models.wan.spec import Wan
from kinema.models.wan.transformer import WanSize
from kinema.models.wan.vae import WanVAE
from kinema.models.wan.vae_training import WanVAESize
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Role
from kinema.objectives.reading import Reading
from kinema.objectives.reconstruction import Reconstruction
from kinema.optim import Ema, Optim
from kinema.pretrained import describe
from kinema.run import Preview, Run
from kinema.sampling import Pipeline

# Codec and text encoder know the novel shape, as those of real models know more than the model was trained on.
EVERYTHING = World(shapes=SHAPES, one=0.6, two=0.25, behind=0.15)
TRAINED = World(one=0.75, two=0.15, behind=0.1)
SIZE = WanSize(dim=160, ffn_dim=512, heads=4, layers=6, text_dim=64, freq_dim=64)
CODEC = WanVAESize(base_dim=16, dim_mult=(1, 2, 2, 4), res_blocks=1)
PROMPTS = (
    "a big red circle moves left on a black background",
    "a small green star bounces on a navy background",
    "a big yellow cross orbits on a grey background",
    "a small blue square moves up on a brown background",
)


def text(steps: int = 3000, batch_size: int = 256) -> Run:
    """Teach a tiny UMT5 encoder to understand the captions of sprites."""
    return Run(
        objective=Reading(Role(CaptionReader(len(vocabulary()), classes()), Optim(lr=2e-3, warmup=50, anneal=steps))),
        data=SpriteCaptions(EVERYTHING),
        steps=steps,
        batch_size=batch_size,
    )


def vae(steps: int = 7500, batch_size: int = 32, frames: int = 9, clips: int = 4096, lr: float = 1e-3) -> Run:
    """Train a tiny Wan VAE on the pixels of sprites; finish on whole clips (--frames 33 --batch_size 8).

    Short windows are cheap and teach it to see, but only the frames they have: after 9-frame windows it gives 33 dB
    within
    the first 9 frames and 14 dB at the 33rd, where its causal convolutions meet a longer past than ever.
    """
    optim = Optim(lr=lr, betas=(0.9, 0.99), weight_decay=0.0, warmup=30, anneal=steps, floor=0.01)
    return Run(
        objective=Reconstruction(Role(CODEC, optim, Ema(decay=0.998))),
        data=SpriteVideos(EVERYTHING, frames=frames, clips=clips),
        steps=steps,
        batch_size=batch_size,
    )


def wan(
    steps: int = 5000,
    batch_size: int = 16,
    clips: int = 24576,
    block: int = 16,
    lr: float = 1e-3,
    base: str = "sprites-wan",
) -> Run:
    """Train a tiny Wan text-to-video model on sprites from nothing, with the text encoder and VAE of `base`."""
    codec, encoder = WanVAE(path=base), UMT5(path=base)
    return Run(
        objective=Denoising(
            Role(
                Wan(size=SIZE, shift=3.0), Optim(lr=lr, betas=(0.9, 0.98), warmup=200, anneal=steps), Ema(decay=0.999)
            ),
            times=Shifted(3.0),
        ),
        data=SpriteLatents((TRAINED,), codec, encoder, clips=clips, block=block),
        steps=steps,
        batch_size=batch_size,
        pipeline=Pipeline(encoder, codec, frames=33, height=64, width=64, fps=8, guidance=3.0),
        preview=Preview(PROMPTS, every=0),
    )


def learn(steps: int = 400, lr: float = 5e-4, clips: int = 192, base: str = "sprites-wan") -> Run:
    """Teach the shipped model a shape it has never drawn, the heart, without forgetting the others.

    Only what reads the caption learns: training everything for as long draws no better hearts, and worse known shapes.
    """
    spec, pipeline = describe(base)
    if not (isinstance(pipeline.codec, WanVAE) and isinstance(pipeline.text, UMT5)):
        raise UsageError(f"{base} is a model of codes, and this recipe teaches a Wan; use --base sprites-wan")
    return Run(
        objective=Denoising(
            Role(spec, Optim(lr=lr, warmup=20, anneal=steps, train="cross_attn|text_embedding"), Ema(decay=0.98)),
            times=Shifted(spec.shift),
        ),
        data=SpriteLatents((World(shapes=NOVEL_SHAPES), TRAINED), pipeline.codec, pipeline.text, clips=clips),
        steps=steps,
        batch_size=16,
        pipeline=pipeline,
        save_every=100,
    )

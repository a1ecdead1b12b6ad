"""A tiny CogVideoX in diffusers' folder layout and a few clips, for tests that need a whole model."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from kinema import pretrained
from kinema.data.video import write_video
from kinema.diffusion.samplers import DPMpp2MSDE
from kinema.diffusion.schedule import ZeroSNR
from kinema.models.cogvideox.spec import SHIFTS, CogVideoX
from kinema.models.cogvideox.transformer import SIZES
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.text import T5
from kinema.sampling import Pipeline, Studio

WORDS = ["a", "red", "blue", "circle", "moves", "left", "right", "slowly"]
CPU = torch.device("cpu")


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> int:
    """A tokenizer of one token per word; returns how many it knows."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **special).save_pretrained(
        folder / "tokenizer"
    )
    return len(vocabulary)


def write_encoder(folder: Path) -> None:
    words = write_tokenizer(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=words,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")


def write_codec(folder: Path, invert: bool = False) -> None:
    """An autoencoder whose posterior has no spread, so that its samples are its means."""
    torch.manual_seed(1)
    network = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.7,
        sample_height=32,
        sample_width=48,
        invert_scale_latents=invert,
    )
    with torch.no_grad():
        network.encoder.conv_out.conv.weight[16:] = 0
        network.encoder.conv_out.conv.bias[16:] = -60
    network.save_pretrained(folder / "vae")


def write_model(folder: Path, variant: str) -> Path:
    """A model of videos of 9 frames of 32 x 48, with random weights everywhere."""
    write_encoder(folder)
    write_codec(folder, invert=variant == "1.5-5B-I2V")
    published = SIZES[variant]
    size = replace(
        published,
        heads=2,
        layers=2,
        head_dim=16,
        time_dim=16,
        text_dim=24,
        text_tokens=8,
        grid=(3, 4, 6),
        ofs_dim=published.ofs_dim and 16,
    )
    spec = CogVideoX(size, schedule=ZeroSNR(SHIFTS[size.positions]))
    module = spec.load(spec.build(), CPU)
    for n, (name, p) in enumerate(sorted(module.named_parameters())):
        if p.ndim > 1 or "modulate" in name:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(n))
    codec = CogVideoXVAE(str(folder), multiple=2 if size.patch[0] == 2 else 1)
    pipeline = Pipeline(T5(str(folder), 8), codec, 9, 32, 48, 8, 4, 3.0, DPMpp2MSDE())
    model = pretrained.Pretrained(
        "tiny", spec, module, spec.read(module), Studio(pipeline, None, pipeline.codec.load(CPU))
    )
    pretrained.write(model, folder, torch.float32)
    return folder


def write_clips(folder: Path, count: int = 4, frames: int = 9, fps: float = 8.0) -> Path:
    """A folder with videos/, videos.txt and prompts.txt; clip n is a ramp whose brightness depends on n."""
    (folder / "videos").mkdir(parents=True)
    ramp = torch.linspace(-1, 1, 64).expand(frames, 3, 48, 64)
    for n in range(count):
        write_video(folder / "videos" / f"{n}.mp4", ramp * (n + 1) / count, fps)
    (folder / "videos.txt").write_text("".join(f"videos/{n}.mp4\n" for n in range(count)))
    (folder / "prompts.txt").write_text("".join(f"a {WORDS[1 + n % 2]} circle\n" for n in range(count)))
    return folder

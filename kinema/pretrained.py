"""Trained generators, wherever they are: shipped with kinema, in a folder of the Hub's layout, or in a run's folder."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinema import config
from kinema.diffusion.samplers import DPMpp2MSDE
from kinema.errors import UserError
from kinema.models import edits, lora
from kinema.models.cogvideox.spec import CogVideoX, native
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.text import T5, UMT5
from kinema.models.wan.spec import Wan
from kinema.models.wan.vae import WanVAE
from kinema.models.weights import ASSETS, located, tensors
from kinema.sampling import Pipeline, Studio
from kinema.training import checkpoint

SETTINGS = ("frames", "height", "width", "fps", "steps", "guidance")  # of kinema.json, beside model_index.json


@dataclass(frozen=True)
class Pretrained:
    """A generator ready to use."""

    name: str
    spec: Wan | CogVideoX
    module: nn.Module
    denoiser: Any
    studio: Studio

    def settings(self) -> dict:
        """What besides the weights decides how a video looks."""
        p = self.studio.pipeline
        guidance = p.guidance if isinstance(p.guidance, int | float) else repr(p.guidance)
        settings = {name: getattr(p, name) for name in SETTINGS}
        return {**settings, "guidance": guidance, "sampler": type(p.sampler).__name__}

    def with_settings(self, **changes: Any) -> "Pretrained":
        """The same generator with, for example, other `steps` or `guidance`; None leaves a setting as it is."""
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(self, studio=replace(self.studio, pipeline=replace(self.studio.pipeline, **given)))


def shipped() -> list[str]:
    """The names of the checkpoints inside the package."""
    return sorted(path.name for path in ASSETS.glob("*/") if (path / "model_index.json").exists())


def find(model: str) -> Path:
    """The folder of a shipped name or a path."""
    path = located(model)
    if not path.is_dir():
        names = ", ".join(shipped())
        raise UserError(f"there is no model {model!r}; give a folder, or one of those shipped with kinema: {names}")
    return path


def load(model: str, device: torch.device, ema: bool = True) -> Pretrained:
    """Loads a generator. From a run's folder: its newest complete checkpoint, the average unless `ema` is False."""
    path = find(model)
    if (path / "run.yaml").exists():
        return _from_run(path, device, ema)
    spec, pipeline = describe(model)
    module = spec.load(spec.build(), device).eval().requires_grad_(False)
    return Pretrained(path.name, spec, module, spec.read(module), pipeline.open(device))


def describe(model: str) -> tuple[Wan | CogVideoX, Pipeline]:
    """The spec and the pipeline of a shipped name or a folder in the Hub's layout; reads no weights."""
    path = find(model)
    if not (path / "model_index.json").exists():
        raise UserError(f"{path} is neither a run's folder (no run.yaml) nor a pipeline's folder (no model_index.json)")
    said = _json(path / "kinema.json") if (path / "kinema.json").exists() else {}
    settings = {name: said[name] for name in SETTINGS if name in said}
    if not _json(path / "model_index.json").get("_class_name", "").startswith("CogVideoX"):
        shift = float(_json(path / "scheduler" / "scheduler_config.json").get("flow_shift", 1.0))
        return Wan(weights=model, shift=shift), Pipeline(UMT5(model), WanVAE(model), **settings)
    spec = CogVideoX.from_pretrained(model)
    size = spec.dimensions
    text = T5(model, size.text_tokens, said.get("unconditional"))
    codec = CogVideoXVAE(model, multiple=2 if size.patch[0] == 2 else 1)
    frames, height, width, fps = native(size)
    pipeline = Pipeline(text, codec, frames, height, width, fps, guidance=6.0, sampler=DPMpp2MSDE())
    return spec, replace(pipeline, **settings)


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); copy or download the model again") from error


def trained(path: Path, device: torch.device, ema: bool = True) -> tuple[Any, nn.Module]:
    """The spec and the network of the student of a run, as its newest complete checkpoint has them."""
    role = config.load(path / "run.yaml").objective.roles()["student"]
    newest = checkpoint.latest(path / "checkpoints")
    if newest is None:
        raise UserError(f"{path} has no complete checkpoint yet; train it further")
    module = role.spec.build()
    frozen = edits.frozen(module)
    module = role.spec.load(module, device).eval().requires_grad_(False)
    kind = "ema" if ema and role.ema else "model"
    kept = {name: tensor for name, tensor in tensors(module).items() if name not in frozen}
    checkpoint.load(newest, {f"student.{kind}.{name}": tensor for name, tensor in kept.items()})
    return role.spec, module


def _from_run(path: Path, device: torch.device, ema: bool) -> Pretrained:
    pipeline = config.load(path / "run.yaml").pipeline
    if pipeline is None:
        raise UserError(f"{path} did not train a generator: its run has no pipeline")
    spec, module = trained(path, device, ema)
    return Pretrained(path.name, spec, module, spec.read(module), pipeline.open(device))


def write(model: Pretrained, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a generator as a folder of the Hub's layout, which diffusers' pipeline of its kind loads too.

    Adapters are folded into the weights.
    """
    p = model.studio.pipeline
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(dtype) for name, tensor in lora.folded(model.module).items()}
    model.spec.export(state, folder / "transformer", layout="diffusers")
    for part, source in (("text_encoder", p.text.path), ("tokenizer", p.text.path), ("vae", p.codec.path)):
        if located(source).resolve() != folder.resolve():
            shutil.copytree(located(source) / part, folder / part, dirs_exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    index, scheduler = _of_wan(model.spec) if isinstance(model.spec, Wan) else _of_cogvideox(model.spec)
    settings = {name: getattr(p, name) for name in SETTINGS}
    if not isinstance(p.guidance, int | float):
        raise UserError(f"a folder cannot hold guidance that follows the time ({p.guidance}); give it a number")
    if p.text.unconditional:
        settings["unconditional"] = p.text.unconditional
    for path, content in (
        (folder / "scheduler" / "scheduler_config.json", scheduler),
        (folder / "model_index.json", index),
        (folder / "kinema.json", settings),
    ):
        path.write_text(json.dumps(content, indent=2) + "\n")


def _of_wan(spec: Wan) -> tuple[dict, dict]:
    """diffusers' model_index.json and scheduler_config.json."""
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": spec.shift,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    }
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    return index, scheduler


def _of_cogvideox(spec: CogVideoX) -> tuple[dict, dict]:
    scheduler = {
        "_class_name": "CogVideoXDPMScheduler",
        "num_train_timesteps": spec.schedule.steps,
        "beta_start": spec.schedule.beta[0],
        "beta_end": spec.schedule.beta[1],
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "snr_shift_scale": spec.schedule.shift,
        "timestep_spacing": "trailing",
    }
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if spec.dimensions.image_channels else "CogVideoXPipeline",
        "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    return index, scheduler

"""Trained generators, wherever they are: shipped with kinema, in a folder of the Hub's layout, or in a run's folder."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinema import config
from kinema.diffusion.times import shifted
from kinema.diffusion.token_sampling import Jumps, Redraws
from kinema.errors import UsageError, UserError
from kinema.models.causality import Window
from kinema.models.text import UMT5
from kinema.models.ursa.codec import URSACodec
from kinema.models.ursa.spec import URSA
from kinema.models.ursa.text import NEGATIVE, QwenText
from kinema.models.wan.causal import WanCausalTransformer
from kinema.models.wan.spec import Wan, WanCausal, described
from kinema.models.wan.vae import WanVAE
from kinema.models.weights import ASSETS, located, tensors
from kinema.sampling import Pipeline, Studio
from kinema.training import checkpoint

SETTINGS = ("frames", "height", "width", "fps", "steps", "guidance")  # of kinema.json, beside model_index.json


URSA_PIPELINE = "URSAPipeline"  # what model_index.json calls it
URSA_SETTINGS = {"frames": 49, "height": 320, "width": 512, "fps": 12, "steps": 50, "guidance": 7.0}  # as released


@dataclass(frozen=True)
class Pretrained:
    """A generator ready to use."""

    name: str
    spec: Wan | URSA
    module: nn.Module
    denoiser: Any
    studio: Studio

    def settings(self) -> dict:
        """What besides the weights decides how a video looks."""
        p, spec = self.studio.pipeline, self.spec
        own = {**{name: getattr(p, name) for name in SETTINGS}, "sampler": type(p.sampler).__name__}
        if isinstance(spec, WanCausal):
            own |= {"window": spec.window, "sink": spec.sink, "steps_at": list(spec.steps_at)}
        return own

    def with_settings(self, **changes: Any) -> "Pretrained":
        """The same generator with, for example, other `steps` or `guidance`; None leaves a setting as it is.

        Of a few-step student, fewer steps than it has are its own way of stepping on as many times.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        spec = self.spec
        if isinstance(spec, WanCausal) and 0 < given.get("steps", 0) < len(spec.steps_at):
            spec = replace(spec, steps_at=shifted(given["steps"], spec.shift))
        return replace(self, spec=spec, studio=replace(self.studio, pipeline=replace(self.studio.pipeline, **given)))

    def with_window(self, window: int | None, sink: int | None) -> "Pretrained":
        """The same causal generator whose chunks see other frames; the weights do not depend on it. None: as it is."""
        spec, module = self.spec, self.module
        if window is None and sink is None:
            return self
        if not isinstance(spec, WanCausal) or not isinstance(module, WanCausalTransformer):
            raise UserError(f"{self.name} is not causal: it sees all frames; leave --window and --sink away")
        spec = replace(spec, window=spec.window if window is None else window, sink=spec.sink if sink is None else sink)
        module.window = Window(spec.window, spec.sink, spec.reanchor)
        return replace(self, spec=spec)


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


def describe(model: str) -> tuple[Wan | URSA, Pipeline]:
    """The spec and the pipeline of a shipped name or a folder in the Hub's layout; reads no weights."""
    path = find(model)
    if not (path / "model_index.json").exists():
        raise UserError(f"{path} is neither a run's folder (no run.yaml) nor a pipeline's folder (no model_index.json)")
    settings = _json(path / "kinema.json") if (path / "kinema.json").exists() else {}
    try:
        if _json(path / "model_index.json").get("_class_name") == URSA_PIPELINE:
            return _describe_ursa(model, settings)
        shift = _shift(path / "scheduler" / "scheduler_config.json")
        pipeline = Pipeline(UMT5(model), WanVAE(model), **{k: settings[k] for k in SETTINGS if k in settings})
    except UsageError as error:
        raise UserError(f"{path / 'kinema.json'}: {error}") from error
    spec = described(model)
    return spec if isinstance(spec, WanCausal) else Wan(weights=model, shift=shift), pipeline


def _describe_ursa(model: str, settings: dict) -> tuple[URSA, Pipeline]:
    spec = URSA.from_pretrained(model)
    told = settings.get("text", {"unconditional": NEGATIVE, "motion": 9.0})
    text = QwenText(model, length=spec.dimensions.text_len or QwenText.length, **told)
    sampler = {"Jumps": Jumps, "Redraws": Redraws}[settings.get("sampler", "Jumps")]()
    chosen = URSA_SETTINGS | {k: settings[k] for k in SETTINGS if k in settings}
    return spec, Pipeline(text, URSACodec(model), sampler=sampler, **chosen)


def _shift(scheduler: Path) -> float:
    shift = _json(scheduler).get("flow_shift", 1.0)
    if not isinstance(shift, int | float) or not shift > 0:
        raise UserError(f"{scheduler} has flow_shift {shift!r}; it must be a number above 0, as 3.0 or 5.0")
    return float(shift)


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not names with values")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); copy or download the model again") from error
    return content


def trained(path: Path, device: torch.device, ema: bool = True) -> tuple[Any, nn.Module]:
    """The spec and the network of the student of a run, as its newest complete checkpoint has them."""
    role = config.load(path / "run.yaml").objective.roles()["student"]
    newest = checkpoint.latest(path / "checkpoints")
    if newest is None:
        raise UserError(f"{path} has no complete checkpoint yet; train it further")
    module = role.spec.load(role.spec.build(), device).eval().requires_grad_(False)
    kind = "ema" if ema and role.ema else "model"
    checkpoint.load(newest, {f"student.{kind}.{name}": tensor for name, tensor in tensors(module).items()})
    return role.spec, module


def _from_run(path: Path, device: torch.device, ema: bool) -> Pretrained:
    pipeline = config.load(path / "run.yaml").pipeline
    if pipeline is None:
        raise UserError(f"{path} did not train a generator: its run has no pipeline")
    spec, module = trained(path, device, ema)
    return Pretrained(path.name, spec, module, spec.read(module), pipeline.open(device))


def write(model: Pretrained, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a generator as a folder of the Hub's layout, which the public pipeline of its kind loads too."""
    p = model.studio.pipeline
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {name: getattr(p, name) for name in SETTINGS}
    if isinstance(model.spec, URSA):
        assert isinstance(p.text, QwenText)
        _write_ursa(model.spec, model, folder, dtype)
        settings["text"] = {"unconditional": p.text.unconditional, "motion": p.text.motion}
        settings["sampler"] = type(p.sampler).__name__
        (folder / "kinema.json").write_text(json.dumps(settings, indent=2) + "\n")
        return
    state = {name: tensor.to(dtype) for name, tensor in model.module.state_dict().items()}
    model.spec.export(state, folder / "transformer", layout="diffusers")
    for part, source in (("text_encoder", p.text.path), ("tokenizer", p.text.path), ("vae", p.codec.path)):
        if located(source).resolve() != folder.resolve():
            shutil.copytree(located(source) / part, folder / part, dirs_exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": model.spec.shift,
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
    for path, content in (
        (folder / "scheduler" / "scheduler_config.json", scheduler),
        (folder / "model_index.json", index),
        (folder / "kinema.json", settings),
    ):
        path.write_text(json.dumps(content, indent=2) + "\n")


def _write_ursa(spec: URSA, model: Pretrained, folder: Path, dtype: torch.dtype) -> None:
    p = model.studio.pipeline
    spec.export(model.module, folder / "transformer", dtype=dtype)
    for part, source in (("tokenizer", p.text.path), ("vae", p.codec.path)):
        if located(source).resolve() != folder.resolve():
            shutil.copytree(located(source) / part, folder / part, dirs_exist_ok=True)
    spec.export_path(folder)
    index = {
        "_class_name": URSA_PIPELINE,
        "scheduler": ["diffnext", "KineticOptimalScheduler"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffnext", "URSATransformer3DModel"],
        "vae": ["diffnext", "AutoencoderVQCosmos3D"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

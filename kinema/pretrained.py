"""Trained generators, wherever they are: shipped with kinema, in a folder of the Hub's layout, or in a run's folder."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinema import config
from kinema.diffusion.samplers import DPMpp2MSDE
from kinema.diffusion.times import shifted
from kinema.diffusion.token_path import Start
from kinema.diffusion.token_sampling import Jumps, Redraws
from kinema.errors import UsageError, UserError
from kinema.models import edits, lora
from kinema.models.causality import Window
from kinema.models.cogvideox.spec import CogVideoX, native
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.hub import ASSETS, is_hub_id, located
from kinema.models.text import T5, UMT5
from kinema.models.ursa.codec import URSACodec
from kinema.models.ursa.spec import URSA
from kinema.models.ursa.text import NEGATIVE, QwenText
from kinema.models.wan.causal import WanCausalTransformer
from kinema.models.wan.fast import FastWanCausal
from kinema.models.wan.spec import Wan, WanCausal, described
from kinema.models.wan.vae import WanVAE
from kinema.models.wan.vae_fast import FastVideoAutoencoder
from kinema.models.wan.vae_layouts import ORIGINAL
from kinema.models.weights import tensors
from kinema.sampling import Pipeline, Studio
from kinema.training import checkpoint
from kinema.training.trainer import check_base

LINKED = 1 << 26  # bytes from which files of frozen parts are linked and not copied
SETTINGS = ("frames", "height", "width", "fps", "steps", "guidance")  # of kinema.json, beside model_index.json
URSA_PIPELINE = "URSAPipeline"  # what model_index.json calls it
URSA_SETTINGS = {"frames": 49, "height": 320, "width": 512, "fps": 12, "steps": 50, "guidance": 7.0}  # as released
URSA_INDEX = {
    "_class_name": URSA_PIPELINE,
    "scheduler": ["diffnext", "KineticOptimalScheduler"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffnext", "URSATransformer3DModel"],
    "vae": ["diffnext", "AutoencoderVQCosmos3D"],
}


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """A generator ready to use."""

    name: str
    spec: Wan | CogVideoX | URSA
    module: nn.Module
    denoiser: Any
    studio: Studio

    @property
    def weights(self) -> str:
        """A name of the weights, by the first numbers of each parameter: what was made with others is not theirs."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.module.named_parameters()):
            digest.update(name.encode() + parameter.detach().flatten()[:8].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def settings(self) -> dict:
        """What besides the weights decides how a video looks."""
        p, spec = self.studio.pipeline, self.spec
        own = {**{name: getattr(p, name) for name in SETTINGS}, "sampler": type(p.sampler).__name__}
        own["guidance"] = p.guidance if isinstance(p.guidance, int | float) else repr(p.guidance)
        if isinstance(spec, WanCausal):
            own |= {"window": spec.window, "sink": spec.sink}
            own |= {"sampler": "few-step", "steps_at": list(spec.steps_at)} if spec.few_step(p.steps) else {}
        backbone = getattr(self.denoiser, "backbone", None)
        if isinstance(backbone, FastWanCausal):
            own |= {"fast": True, "fp8": backbone.eight, "fp8_attention": backbone.eight_attention}
        return own

    def with_settings(self, **changes: Any) -> "Pretrained":
        """The same generator with, for example, other `steps` or `guidance`; None leaves a setting as it is.

        Of a few-step student, other steps than it has are its own way of stepping on as many times.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        spec = self.spec
        if self.studio.pipeline.guidance == 1 and given.get("guidance", 1) != 1:
            log.warning("%s has its guidance in its weights; with %s it is guided twice", self.name, given["guidance"])
        pipeline = replace(self.studio.pipeline, **given)
        if (
            isinstance(spec, WanCausal)
            and spec.few_step(self.studio.pipeline.steps)
            and not spec.few_step(pipeline.steps)
        ):
            spec = replace(spec, steps_at=shifted(pipeline.steps, spec.shift))
        return replace(self, spec=spec, studio=replace(self.studio, pipeline=pipeline))

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

    def quickened(self, fp8: bool = False, fp8_attention: bool = False) -> "Pretrained":
        """The same causal generator by the fast paths: the same videos up to rounding; on CUDA in bfloat16. With `fp8`
        its linear layers, with `fp8_attention` its self-attention are in 8 bits.

        Raises UserError for networks, or 8 bits, that there is no fast path for.
        """
        module, codec = self.module, self.studio.codec
        if not isinstance(self.spec, WanCausal) or not isinstance(module, WanCausalTransformer):
            raise UserError(f"{self.name} is not causal; the fast paths are for those that are, leave --fast away")
        if self.spec.edits:
            raise UserError(
                f"{self.name} has adapters, which --fast does not know; fold them by kinema export, or leave it"
            )
        if gpu := codec.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            module.to(torch.bfloat16)
            codec.network.to(torch.bfloat16)
        decoder = FastVideoAutoencoder(codec.network, codec.pixels, self.spec.chunk, fused=gpu)
        backbone = FastWanCausal(module, gpu, gpu, eight=fp8, eight_attention=fp8_attention)
        return replace(
            self,
            denoiser=replace(self.denoiser, backbone=backbone),
            studio=replace(self.studio, codec=decoder),
        )


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
    name = model.partition("@")[0].rpartition("/")[2] if is_hub_id(model) else path.name
    return Pretrained(name, spec, module, spec.read(module), pipeline.open(device))


def describe(model: str) -> tuple[Wan | CogVideoX | URSA, Pipeline]:
    """The spec and the pipeline of a shipped name or a folder in the Hub's layout; reads no weights."""
    path = find(model)
    if (path / ORIGINAL).exists() and not (path / "model_index.json").exists():  # the original release of Wan
        return described(model), Pipeline(UMT5(model), WanVAE(model))
    if not (path / "model_index.json").exists():
        if (path / "vae").is_dir():
            raise UserError(
                f"{path} has parts that a generator is trained with, but no generator; train one on them "
                f"(--base {model}), write it by kinema.shipping, and give its folder"
            )
        raise UserError(f"{path} is neither a run's folder (no run.yaml) nor a pipeline's folder (no model_index.json)")
    said = _json(path / "kinema.json") if (path / "kinema.json").exists() else {}
    kind = str(_json(path / "model_index.json").get("_class_name"))
    if kind == URSA_PIPELINE:
        return _ursa(model, path, said)
    return (_cogvideox if kind.startswith("CogVideoX") else _wan)(model, path, said)


def teacher_of(model: str) -> str:
    """The model whose student another is: its run's teacher, or the parent of its folder. UserError if it says none."""
    path = find(model)
    if (path / "run.yaml").exists():
        role = config.load(path / "run.yaml").objective.roles().get("teacher")
        teacher = role.spec.weights if role and isinstance(role.spec, Wan | CogVideoX | URSA) else None
    else:
        parent = _json(path / "kinema.json").get("parent") if (path / "kinema.json").exists() else None
        beside = path.resolve().parent / str(parent)
        teacher = str(beside) if parent and (beside / "model_index.json").exists() else parent
    if teacher is None:
        raise UserError(f"{model} does not say whose student it is; name it with --teacher MODEL")
    return teacher


def _wan(model: str, path: Path, said: dict) -> tuple[Wan, Pipeline]:
    text = UMT5(model, unconditional=said.get("unconditional", ""))
    pipeline = _set(Pipeline(text, WanVAE(model)), path, said)
    shift = _shift(path / "scheduler" / "scheduler_config.json")
    spec = described(model)
    return spec if isinstance(spec, WanCausal) else Wan(weights=model, shift=shift), pipeline


def _shift(scheduler: Path) -> float:
    shift = _json(scheduler).get("flow_shift", 1.0)
    if not isinstance(shift, int | float) or not shift > 0:
        raise UserError(f"{scheduler} has flow_shift {shift!r}; it must be a number above 0, as 3.0 or 5.0")
    return float(shift)


def _cogvideox(model: str, path: Path, said: dict) -> tuple[CogVideoX, Pipeline]:
    spec = CogVideoX.from_pretrained(model)
    size = spec.dimensions
    text = T5(model, size.text_tokens, said.get("unconditional"))
    codec = CogVideoXVAE(model, multiple=2 if size.patch[0] == 2 else 1)
    frames, height, width, fps = native(size)
    pipeline = Pipeline(text, codec, frames, height, width, fps, guidance=6.0, sampler=DPMpp2MSDE())
    return spec, _set(pipeline, path, said)


def _ursa(model: str, path: Path, said: dict) -> tuple[URSA, Pipeline]:
    spec = URSA.from_pretrained(model)
    told = said.get("text", {"unconditional": NEGATIVE, "motion": 9.0})
    text = QwenText(model, length=spec.dimensions.text_len or QwenText.length, **told)
    samplers = {"Jumps": Jumps, "Redraws": Redraws}
    name = said.get("sampler", "Jumps")
    if name not in samplers:
        raise UserError(f"{path / 'kinema.json'} has sampler {name!r}; it must be {' or '.join(samplers)}")
    codec = URSACodec(model)
    if codec.size.codes != spec.dimensions.codes:
        raise UserError(
            f"the network of {model} has {spec.dimensions.codes:,} codes and its tokenizer {codec.size.codes:,}; they "
            "are of two models, so download the folder again"
        )
    return spec, _set(Pipeline(text, codec, **URSA_SETTINGS, sampler=samplers[name]()), path, said)


def _set(pipeline: Pipeline, path: Path, said: dict) -> Pipeline:
    """The pipeline with what a folder says of it."""
    try:
        return replace(pipeline, **{name: said[name] for name in SETTINGS if name in said})
    except UsageError as error:
        raise UserError(f"{path / 'kinema.json'}: {error}") from error


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not names with values")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); copy or download the model again") from error
    return content


def trained(path: Path, device: torch.device, ema: bool = True, name: str = "student") -> tuple[Any, nn.Module]:
    """The spec and the network of a learning role of a run, as its newest complete checkpoint has them."""
    if not (path / "run.yaml").exists():
        raise UserError(f"{path} is not the folder of a run (no run.yaml); give one that `kinema train` made")
    roles = {n: role for n, role in config.load(path / "run.yaml").objective.roles().items() if role.optim is not None}
    if name not in roles:
        raise UsageError(f"no role {name} learned in {path}; its roles are {', '.join(roles)}")
    role, newest = roles[name], checkpoint.latest(path / "checkpoints")
    if newest is None:
        raise UserError(f"{path} has no complete checkpoint yet; train it further")
    module = role.spec.build()
    frozen = edits.frozen(module)
    module = role.spec.load(module, device).eval().requires_grad_(False)
    kind = "ema" if ema and role.ema else "model"
    kept = {name: tensor for name, tensor in tensors(module).items() if name not in frozen}
    wanted = {f"{name}.{kind}.{key}": tensor for key, tensor in kept.items()}
    if (stamp := lora.stamp(module)) is not None:
        wanted[f"{name}.base"] = stamp.clone()
    checkpoint.load(newest, wanted)
    if stamp is not None:
        check_base(newest, wanted[f"{name}.base"], stamp)
    return role.spec, module


def export_file(
    run: Path, file: Path, role: str = "student", ema: bool = True, dtype: torch.dtype = torch.float32
) -> Path:
    """Writes a URSA network that a run trained as one file, .pt or .safetensors, beside a card on how to use it.

    UserError if there is such a file.
    """
    spec, module = trained(run, torch.device("cpu"), ema, role)
    pipeline = config.load(run / "run.yaml").pipeline
    if not isinstance(spec, URSA) or pipeline is None:
        raise UsageError(f"{role} is a {type(spec).__name__}, which is exported as a folder; give --out without suffix")
    return spec.export_file(module, file, dtype, _card(spec, pipeline, run, file))


def _card(spec: URSA, p: Pipeline, run: Path, file: Path) -> str:
    size, text = spec.dimensions, p.text
    assert isinstance(text, QwenText)
    told = "nothing" if text.motion is None else f"`motion={text.motion:.1f}, ` before the prompt"
    start = "uniform codes" if spec.start == Start() else repr(spec.start)
    how = "none: it is in the weights, and more of it would guide twice" if p.guidance == 1 else f"{p.guidance}"
    given = "takes given frames (image, video) too" if spec.continues else "knows no given frames: text to video only"
    return f"""# {file.name}

A URSA transformer of {size.layers} layers and {size.codes:,} codes, trained by the kinema run `{run.resolve().name}`.

| | |
|---|---|
| steps | {p.steps} |
| guidance | {p.guidance} ({how}) |
| frames x height x width | {p.frames} x {p.height} x {p.width}, at {p.fps} a second |
| text | {size.text_len} tokens, padded on the left; motion: {told} |
| unconditional text | {json.dumps(text.unconditional)} |
| start | {start} |
| frames that are given | {given} |

It is a state dict under the released names. It loads with `strict=True` into the transformer of a pipeline whose
tokenizer has {size.codes:,} codes, which then samples with `num_inference_steps={p.steps}` and
`guidance_scale={p.guidance:g}`.
"""


def _from_run(path: Path, device: torch.device, ema: bool) -> Pretrained:
    pipeline = config.load(path / "run.yaml").pipeline
    if pipeline is None:
        raise UserError(f"{path} did not train a generator: its run has no pipeline")
    spec, module = trained(path, device, ema)
    return Pretrained(path.name, spec, module, spec.read(module), pipeline.open(device))


def write(
    model: Pretrained, folder: Path, dtype: torch.dtype = torch.float16, parent: str | Path | None = None
) -> None:
    """Writes a generator as a folder of the Hub's layout, which the public pipeline of its kind loads too.

    Adapters are folded into the weights. What is the same in the folder `parent`, or in the shipped checkpoint of that
    name, is not written but named: kinema reads it there, so `parent` belongs beside `folder`; public pipelines do not.
    """
    write_pipeline(model.spec, model.module, model.studio.pipeline, folder, dtype, parent)


def write_pipeline(
    spec: Any,
    module: nn.Module,
    p: Pipeline,
    folder: Path,
    dtype: torch.dtype,
    parent: str | Path | None = None,
) -> None:
    """Writes a network and the pipeline around it; the parts that are frozen are linked, where the disk allows."""
    if not isinstance(p.guidance, int | float):
        raise UserError(
            f"a pipeline's folder cannot hold guidance that follows the time ({p.guidance}); give it a number, or "
            "export the weights alone with --layout kinema"
        )
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(dtype) for name, tensor in lora.folded(module).items()}
    settings: dict[str, Any] = {name: getattr(p, name) for name in SETTINGS}
    if isinstance(spec, URSA):
        assert isinstance(p.text, QwenText)
        spec.export(state, folder / "transformer", dtype=dtype)
        spec.export_path(folder)
        index = URSA_INDEX
        settings["text"] = {"unconditional": p.text.unconditional, "motion": p.text.motion}
        settings["sampler"] = type(p.sampler).__name__
    else:
        spec.export(state, folder / "transformer", layout="diffusers")
        index, scheduler = _of_wan(spec) if isinstance(spec, Wan) else _of_cogvideox(spec)
        (folder / "scheduler").mkdir(exist_ok=True)
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        if p.text.unconditional is not None:
            settings["unconditional"] = p.text.unconditional
    if parent is not None:
        settings["parent"] = Path(parent).name
    for part, source in (("text_encoder", p.text.path), ("tokenizer", p.text.path), ("vae", p.codec.path)):
        if part in index and located(source).resolve() != folder.resolve():
            there = located(source, part) / part
            if not there.is_dir():
                alone = "kinema" if isinstance(spec, URSA) else "original"  # the release of a URSA is a pipeline itself
                raise UserError(
                    f"{source} has no folder {part}, as the public pipeline needs; export the weights alone, with "
                    f"--layout {alone}"
                )
            _share(there, folder / part, parent)
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "kinema.json", settings)


def linked(source: str, target: str) -> str:
    """A large file as a hard link, which costs nothing, or as a copy where that cannot be."""
    try:
        if os.path.getsize(source) < LINKED:
            return shutil.copy2(source, target)
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _share(source: Path, target: Path, parent: str | Path | None) -> None:
    """Copies a part, unless the parent has it; UserError if the parent's is another."""
    if parent is None:
        shutil.copytree(source, target, dirs_exist_ok=True, copy_function=linked)
        return
    theirs = located(parent) / target.name
    mine, others = ({file.name: file.read_bytes() for file in folder.glob("*")} for folder in (source, theirs))
    if mine != others:
        raise UserError(
            f"the {target.name} of this model, {source}, is not that of {parent}; write it without a parent, "
            f"or name the one it was trained with"
        )
    if target.exists():
        shutil.rmtree(target)  # of an earlier, complete copy


def _write_json(path: Path, content: dict) -> None:
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

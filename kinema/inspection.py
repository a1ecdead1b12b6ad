"""`kinema inspect PATH`: what a checkpoint is, its family, size and layout, and what it lacks or has too much.

Nothing is filled: names and shapes in the files are held against those of the network they say they are.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinema import config
from kinema.data import store
from kinema.errors import UserError
from kinema.models import lora
from kinema.models.cogvideox import layouts as cogvideox_layouts
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.cogvideox.transformer import SIZES as COGVIDEOX_SIZES
from kinema.models.cogvideox.vae import from_sat
from kinema.models.hub import is_hub_id, located, revision_of
from kinema.models.text import ORIGINAL as ORIGINAL_TEXT
from kinema.models.text import from_original as text_from_original
from kinema.models.ursa import layouts as ursa_layouts
from kinema.models.ursa.codec import size_of as tokenizer_size
from kinema.models.ursa.image_tokenizer import IBQImageTokenizer
from kinema.models.ursa.spec import URSA, Mixture
from kinema.models.ursa.tokenizer import FSQSize, FSQVideoTokenizer
from kinema.models.ursa.transformer import SIZES as URSA_SIZES
from kinema.models.wan import layouts as wan_layouts
from kinema.models.wan import vae_layouts
from kinema.models.wan.spec import described
from kinema.models.wan.transformer import SIZES as WAN_SIZES
from kinema.models.weights import PARTS, Weights, open_weights, tensors
from kinema.training import checkpoint

PARTS_OF_A_PIPELINE = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Found:
    """One network on disk. `missing` and `unexpected` are names that its network has more or fewer of; `differing` are
    of other shapes."""

    where: str
    what: str
    layout: str
    size: str = ""
    parameters: int = 0
    dtypes: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    says: dict[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return not (self.missing or self.unexpected or self.differing)

    def lines(self) -> list[str]:
        told = [f"{self.where}: {self.what}", f"  layout      {self.layout}"]
        told += [f"  size        {self.size}"] if self.size else []
        if self.parameters:
            told.append(f"  parameters  {self.parameters:,} in {self.dtypes}")
        told += [f"  {name:11} {value}" for name, value in self.says.items()]
        for word in ("missing", "unexpected", "differing"):
            names = getattr(self, word)
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                told.append(f"  {word:11} {len(names)}: {', '.join(names[:10])}{more}")
        if self.parameters and self.whole:
            told.append("  complete    every tensor is there, and nothing else")
        return told


def inspect(path: str) -> list[Found]:
    """All that is at a path: a file, a network's folder, a pipeline's, a run's, or prepared data. UserError where there
    is nothing that kinema knows."""
    folder = located(path)
    if not folder.exists():
        raise UserError(f"there is nothing at {path}; give a file, a folder or a Hub id")
    if (folder / "run.yaml").exists():
        return [_run(folder)]
    if (folder / store.MANIFEST).exists():
        return [_data(folder)]
    if folder.is_dir() and (folder / lora.FILE).exists():
        folder = folder / lora.FILE
    pinned = {"revision": revision_of(path)} if is_hub_id(path) else {}
    if folder.is_dir() and any((folder / part).is_dir() for part in PARTS_OF_A_PIPELINE):
        parts = [part for part in PARTS_OF_A_PIPELINE if (folder / part).is_dir()]
        whole = _pipeline(folder, pinned)
        return [whole, *(_as_sampled(one, whole) for part in parts for one in _networks(folder / part))]
    originals = [folder / name for name in (ORIGINAL_TEXT, vae_layouts.ORIGINAL) if (folder / name).exists()]
    weights = [folder] if not originals or any(folder.glob("*.safetensors")) else []
    return [one for where in (*weights, *originals) for one in _networks(where)]


def _networks(path: Path) -> list[Found]:
    """The networks of a file or a folder; a torch file may hold several."""
    opened = open_weights(path, "")
    if opened.part is None:
        return [_network(opened, None)]
    content = torch.load(opened.path, map_location="meta", weights_only=True, mmap=True)
    parts = [part for part in PARTS if isinstance(content.get(part), dict)]
    return [_network(open_weights(path, "", part), part) for part in parts]


def _network(opened: Weights, part: str | None) -> Found:
    where = f"{opened.path}" + (f" [{part}]" if part else "")
    count, dtypes = sum(math.prod(shape) for shape in opened.shapes.values()), _dtypes(opened)
    for look in (_adapters, _wan, _cogvideox, _ursa, _autoencoder, _text):
        found = look(opened, part)
        if found is not None:
            what, layout, size, there, wanted, says = found
            missing = tuple(sorted(wanted.keys() - there.keys()))
            unexpected = tuple(sorted(there.keys() - wanted.keys()))
            differing = tuple(
                f"{name} {list(there[name])} for {list(wanted[name])}"
                for name in sorted(there.keys() & wanted.keys())
                if tuple(there[name]) != tuple(wanted[name])
            )
            return Found(where, what, layout, size, count, dtypes, missing, unexpected, differing, says)
    first = ", ".join([*opened.shapes][:3])
    raise UserError(f"{where} is no checkpoint of a family that kinema knows (names like {first})")


Look = tuple[str, str, str, Shapes, Shapes, dict[str, Any]] | None  # what, layout, size, there, wanted, says


def _wan(opened: Weights, part: str | None) -> Look:
    layout = _recognised(wan_layouts.recognise, opened.shapes)
    if layout is None:
        return None
    spec = described(str(opened.path), part)
    there = _renamed(opened, lambda named: wan_layouts.to_kinema(named, layout))
    causal = type(spec).__name__ == "WanCausal"
    says = {name: value for name, value in opened.kinema.items() if name not in ("size", "model")}
    what = "causal Wan 2.1, transformer" if causal else "Wan 2.1, transformer"
    return what, layout, _size(spec.dimensions, WAN_SIZES), there, _wanted(spec.build()), says


def _cogvideox(opened: Weights, part: str | None) -> Look:
    layout = _recognised(cogvideox_layouts.recognise, opened.shapes)
    if layout is None:
        return None
    spec = CogVideoX.from_pretrained(str(opened.path))
    size = spec.dimensions
    there = _renamed(opened, lambda named: cogvideox_layouts.to_kinema(named, layout, size.table))
    what = f"CogVideoX, {'image' if size.image_channels else 'text'}-to-video transformer"
    says = {"SNR shift": spec.schedule.shift} | ({} if spec.long is None else {"mixer": spec.long.mixer.kind})
    return what, layout, _size(size, COGVIDEOX_SIZES), there, _wanted(spec.build()), says


def _ursa(opened: Weights, part: str | None) -> Look:
    layout = _recognised(ursa_layouts.recognise, opened.shapes)
    if layout is None:
        return None
    there = _renamed(opened, lambda named: ursa_layouts.to_kinema(named, layout))
    if layout == "qwen3":
        return "Qwen3 language model, which a URSA may begin from", layout, "", there, there, {}
    spec = URSA(Mixture(), weights=str(opened.path))
    size = spec.dimensions
    return "URSA, transformer", layout, _size(size, URSA_SIZES), there, _wanted(spec.build()), {"codes": size.codes}


def _autoencoder(opened: Weights, part: str | None) -> Look:
    kind, names = opened.config.get("_class_name"), opened.shapes
    if vae_layouts.is_original(names):
        base = names["encoder.conv1.weight"][0]
        there = _renamed(opened, vae_layouts.from_original)
        return "Wan 2.1, autoencoder", "original", f"width {base}", there, _diffusers("wan", {"base_dim": base}), {}
    if kind == "AutoencoderKLWan":
        size = f"width {opened.config.get('base_dim', 96)}"
        return "Wan 2.1, autoencoder", "diffusers", size, names, _diffusers("wan", opened.config), {}
    sat = any(name.startswith("encoder.down.") for name in names)
    if sat or kind == "AutoencoderKLCogVideoX":
        there = _renamed(opened, from_sat) if sat else names
        wanted, scale = _diffusers("cogvideox", opened.config), opened.config.get("scaling_factor")
        return "CogVideoX, autoencoder", "sat" if sat else "diffusers", "", there, wanted, {"latent scale": scale}
    if "quant_conv.weight" in names and opened.config:
        size = tokenizer_size(opened.config, str(opened.path))
        with torch.device("meta"):
            network = FSQVideoTokenizer(size) if isinstance(size, FSQSize) else IBQImageTokenizer(size)
        what = "URSA, video tokenizer" if isinstance(size, FSQSize) else "URSA, image tokenizer"
        return what, "ursa", f"{size.codes:,} codes", names, _wanted(network), {}
    return None


def _text(opened: Weights, part: str | None) -> Look:
    names = opened.shapes
    if "token_embedding.weight" in names:
        there = _renamed(opened, text_from_original)
        vocabulary, dim = names["token_embedding.weight"]
        layers = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks."))
        size = f"{layers} layers of {dim}, {vocabulary:,} words"
        return "umT5, text encoder", "original", size, there, _t5(there, layers, per_layer=True), {}
    if "shared.weight" in names or "encoder.embed_tokens.weight" in names:
        vocabulary, dim = names.get("shared.weight") or names["encoder.embed_tokens.weight"]
        blocks = {name.split(".")[2] for name in names if name.startswith("encoder.block.")}
        per_layer = any(name.startswith("encoder.block.1.") and "relative_attention_bias" in name for name in names)
        what = f"{'umT5' if per_layer else 'T5'}, text encoder"
        size = f"{len(blocks)} layers of {dim}, {vocabulary:,} words"
        there = {name: shape for name, shape in names.items() if name != "encoder.embed_tokens.weight"}
        there["shared.weight"] = (vocabulary, dim)
        return what, "transformers", size, there, _t5(there, len(blocks), per_layer), {}
    return None


def _adapters(opened: Weights, part: str | None) -> Look:
    if not any(".lora_A." in name for name in opened.shapes):
        return None
    ranks = {shape[0] for name, shape in opened.shapes.items() if ".lora_A." in name}
    said = json.loads(opened.header.get(lora.HEADER, "{}"))
    alpha = next((value for name, value in said.items() if name.endswith("lora_alpha")), None)
    halves = {name.replace(".lora_A.", ".lora_B."): (0,) for name in opened.shapes if ".lora_A." in name}
    there = {name: (0,) for name in opened.shapes if ".lora_A." not in name}
    says = {"alpha": "not said: give it where it is loaded" if alpha is None else alpha}
    return "low-rank adapters", "diffusers", f"rank {', '.join(map(str, sorted(ranks)))}", there, halves, says


def _pipeline(folder: Path, pinned: dict[str, Any]) -> Found:
    index = folder / "model_index.json"
    kind = json.loads(index.read_text()).get("_class_name", "pipeline") if index.exists() else "pipeline"
    says = dict(pinned)
    if (folder / "kinema.json").exists():
        says |= json.loads((folder / "kinema.json").read_text())
    return Found(str(folder), f"{kind}, a whole pipeline", "diffusers", says=says)


def _as_sampled(network: Found, pipeline: Found) -> Found:
    """Without the times of a few-step student, which weights may say, where the pipeline takes other steps."""
    unused = len(network.says.get("steps_at", ())) != pipeline.says.get("steps")
    return replace(network, says={n: v for n, v in network.says.items() if n != "steps_at"}) if unused else network


def _run(folder: Path) -> Found:
    run = config.load(folder / "run.yaml")
    newest = checkpoint.latest(folder / "checkpoints")
    roles = {
        name: f"{type(role.spec).__name__}{'' if role.optim else ', frozen'}"
        for name, role in run.objective.roles().items()
    }
    step = checkpoint.step_of(newest) if newest else 0
    says = {"objective": type(run.objective).__name__, "step": f"{step} of {run.steps}", **roles}
    return Found(str(folder), "a run of kinema", "kinema", says=says)


def _data(folder: Path) -> Found:
    manifest = store.read_manifest(folder)
    says = {
        "family": manifest["family"],
        "complete": manifest["complete"],
        "samples": manifest.get("samples", 0),
        "buckets": ", ".join(f"{n} of {size}" for size, n in manifest.get("buckets", {}).items()),
        "made with": manifest["model"],
        "digest": manifest.get("digest", ""),
    }
    return Found(str(folder), "prepared videos", "kinema", says=says)


def _recognised(recognise: Callable[[Iterable[str]], Any], names: Iterable[str]) -> Any:
    """A layout, or None where the names are of something else; what is known but not supported is said."""
    try:
        return recognise(names)
    except UserError as error:
        if "these are not weights of" in str(error):
            return None
        raise


def _renamed(opened: Weights, rename: Callable[[Iterable[tuple[str, Tensor]]], Iterable[tuple[str, Tensor]]]) -> Shapes:
    meta = ((name, torch.empty(shape, device="meta")) for name, shape in opened.shapes.items())
    return {name: tuple(tensor.shape) for name, tensor in rename(meta)}


def _wanted(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors(module).items()}


def _diffusers(family: str, settings: Mapping[str, Any]) -> Shapes:
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    kind: Any = {"wan": AutoencoderKLWan, "cogvideox": AutoencoderKLCogVideoX}[family]
    with torch.device("meta"):
        return _wanted(kind.from_config(dict(settings)))


def _t5(there: Shapes, layers: int, per_layer: bool) -> Shapes:
    """What an encoder whose first block is right has in all of its blocks."""
    first = {name: shape for name, shape in there.items() if name.startswith("encoder.block.0.")}
    wanted = {"shared.weight": there["shared.weight"], "encoder.final_layer_norm.weight": there["shared.weight"][1:]}
    for layer in range(layers):
        for name, shape in first.items():
            if layer == 0 or per_layer or "relative_attention_bias" not in name:
                wanted[name.replace("encoder.block.0.", f"encoder.block.{layer}.")] = shape
    return wanted


def _size(size: Any, known: Mapping[str, Any]) -> str:
    name = next((name for name, other in known.items() if other == size), None)
    numbers = ", ".join(f"{key} {value}" for key, value in asdict(size).items() if key in ("dim", "layers", "heads"))
    return f"{name} ({numbers})" if name else numbers


def _dtypes(opened: Weights) -> str:
    path = opened.path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    counts: Counter[str] = Counter()
    for file in files:
        if file.suffix == ".safetensors":
            with open(file, "rb") as stream:
                header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
            counts.update(said["dtype"] for name, said in header.items() if name != "__metadata__")
    if not counts:
        counts.update(str(tensor.dtype).removeprefix("torch.") for _, tensor in opened)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64"}
    return ", ".join(names.get(name, name) for name, _ in counts.most_common())

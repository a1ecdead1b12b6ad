"""What a run trained, as files that others read: weights of a layout or a whole pipeline, with a card that says how.

`--layout diffusers` (URSA: `ursa`) makes the folder that `kinema sample` and the public pipeline load: the trained
transformer, and beside it the parts that the run's pipeline was made of, as links where the disk allows. It is what a
student becomes if no layout is named and its run has a pipeline; other layouts are the weights alone. The card names
recipe, data, metrics and parents: the runs and weights that this one began from, to the first.
"""

import hashlib
import json
import shutil
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kinema import config, pretrained
from kinema.data import shards, store
from kinema.errors import UsageError, UserError
from kinema.models import lora
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.hub import is_hub_id, revision_of
from kinema.models.ursa.spec import URSA
from kinema.models.wan.spec import Wan
from kinema.run import Run
from kinema.training import checkpoint
from kinema.training.guard import read_rows

CARD = "README.md"
MARK = "<!-- written by kinema export -->"
ORIGINAL = {"Wan": "wan", "WanCausal": "wan", "CogVideoX": "sat", "URSA": "ursa"}  # what "original" means
WHOLE = {"diffusers", "ursa"}  # layouts whose folders have pipelines around them
SHOWN = 40  # metrics of a card


def export(
    run: Path,
    folder: Path,
    role: str = "student",
    layout: str | None = None,
    ema: bool = True,
    adapters: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a network that a run trained, on any number of ranks, with its card, complete or not at all.

    Adapters are folded into the weights, or, with `adapters`, written alone, as diffusers' `load_lora_weights` reads
    them. UsageError names the layouts that the network has.
    """
    spec, module = pretrained.trained(run, torch.device("cpu"), ema, role)
    network: Any = spec  # its layouts are its family's
    described, name = config.load(run / "run.yaml"), type(spec).__name__
    layouts = typing.get_args(typing.get_type_hints(network.export).get("layout"))
    if layout is None:
        usable = WHOLE.intersection(layouts) if role == "student" and described.pipeline is not None else ()
        layout = next(iter(usable), "kinema")
    layout = ORIGINAL.get(name, layout) if layout == "original" else layout
    if adapters and not isinstance(spec, Wan | CogVideoX):
        raise UsageError(f"{role} is a {name}, which has no adapters; leave --adapters out")
    if not adapters and layout not in layouts:
        known = ", ".join(layouts) or "none, as it is no generator"
        raise UsageError(f"{role} is a {name}, which has no layout {layout}; its layouts are {known}")
    _free(folder)
    draft = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        if adapters:
            lora.export(module, draft, spec.diffusers_name)
        elif layout in WHOLE and described.pipeline is not None:
            pretrained.write_pipeline(spec, module, described.pipeline, draft, dtype)
        else:
            state = {key: tensor.to(dtype) for key, tensor in lora.folded(module).items()}
            more = {"dtype": dtype} if isinstance(spec, URSA) else {}
            network.export(state, draft, layout, **more)
        (draft / CARD).write_text(card(run, described, role, ema, layout, draft), encoding="utf-8")
        old = folder.with_name(f".{folder.name}.old")
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def card(run: Path, described: Run, role: str, ema: bool, layout: str, folder: Path) -> str:
    """The README.md of an export."""
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None, "it was exported from"
    spec = described.objective.roles()[role].spec
    averaged = ema and described.objective.roles()[role].ema is not None
    base = str(getattr(spec, "weights", None) or "")
    front = ["license: other", "library_name: diffusers", "tags: [kinema, video]"]
    front += [f"base_model: {base.partition('@')[0]}"] if is_hub_id(base) else []
    rows = read_rows(run / "metrics.jsonl")
    last = {name: value for name, value in (rows[-1] if rows else {}).items() if isinstance(value, int | float)}
    hashes = [f"| `{file.relative_to(folder)}` | {_sha(file)} |" for file in _weights(folder)]
    parts = [
        "---",
        *front,
        "---",
        MARK,
        "",
        f"# {run.resolve().name}",
        "",
        f"The {'averaged ' if averaged else ''}weights of `{role}`, a {type(spec).__name__}, after "
        f"{checkpoint.step_of(newest):,} steps of {type(described.objective).__name__}, in the layout `{layout}`.",
        "",
        "## Parents",
        "",
        *(f"{n}. {line}" for n, line in enumerate(parents(run), start=1)),
        "",
        "## Data",
        "",
        *(f"- {line}" for line in _data(described)),
        "",
        "## Metrics",
        "",
        f"At step {int(last.pop('step', 0)):,}, as the run logged them:",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.6g} |" for name, value in [*last.items()][:SHOWN]),
        *_scores(run),
        "",
        "## Files",
        "",
        "| file | sha256 |",
        "|---|---|",
        *hashes,
        "",
        "## Recipe",
        "",
        "```yaml",
        (run / "run.yaml").read_text(encoding="utf-8").rstrip(),
        "```",
        "",
    ]
    return "\n".join(parts)


def parents(run: Path) -> Iterator[str]:
    """The stages that led to a run, itself first, in words; the last one says which weights all began from."""
    seen: set[Path] = set()
    while run.resolve() not in seen:
        seen.add(run.resolve())
        file = run / "run.yaml"
        if not file.exists():
            yield f"`{run}`, which is not there any more"
            return
        described = config.load(file)
        newest = checkpoint.latest(run / "checkpoints")
        at = f"{checkpoint.step_of(newest)} of {described.steps} steps" if newest else "no checkpoint"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        yield f"`{run.resolve().name}`: {type(described.objective).__name__}, {at}, run.yaml sha256 {digest}"
        if not described.init_from:
            for name, role in described.objective.roles().items():
                weights = getattr(role.spec, "weights", None)
                pinned = f" at {revision_of(weights)}" if weights and is_hub_id(weights) else ""
                yield f"`{name}` began from {f'`{weights}`{pinned}' if weights else 'random weights'}"
            return
        run = _run_of(Path(described.init_from))
    yield f"`{run}` again"


def _run_of(path: Path) -> Path:
    """The folder of a run that a run starts from, which may be named by one of its checkpoints."""
    return path.parents[1] if (path / checkpoint.MARKER).exists() else path


def _data(described: Run) -> Iterator[str]:
    data: Any = described.data
    path = getattr(data, "path", None)
    if path is None:
        yield f"`{type(data).__name__}`, made as the run asks for it, from seed {described.seed}"
        return
    folder = Path(path)
    yield f"`{type(data).__name__}` of `{path}`"
    if (folder / store.MANIFEST).exists():
        manifest = store.read_manifest(folder)
        yield f"{manifest['samples']} samples, digest {manifest['digest']}"
        yield ", ".join(f"{count} of {size}" for size, count in manifest["buckets"].items())
        codec, text = manifest["codec"], manifest["text"]
        yield f"codec {codec['class']} sha256 {codec['sha256']}, text encoder {text['class']} sha256 {text['sha256']}"
    elif (folder / shards.HEADER).exists():
        yield f"header sha256 {_sha(folder / shards.HEADER)}"
    elif folder.is_file():
        yield f"sha256 {_sha(folder)}"


def _scores(run: Path) -> Iterator[str]:
    """What `kinema evaluate` found out about a run, where it wrote it by default."""
    file = run.parent / f"evaluate-{run.name}" / "scores.json"
    if not file.exists():
        return
    said: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")).get("scores", {})
    for name, score in said.items():
        if isinstance(score, Mapping) and isinstance(score.get("value"), int | float):
            yield f"| evaluated: {name} | {score['value']:.6g} |"


def _free(folder: Path) -> None:
    """UserError if a folder holds anything but an earlier export."""
    ours = folder / CARD
    if folder.exists() and any(folder.iterdir()) and not (ours.exists() and MARK in ours.read_text(encoding="utf-8")):
        raise UserError(f"{folder} exists and holds other things than an export; choose another folder")


def _weights(folder: Path) -> list[Path]:
    """The files of what was trained: links to parts of others are not among them."""
    inside = folder / "transformer" if (folder / "transformer").is_dir() else folder
    return sorted(file for file in inside.iterdir() if file.suffix in (".safetensors", ".pt"))


def _sha(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

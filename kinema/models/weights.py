"""Weights on disk as streams of (name, tensor): what a network is filled from and what it is exported to.

Files are memory-mapped and read tensor by tensor, so a network is never in memory twice.
"""

import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kinema import seeds
from kinema.errors import UserError
from kinema.models.hub import located

Named = Iterable[tuple[str, Tensor]]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
PARTS = ("generator_ema", "generator", "critic", "model", "state_dict", "module")  # in the order they are preferred


@dataclass(frozen=True)
class Weights:
    """Opened weight files. `shapes` knows every tensor; iterating reads them, one at a time.

    `config` is the config.json beside them and `kinema` the kinema.json, {} where there is none; those of a single file
    x.pt may be its own, x.config.json and x.kinema.json. `header` is what safetensors files say in words. `part` says
    which network of a file that holds several was taken.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    kinema: dict[str, Any]
    header: dict[str, str]
    part: str | None
    _read: Callable[[], Iterator[tuple[str, Tensor]]]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._read()


def open_weights(path: str | Path, subfolder: str = "transformer", part: str | None = None) -> Weights:
    """Opens a shipped name, a Hub id, a folder, a .safetensors or a torch file (.pt, .pth, .bin); reads headers only.

    Of a folder, `subfolder` is taken if it exists (a pipeline), else the folder itself: its *.safetensors, with or
    without an index, or its only torch file. A torch file may hold several networks: `part` names one ("generator",
    "critic"), by default the first of `PARTS` that is there. Raises UserError for files that are missing, damaged, or
    that hold more than tensors.
    """
    path = located(path, subfolder)
    if not path.exists():
        raise UserError(f"there are no weights at {path}; give a folder or a file that exists")
    if path.is_dir() and (path / subfolder).is_dir():
        path = path / subfolder
    if path.is_file() and path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no checkpoint; give a folder, or a file whose name ends in {', '.join(SUFFIXES)}")
    folder = path if path.is_dir() else path.parent
    files = _files(path) if path.is_dir() else [path]
    config, ours = (_beside(files, folder, name) for name in ("config.json", "kinema.json"))
    if all(file.suffix == ".safetensors" for file in files):
        shapes, header = _shapes(files)
        return Weights(path, shapes, config, ours, header, None, lambda: _read_safetensors(files))
    tensors, part = _open_torch(files[0], part)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(files[0], shapes, config, ours, {}, part, lambda: iter(tensors.items()))


def _beside(files: list[Path], folder: Path, name: str) -> dict[str, Any]:
    own = files[0].with_name(f"{files[0].stem}.{name}")
    return read_json(own if len(files) == 1 and own.exists() else folder / name)


def load_into(
    module: nn.Module,
    named: Named,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    source: str = "weights",
) -> nn.Module:
    """Fills `module` from a stream, parameter by parameter, and returns it.

    Parameters on the meta device come to life on `device`, as copies; others are copied into where they are. Of a
    parameter in shards only this rank's part is read, and no other memory is touched. `dtype` None keeps the module's
    own. Every tensor of the module must come exactly once and nothing else, or UserError lists what is missing and
    unexpected; `source` says in it what was read and as what.
    """
    if any(isinstance(p, DTensor) and p.is_meta for p in module.parameters()):
        module.to_empty(device=device)
    slots: dict[str, Tensor] = dict(module.named_parameters())
    kept = module.state_dict().keys()
    slots |= {name: buffer for name, buffer in module.named_buffers() if name in kept}
    aliases = _aliases(module)
    missing, unexpected = dict.fromkeys(slots), []
    for name, tensor in named:
        if name not in missing:
            unexpected.append(f"{name} (twice)" if name in slots else name)
            continue
        del missing[name]
        slot = slots[name]
        if tensor.shape != slot.shape:
            raise UserError(
                f"{source}: {name} is {list(tensor.shape)} but the network wants {list(slot.shape)}; "
                "these weights are of another size"
            )
        if slot.is_meta:
            _place(module, aliases.get(name, [name]), slot, tensor.to(device, dtype or slot.dtype, copy=True))
        elif isinstance(slot, DTensor):
            _write_part(slot, tensor)
        else:
            slot.detach().copy_(tensor)
    if missing or unexpected:
        lists = [
            f"{_first(names)} {word}" for names, word in ((missing, "missing"), (unexpected, "unexpected")) if names
        ]
        raise UserError(f"{source}: {'; '.join(lists)}; these are weights of another network or layout")
    return module


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module with tied weights under one name only, as safetensors wants it."""
    once = {name: p for name, p in module.named_parameters()}
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in module.state_dict().items() if name in once or name not in tied}


def self_made(make: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    """The weights that `make`'s network gives itself, drawn from the seed; torch's own generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.key_of(seed, "init"))
        return tensors(make())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in shards; every rank that has a part has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save(
    folder: str | Path,
    named: Named,
    files: Mapping[str, Mapping[str, Any]],
    stem: str = "model",
    max_shard: int = 5_000_000_000,
) -> Path:
    """Writes a stream as `stem`.safetensors, or as shards of at most `max_shard` bytes with an index, into `folder`.

    `files` are JSON files to put beside them, by name. The folder appears complete or not at all, in the place of an
    earlier export. Raises UserError if a folder there holds anything else, or the disk is full.
    """
    with writing(folder) as draft:
        shard, size, total, index = {}, 0, 0, []
        for name, tensor in named:
            if shard and size + tensor.nbytes > max_shard:
                index.append(_write_shard(draft, len(index), shard))
                shard, size = {}, 0
            shard[name] = owned(tensor)
            size, total = size + tensor.nbytes, total + tensor.nbytes
        index.append(_write_shard(draft, len(index), shard))
        place = {}
        for n, names in enumerate(index):
            file = f"{stem}-{n + 1:05d}-of-{len(index):05d}.safetensors" if len(index) > 1 else f"{stem}.safetensors"
            (draft / str(n)).rename(draft / file)
            place |= dict.fromkeys(names, file)
        if len(index) > 1:
            content = {"metadata": {"total_size": total}, "weight_map": place}
            (draft / f"{stem}.safetensors.index.json").write_text(json.dumps(content, indent=1))
        write_json(draft, files)
    return Path(folder)


def write_json(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file, {} where there is none. UserError if it is damaged."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); download or copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not names with values; download or copy it again")
    return content


@contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when the block ends well and else vanishes."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(not _ours(file) for file in folder.iterdir())):
        raise UserError(f"{folder} exists and holds other things than exported weights; choose another folder")
    draft, old = (folder.with_name(f".{folder.name}.{word}") for word in ("writing", "old"))
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    """The files a folder's weights are in."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise UserError(
            f"{folder} has {len(indices)} indices ({_first(i.name for i in indices)}); keep the one you mean"
        )
    if indices:
        files = sorted({folder / file for file in read_json(indices[0]).get("weight_map", {}).values()})
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(
                f"{indices[0]} lists {_first(missing)}, which {folder} lacks; download the missing files again"
            )
        if files:
            return files
    if files := sorted(folder.glob("*.safetensors")):
        return files
    files = sorted(file for suffix in SUFFIXES[1:] for file in folder.glob(f"*{suffix}"))
    if len(files) != 1:
        found = (
            f"{len(files)} torch files ({_first(f.name for f in files)})"
            if files
            else "neither safetensors nor torch files"
        )
        raise UserError(f"{folder} has {found}; give the file with the weights")
    return files


def _shapes(files: Iterable[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes of all tensors, and the files' headers as one."""
    shapes: dict[str, tuple[int, ...]] = {}
    header: dict[str, str] = {}
    for file in files:
        with _safetensors(file) as opened:
            header |= opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if name in shapes:
                    raise UserError(f"{file} repeats {name} of another file of its folder; give the file you mean")
                shapes[name] = tuple(opened.get_slice(name).get_shape())
    return shapes, header


def _read_safetensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with _safetensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_tensor(name)


def _safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or incomplete ({error}); download or copy it again") from error


def _open_torch(file: Path, part: str | None) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a torch file and the part of it they are."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is damaged, or holds more than tensors and could run code; "
            "download it again, or convert it to safetensors where you trust it"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is damaged or in torch's old format ({reason}); download or save it again") from error
    taken = None
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        choices = [name for name in PARTS if isinstance(content.get(name), dict)]
        name = part if part in content and taken is None else next(iter(choices), None)
        if name is None or (part and taken is None and name != part):
            break
        content, taken = content[name], taken or name
    if part and taken != part:
        raise UserError(f"{file} has no part {part!r}, only {_first(content)}; name one of these")
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} holds no weights, neither directly nor under {', '.join(PARTS)}; give another file")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}, taken


def _place(module: nn.Module, names: Iterable[str], slot: Tensor, value: Tensor) -> None:
    """Puts `value` where `slot` was, under all of its names."""
    made = nn.Parameter(value, requires_grad=slot.requires_grad) if isinstance(slot, nn.Parameter) else value
    for name in names:
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        if isinstance(made, nn.Parameter):
            parent.register_parameter(leaf, made)
        else:
            parent.register_buffer(leaf, made)


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by the first of them: tied weights have several."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {several[0]: several for several in names.values()}


def _write_part(slot: DTensor, tensor: Tensor) -> None:
    """Copies this rank's part of `tensor`, which is whole (and of which no more is read) or laid out like `slot`."""
    if isinstance(tensor, DTensor):
        slot.to_local().detach().copy_(tensor.to_local())
        return
    sizes, offsets = compute_local_shape_and_global_offset(slot.shape, slot.device_mesh, slot.placements)
    if all(sizes):
        part = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        slot.to_local().detach().copy_(tensor[part])


def _write_shard(draft: Path, number: int, shard: dict[str, Tensor]) -> list[str]:
    save_file(shard, draft / str(number), metadata={"format": "pt"})  # diffusers and transformers insist on the format
    return list(shard)


def owned(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous and alone in its storage, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _ours(file: Path) -> bool:
    return file.name in ("config.json", "kinema.json") or ".safetensors" in file.name or file.suffix in (".pt", ".md")


def _first(names: Iterable[str], count: int = 10) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more

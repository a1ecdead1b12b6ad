"""What a URSA network is, as values: its size, where its weights are, and the token path they were trained on.

A released pipeline keeps the path beside the transformer, in `scheduler/`: two numbers and the codebook's vectors.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.times import shifted
from kinema.diffusion.token_path import MetricPath, MixturePath, Start, TokenPath
from kinema.errors import UsageError, UserError
from kinema.models.hub import located
from kinema.models.protocols import TensorPlan
from kinema.models.ursa import fsq, layouts
from kinema.models.ursa.transformer import SIZES, URSASize, URSATransformer, initial_weights, tensor_plan
from kinema.models.weights import Weights, load_into, open_weights, owned, save


@dataclass(frozen=True)
class Metric:
    """The metric path, see `MetricPath`. `codebook` is a pipeline's folder, or the levels of an FSQ, whose vectors are
    lifted onto a sphere so that all codes differ in direction."""

    codebook: str | tuple[int, ...]
    alpha: float
    c: float
    eps: float = 1e-5

    def open(self, codes: int, device: torch.device) -> MetricPath:
        if isinstance(self.codebook, str):
            book = read_codebook(self.codebook)
        else:
            book = fsq.lifted(fsq.codebook(self.codebook))
        if len(book) != codes:
            raise UserError(
                f"the network has {codes} codes but the codebook of {self.codebook} has {len(book)}; "
                "take the path of the tokenizer it was trained with"
            )
        return MetricPath(book.to(device), self.alpha, self.c, self.eps, rows_of(codes))


@dataclass(frozen=True)
class Mixture:
    """The mixture path, see `MixturePath`: uniform noise, or [MASK]."""

    noise: Literal["uniform", "mask"] = "uniform"
    exact_count: bool = False

    def open(self, codes: int, device: torch.device) -> MixturePath:
        return MixturePath(codes, self.noise, self.exact_count)


@dataclass(frozen=True)
class URSA:
    """A URSA transformer.

    path     how its tokens were corrupted in training
    size     a name in `SIZES` or dimensions; None reads it from the weights
    weights  a pipeline's folder, the transformer's folder or a file; a Qwen3 language model to begin from; None: `seed`
    shift    warps times towards noise: the one owner of that number
    start    what a one-step student starts from
    continues  whether it knows videos with frames that are given, as all do but students distilled from prompts alone
    """

    path: Metric | Mixture
    size: URSASize | str | None = None
    weights: str | None = None
    shift: float = 1.0
    start: Start = Start()
    continues: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.size is None and self.weights is None:
            raise UsageError("URSA needs a size to start from nothing, or weights to read it from; give one of them")
        if isinstance(self.size, str) and self.size not in SIZES:
            raise UsageError(f"there is no URSA of size {self.size!r}; use {', '.join(SIZES)} or a URSASize")
        masked = isinstance(self.path, Mixture) and self.path.noise == "mask"
        if isinstance(self.size, URSASize) and masked != self.size.masked:
            raise UsageError("a masked path needs a network with a [MASK] token, and only it; set size.masked to match")

    @classmethod
    def from_pretrained(cls, folder: str) -> "URSA":
        """The spec of a pipeline's folder with what it says about itself written out. UserError where it is silent."""
        said = _settings(located(folder) / "scheduler" / "scheduler_config.json")
        ours = open_weights(folder).kinema
        needed = ("alpha", "shift") if said.get("alpha", 0) is None else ("alpha", "c", "shift", "eps")
        if missing := [key for key in needed if key not in said]:
            raise UserError(
                f"the scheduler of {folder} does not say {', '.join(missing)}; add it, it cannot be guessed"
            )
        if said["alpha"] is None:
            path: Metric | Mixture = Mixture(**ours.get("mixture", {}))
        else:
            path = Metric(folder, float(said["alpha"]), float(said["c"]), float(said["eps"]))
        spec = cls(path, weights=folder, shift=float(said["shift"]), start=_start(ours.get("start", {})))
        return replace(spec, size=spec.dimensions, continues=ours.get("continues", True))

    @property
    def dimensions(self) -> URSASize:
        """The size as numbers. Opens the weights' headers if `size` is None."""
        if isinstance(self.size, URSASize):
            return self.size
        if self.size is not None:
            return SIZES[self.size]
        opened, _ = self._open()
        return layouts.size_of(opened.shapes, {**opened.config, **opened.kinema.get("size", {})})

    def build(self) -> URSATransformer:
        with torch.device("meta"):
            return URSATransformer(self.dimensions)

    def load(self, module: nn.Module, device: torch.device | str) -> nn.Module:
        """Fills a built module with the weights, or with those `seed` makes. UserError if they do not fit."""
        if self.weights is None:
            return load_into(module, initial_weights(module, self.seed), device)
        opened, layout = self._open()
        size = self.dimensions
        source = f"{opened.path}, read as layout {layout}"
        named = layouts.to_kinema(opened, layout)
        rows = layouts.rows_of_embedding(opened.shapes)
        if layout != "kinema" and rows < size.vocabulary:
            if rows < size.words:
                raise UserError(f"{opened.path} has {rows} words, fewer than the {size.words} of this network")
            names = ("embed_tokens.weight", "lm_head.weight")
            made = {name: tensor for name, tensor in initial_weights(self.build(), self.seed) if name in names}
            named, source = layouts.from_language_model(opened, made, size.words), f"{opened.path}, a language model"
        return load_into(module, named, device, source=source)

    def read(self, module: nn.Module) -> TokenDenoiser:
        assert isinstance(module, URSATransformer)
        path = self.token_path(next(module.parameters()).device)
        return TokenDenoiser(module, module.lm_head, path, self.start, rows_of(path.codes))

    def token_path(self, device: torch.device) -> TokenPath:
        return self.path.open(self.dimensions.codes, device)

    def tensor_plan(self) -> TensorPlan:
        return tensor_plan(self.dimensions)

    def times(self, steps: int) -> tuple[float, ...]:
        """`steps` times from 1 downwards, even before the shift; 0, the end of the last step, is not listed."""
        return shifted(steps, self.shift)

    def export(
        self,
        module: nn.Module | Mapping[str, Tensor],
        folder: str | Path,
        layout: layouts.Layout = "ursa",
        dtype: torch.dtype = torch.bfloat16,
    ) -> Path:
        """Writes a network of this spec (or its state dict) as a transformer's folder, complete or not at all."""
        stem = "model" if layout == "kinema" else "diffusion_pytorch_model"
        return save(folder, self._named(module, layout, dtype).items(), self._files(), stem=stem)

    def export_file(
        self, module: nn.Module | Mapping[str, Tensor], file: Path, dtype=torch.bfloat16, card: str = ""
    ) -> Path:
        """Writes `student.pt` or `student.safetensors`: a plain state dict under the released names, which upstream
        loads strictly. Beside it are its `card`, `student.md`, and its size, which `open_weights` reads. UserError if
        one of these files exists.
        """
        words = {
            file.with_name(f"{file.stem}.{name}"): json.dumps(said, indent=1) for name, said in self._files().items()
        }
        words |= {file.with_suffix(".md"): card} if card else {}
        if there := [path for path in (file, *words) if path.exists()]:
            raise UserError(f"{there[0]} exists; give another name, or delete it")
        file.parent.mkdir(parents=True, exist_ok=True)
        state, draft = self._named(module, "ursa", dtype), file.with_name(f".{file.name}.writing")
        try:
            if file.suffix == ".safetensors":
                save_file({name: owned(t) for name, t in state.items()}, draft, metadata={"format": "pt"})
            else:
                torch.save(state, draft)
            for path, text in words.items():
                path.write_text(text, encoding="utf-8")
            draft.rename(file)
        finally:
            draft.unlink(missing_ok=True)
        return file

    def export_pipeline(
        self, module: nn.Module | Mapping[str, Tensor], source: str | Path, folder: str | Path, dtype=torch.bfloat16
    ) -> Path:
        """Writes a whole pipeline's folder: that of `source`, byte for byte, with this network as its transformer.

        Raises UserError if `source` has a tokenizer or a path of another number of codes.
        """
        source, folder = located(source), Path(folder)
        config = _settings(located(source, "vae") / "vae" / "config.json")
        codes = config.get("num_vq_embeddings")
        if codes != self.dimensions.codes:
            raise UserError(
                f"this network has {self.dimensions.codes:,} codes but the tokenizer of {source} has "
                f"{codes if codes is None else format(codes, ',')}; "
                "export into the folder of the tokenizer it was trained with"
            )
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is not empty; choose another folder")
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("transformer"), dirs_exist_ok=True)
        for part in ("vae", "tokenizer"):
            if (elsewhere := located(source, part)) != source:  # its parent has it
                shutil.copytree(elsewhere / part, folder / part)
        self.export(module, folder / "transformer", dtype=dtype)
        return folder

    def export_path(self, folder: Path) -> None:
        """Writes `folder/scheduler` with what `from_pretrained` and the public pipeline read of the token path."""
        config: dict[str, float | None] = {"alpha": None, "shift": self.shift}
        (folder / "scheduler").mkdir(parents=True, exist_ok=True)
        if isinstance(self.path, Metric):
            path = self.path.open(self.dimensions.codes, torch.device("cpu"))
            torch.save({"path.emb": path.codebook.float()}, folder / "scheduler" / "scheduler_model.pth")
            config |= {"alpha": path.alpha, "c": path.c, "eps": path.eps}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=1))

    def _named(
        self, module: nn.Module | Mapping[str, Tensor], layout: layouts.Layout, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        state = module.state_dict() if isinstance(module, nn.Module) else module
        return {layouts.from_kinema(name, layout): tensor.detach().to("cpu", dtype) for name, tensor in state.items()}

    def _files(self) -> dict[str, dict]:
        said = {name: getattr(self, name) for name in ("shift", "continues")}
        said |= {"model": "URSA", "size": asdict(self.dimensions), "start": asdict(self.start)}
        if isinstance(self.path, Mixture):
            said["mixture"] = asdict(self.path)
        return {"config.json": layouts.config_of(self.dimensions), "kinema.json": said}

    def _open(self) -> tuple[Weights, layouts.Layout]:
        assert self.weights is not None
        opened = open_weights(self.weights)
        return opened, layouts.recognise(opened.shapes)


def rows_of(codes: int) -> int:
    """How many tokens' logits are made at once: 1024, which is 256 MiB of 64,000 codes, and more of few codes, for
    which a loop would be launches alone.
    """
    return max(1024, 2**24 // codes)


def read_codebook(folder: str | Path) -> Tensor:
    """`path.emb` `[K, d]` of a pipeline's scheduler, float32, whatever it is stored as; nothing is unpickled but
    tensors.
    """
    if not (located(folder) / "scheduler").is_dir():
        raise UserError(f"{folder} has no scheduler folder with the codebook; give a whole pipeline's folder")
    opened = open_weights(folder, "scheduler")
    found = {name: tensor for name, tensor in opened if name == "path.emb"}
    if not found:
        raise UserError(f"{opened.path} holds no path.emb, only {', '.join(opened.shapes)}; it is of no metric path")
    return found["path.emb"].float()


def _start(said: Mapping) -> Start:
    mask = said.get("mask")
    return Start(tuple(mask) if isinstance(mask, list) else mask, said.get("embed_noise", 0.0))  # type: ignore[arg-type]


def _settings(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} ({error}); give a whole pipeline's folder") from error

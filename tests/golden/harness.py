"""Golden cases: what they are, how kinema answers them, and how an answer is compared.

A family is a folder with a `manifest.json` and safetensors files. A kind of case has one adapter, found by name; it is
driven by the case's config, notes and tensors, so that cases of other sizes and seeds go through it unchanged.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One case of a manifest. `id` is family/name; `tensors` are those of its own file and of its shared weights."""

    folder: Path
    entry: dict
    orders: dict[str, list[str]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.folder.name}/{self.name}"

    @property
    def name(self) -> str:
        return self.entry["name"]

    @property
    def kind(self) -> str:
        return self.entry["kind"]

    @property
    def config(self) -> dict:
        return self.entry.get("config", {})

    @property
    def optional(self) -> bool:
        return self.entry.get("optional", False)

    @property
    def order(self) -> list[str]:
        """The parameters that `grad_norms` lists, by the name the notes give."""
        notes = self.entry.get("notes") or {}
        return self.orders.get(notes.get("grad_norm_order", ""), []) if isinstance(notes, dict) else []

    def load(self) -> dict[str, Tensor]:
        """The tensors by name. Weights listed per role come as `sd.<role>.<parameter>`, as their own names collide."""
        shared = self.entry.get("weights") or []
        roles = shared if isinstance(shared, dict) else {}
        files = [self.entry["file"], *([shared] if isinstance(shared, str) else () if roles else shared)]
        tensors = {name: tensor for file in files for name, tensor in load_file(self.folder / file).items()}
        for role, file in roles.items():
            named = load_file(self.folder / file).items()
            tensors |= {f"sd.{role}.{name.removeprefix('sd.')}": tensor for name, tensor in named}
        return tensors


Adapter = Callable[[Case, dict[str, Tensor]], dict[str, Tensor]]  # case, inputs and weights → outputs, without prefixes
ADAPTERS: dict[str, Adapter] = {}


def adapter(kind: str) -> Callable[[Adapter], Adapter]:
    """Registers the one adapter of a kind."""

    def register(function: Adapter) -> Adapter:
        assert kind not in ADAPTERS, f"{kind} has two adapters"
        ADAPTERS[kind] = function
        return function

    return register


def registered(kind: str, answer: Callable[[dict, dict[str, Tensor], dict[str, Tensor], Case], dict]) -> None:
    """Registers a function of the case's config, inputs and weights, both without prefixes, and the case itself."""

    @adapter(kind)
    def run(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("in.")}
        weights = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith("sd")}
        return answer(case.config, inputs, weights, case)


def cases(folder: Path) -> list[Case]:
    found = []
    for path in sorted(folder.glob("*/manifest.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found += [Case(path.parent, entry, manifest.get("parameter_orders", {})) for entry in manifest["cases"]]
    return found


def check(case: Case, function: Adapter) -> dict[str, float]:
    """Compares every `out.*` tensor of the case with the adapter's answer; returns the largest difference of each
    group.

    Raises AssertionError for one that is missing, of another shape, or outside |a - b| <= atol + rtol·|b|. A case that
    lists no outputs is about names: its shared weights are what must come out, exactly and with nothing besides.
    """
    tensors = case.load()
    inputs = {name: tensor for name, tensor in tensors.items() if not name.startswith("out.")}
    answer = function(case, inputs)
    worst: dict[str, float] = {}
    outputs = {name: tensor for name, tensor in tensors.items() if name.startswith("out.")}
    if "outputs" in case.entry and not case.entry["outputs"]:
        named = {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")}
        assert named and answer.keys() == named.keys(), f"{case.id}: {sorted(answer.keys() ^ named.keys())}"
        different = [name for name, tensor in named.items() if not torch.equal(answer[name], tensor)]
        assert not different, f"{case.id}: {different} differ"
        return dict.fromkeys(named, 0.0)
    assert outputs, f"{case.id} has nothing to compare"
    for name, wanted in outputs.items():
        assert name.removeprefix("out.") in answer, f"{case.kind} has no answer for {name}"
        given = answer[name.removeprefix("out.")].detach()
        assert given.shape == wanted.shape, f"{name} is {tuple(given.shape)} instead of {tuple(wanted.shape)}"
        if not wanted.dtype.is_floating_point:
            # a cast would cut the fraction off an answer that should have been whole
            assert torch.equal(given.double(), wanted.double()), f"{name} differs"
            continue
        group = group_of(name, case.entry["tolerance"]["atol"])
        atol, rtol = case.entry["tolerance"]["atol"][group], case.entry["tolerance"]["rtol"]
        difference = (given.double() - wanted.double()).abs()
        within = difference <= atol + rtol * wanted.double().abs()
        assert within.all(), f"{name}: off by up to {difference.max():.2e}, {int((~within).sum())} of {within.numel()}"
        worst[group] = max(worst.get(group, 0.0), difference.max().item() if difference.numel() else 0.0)
    return worst


def group_of(name: str, groups: dict[str, float]) -> str:
    """The tolerance group of a tensor: its last component without a number at the end, or its kind of gradient."""
    parts = name.split(".")
    if parts[-1].endswith("grad_norms"):  # of one network, or `critic_grad_norms` of one among several
        return "grad_norms"
    for special in ("g_grad", "d_grad"):
        if special in parts and special in groups:
            return special
    if "grad" in parts and "gradients" in groups:
        return "gradients"
    known = [part for part in (parts[-1], re.sub(r"_?\d+$", "", parts[-1])) if part in groups]
    assert known, f"the manifest has no tolerance for {name}: {sorted(groups)}"
    return known[0]

"""What kinema says to the golden cases of the self-forcing rollout, whose noises are all recorded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import torch
from harness import Case, adapter
from torch import Tensor

from adapters.wan import causal_network, gradients, texts
from kinema.diffusion.chunks import Chunks
from kinema.diffusion.denoiser import LatentDenoiser
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.prediction import Flow
from kinema.diffusion.rollout import rollout
from kinema.diffusion.times import unwarp, warp


@dataclass(frozen=True)
class Tape:
    """A draw whose numbers were recorded: in a rollout, step i of chunk k draws from `fold(k).fold(i)`."""

    noises: dict[tuple, Tensor]
    names: tuple = ()

    def fold(self, name: int | str) -> "Tape":
        return replace(self, names=(*self.names, name))

    def normal(self, *shape: int) -> Tensor:
        noise = self.noises[self.names]
        assert noise.shape[1:] == shape
        return noise


def recorded(inputs: dict[str, Tensor]) -> Tape:
    noises = {}
    for name, tensor in inputs.items():
        kind, _, block = name.partition(".block_")
        if kind == "renoise":
            noises |= {(int(block), i): noise for i, noise in enumerate(tensor)}
        elif kind == "context_noise":
            noises[int(block), "context"] = tensor
    return Tape(noises)


def answer(config: dict, tensors: dict[str, Tensor], order: list[str], grid_context: bool = False) -> dict[str, Tensor]:
    """Latents, the interval between the exit step and the next, and gradients of sum(latents · loss_weight)."""
    inputs = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("in.")}
    module = causal_network(config, {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("sd.")})
    denoiser = LatentDenoiser(module, GaussianPath(), Flow())
    noise, exits = inputs["noise"].requires_grad_(), inputs["exit_index"].tolist()
    times = tuple((inputs["steps"].double() / 1000).tolist())
    prefix = inputs.get("prefix")
    chunks = Chunks(config["frames_per_block"], config["first_frame_alone"])
    given = 0 if prefix is None else prefix.shape[1]
    assert list(chunks.lengths(noise.shape[1], given)) == config["block_sizes"]
    graded = "loss_weight" in inputs
    cache = module.new_cache(config["num_frames"], graded=config["graded_frames"] if graded else 0)
    denoise = partial(denoiser, cond={"text": texts(inputs)})
    with torch.set_grad_enabled(graded):
        made = rollout(
            noisy_context(denoise, denoiser.path, inputs, config["shift"]) if grid_context else denoise,
            denoiser.path,
            noise,
            times,
            cache,
            chunks,
            recorded(inputs),
            exits,
            graded_frames=config["graded_frames"],
            context_noise=config["context_noise"] / 1000,
            prefix=prefix,
        )
        latents = torch.cat([*([] if prefix is None else [prefix]), *made], dim=1)
    results = {"latents": latents.detach()}
    if len(set(exits)) == 1:
        ends = [*inputs["steps"].tolist(), 0]
        unshifted = [round(1000 * unwarp(t / 1000, config["shift"])) for t in ends[exits[0] : exits[0] + 2]]
        results["interval"] = torch.tensor(unshifted)
    if graded:
        (latents * inputs["loss_weight"]).sum().backward()
        results |= gradients(module, order) | {"grad.noise": noise.grad}
    return results


def noisy_context(denoise: Callable[..., Tensor], path: GaussianPath, inputs: dict[str, Tensor], shift: float):
    """The original's slip in training: what is written carries the least noise of its grid, and is said to be clean."""
    tape = recorded(inputs)
    blocks = count()

    def denoise_and_blur(x: Tensor, t: Tensor, write: bool = False, **more) -> Tensor:
        if write:
            noise = tape.fold(next(blocks)).fold("context").normal(*x.shape[1:])
            x = path.mix(x, noise, torch.full_like(t, warp(1 / 1000, shift)))
        return denoise(x, t, write=write, **more)

    return denoise_and_blur


@adapter("self_forcing.rollout")
@adapter("self_forcing.inference")
def plain(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return answer(case.config, tensors, case.order)


@adapter("self_forcing.rollout_sink_ignored")
def sink_ignored(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the original makes of a sink in training is what kinema makes of no sink."""
    return answer({**case.config, "sink_frames": 0}, tensors, case.order)


@adapter("self_forcing.rollout_grid_context")
def grid_context(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return answer(case.config, tensors, case.order, grid_context=True)

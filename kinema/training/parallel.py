"""How a network is laid over a mesh: tensor → recompute → compile → shard, in this order and only here.

Networks know no ranks. What is laid out on the meta device is filled later, each rank reading only its own part
(`models.weights.load_into`), and the optimizer and the average work on the parts themselves (`local`).
"""

import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as recompute

from kinema.errors import UsageError
from kinema.models import layers
from kinema.models.attention import kept
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.layers import LayerNorm, RMSNorm, wide
from kinema.models.protocols import Spec, TensorPlan
from kinema.models.ursa.spec import URSA
from kinema.run import Plan
from kinema.training import context
from kinema.training.world import World

# Blocks end in a view. Nothing writes in place into what they return, so no hook is lost.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")


def check(name: str, spec: Spec, plan: Plan) -> None:
    """Raises UsageError if role `name` cannot be laid out as planned; reads no weights."""
    if plan.context > 1:
        if not isinstance(spec, CogVideoX) or spec.long is None:
            raise UsageError(
                f"run.plan.context is {plan.context}, but {name} cannot split a video over ranks; set it to 1, or give "
                "it a TTT edit"
            )
        heads = spec.long.mixer.heads_of(spec.dimensions.heads)
        if heads % plan.context:
            raise UsageError(
                f"run.plan.context is {plan.context}, which does not divide the {heads} heads of the mixer of {name}; "
                "use a divisor"
            )
    if plan.tensor == 1:
        return
    tensor = spec.tensor_plan()
    if tensor is None:
        raise UsageError(f"run.plan.tensor is {plan.tensor}, but {name} cannot be split over ranks; set it to 1")
    if tensor.heads % plan.tensor:
        raise UsageError(
            f"run.plan.tensor is {plan.tensor}, which does not divide the {tensor.heads} heads of {name}; use a divisor"
        )


def lay_out(
    module: nn.Module,
    spec: Spec,
    plan: Plan,
    world: World,
    shards: Literal["plan", "all", "none"] = "plan",
    learns: bool = True,
) -> nn.Module:
    """Prepares a module of the meta device, in place, and returns it.

    A network that does not learn gives its gathered weights back at once whatever the plan says: what stayed gathered
    would be stale after the next update of what it follows.
    """
    if plan.tensor > 1:
        assert world.mesh is not None
        tensor = spec.tensor_plan()
        assert tensor is not None, "`check` comes first"
        parallelize_module(module, world.mesh["tensor"], _styles(tensor))
    if plan.context > 1:
        assert world.mesh is not None
        context.share(module, context.ContextRanks(world.mesh["context"]))
    layers.fuse(plan.fuse)
    children = dict(module.named_children())
    blocks = list(children.get("blocks", nn.ModuleList()).children())  # a codec has none
    for block in blocks:
        if plan.recompute != "none" and learns:
            keep = _keeping(spec, plan, world) if plan.recompute == "linear" else None
            block.forward = _recomputed(block.forward, keep)
        if plan.compile:
            block.compile()
    mesh = _shards(world, shards)
    if mesh is not None:
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=plan.reshard or not learns)
        if "lm_head" in children:  # it runs after the root's own forward, in which everything else is used
            fully_shard(children["lm_head"], mesh=mesh, reshard_after_forward=True)
        # Always true for the root: after a pass without gradients it would stay gathered, and gradients of parameters
        # it owns would be lost at the next gather.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


def give_back(module: nn.Module) -> None:
    """Gives back what is still gathered: after an update it is stale."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without gradient, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(whole: Tensor, part: Tensor) -> Tensor:
    """`part` as this rank's part of a tensor laid out like `whole`."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def settle(parameters: Iterable[Tensor]) -> None:
    """Adds up gradients of which every rank of a tensor group has a share, where sharding has not done so already."""
    for p in parameters:
        if isinstance(p.grad, DTensor) and isinstance(p, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)


def gradient_norm(parameters: Iterable[Tensor], world: World) -> Tensor:
    """The norm of all gradients together `[]`, the same on every rank, by one sum over the ranks."""
    total = torch.zeros((), device=world.device)
    shares: dict[int, list[Tensor]] = {}
    for p in parameters:
        assert p.grad is not None
        shares.setdefault(_copies(p, world), []).append(local(p.grad))
    for copies, gradients in shares.items():
        total = total + nn.utils.get_total_norm(gradients).square() / copies
    return world.sum(total).sqrt()


def _copies(tensor: Tensor, world: World) -> int:
    """How many ranks hold the same numbers as this one."""
    if not isinstance(tensor, DTensor):
        return world.size
    axes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return world.size // math.prod(size for size, placement in axes if not placement.is_replicate())


def _shards(world: World, shards: str) -> DeviceMesh | None:
    """The mesh that FSDP works on: one axis, or (replicate, shard) where groups hold copies."""
    if world.mesh is None or shards == "none":
        return None
    shared = world.mesh["context"].size() > 1
    if world.copies == 1 and not shared:
        return None
    held = "shard"
    if shared:  # ranks that share a video have parts of the gradient, as others have
        held = "shard_context"
        parts = world.mesh["shard", "context"]._flatten(held)
        if world.mesh["replicate"].size() == 1:
            return parts
    elif world.mesh["replicate"].size() == 1:
        return world.mesh["shard"]
    axes = world.mesh["replicate", held]
    return axes._flatten("copies") if shards == "all" else axes


def _recomputed(forward: Callable, keep: Callable | None) -> Callable:
    context = {} if keep is None else {"context_fn": keep}

    def wrapped(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # No network here draws random numbers, so there is no generator whose state would have to be kept.
        return recompute(forward, *args, use_reentrant=False, preserve_rng_state=False, **context, **kwargs)

    return wrapped


def _keeping(spec: Spec, plan: Plan, world: World) -> Callable:
    """How what attention gave is kept: by attention itself, or, where that cannot or compiled code is to know of it,
    by torch's selective checkpointing, which looks at every operator."""
    grouped = isinstance(spec, URSA)
    other = world.device.type == "cuda" and plan.compute != "bfloat16"  # than cuDNN's and flash attention
    return partial(create_selective_checkpoint_contexts, _kept) if plan.compile or grouped or other else kept


ATTENTION = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _kept(_: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    """Keeps attention whose work grows with the square of the tokens: all but that to a short text."""
    grows = operator in ATTENTION and args[1].shape[-2] >= args[0].shape[-2]
    return CheckpointPolicy.MUST_SAVE if grows else CheckpointPolicy.PREFER_RECOMPUTE


# --- tensor ----------------------------------------------------------------------------------------------------------


def _styles(plan: TensorPlan) -> dict[str, ParallelStyle]:
    return {
        **{name: _Shared(count) for name, count in plan.shared.items()},
        **{name: _Columns() for name in plan.columns},
        **{name: _SplitNorm() for name in plan.norms},
        **{name: _HeadNorm() for name in plan.head_norms},
        **{name: _Rows() for name in plan.rows},
    }


class _Columns(ColwiseParallel):
    """A linear layer with split outputs; of a low-rank term, A is on every rank and B is split as the weight is."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for key, p in list(module.named_parameters(recurse=False)):
            _distribute(module, key, p, device_mesh, Replicate() if key == "lora_A" else Shard(0))


class _Rows(RowwiseParallel):
    """A linear layer with split inputs; of a low-rank term, A is split as the weight is and B is on every rank."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for key, p in list(module.named_parameters(recurse=False)):
            _distribute(module, key, p, device_mesh, Shard(1) if key in ("weight", "lora_A") else Replicate())


class _Shared(ParallelStyle):
    """Marks the first arguments of a module as whole on every rank, once for all layers that read them: the gradients
    of these layers are then added up before they are summed over the ranks."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def mark(module: nn.Module, args: tuple) -> tuple:
            whole = [
                None if x is None else DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
                for x in args[: self.count]
            ]
            return (*whole, *args[self.count :])

        module.register_forward_pre_hook(mark)
        return module


class _SplitNorm(ParallelStyle):
    """An RMS norm over channels that are split over the ranks: its mean square is that of all of them."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, RMSNorm)
        _distribute(module, "weight", module.weight, device_mesh, Shard(0))
        module.forward = partial(_split_norm, module, device_mesh)
        return module


def _split_norm(norm: RMSNorm, mesh: DeviceMesh, x: Tensor) -> Tensor:
    dtype = wide(x.dtype)
    wide_x, weight = x.to(dtype), norm.weight
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    mine = DTensor.from_local(wide_x.square().sum(-1, keepdim=True), mesh, [Partial()], run_check=False)
    total = mine.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    mean = total / (x.shape[-1] * mesh.size())
    return (wide_x * (mean + norm.eps).rsqrt() * weight.to(dtype)).to(x.dtype)


class _HeadNorm(ParallelStyle):
    """A norm over the channels of a head, of which every rank has some: its gradient is the sum of theirs."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, LayerNorm | RMSNorm)
        for key, p in list(module.named_parameters()):
            _distribute(module, key, p, device_mesh, Replicate())
        module.forward = partial(_head_norm, module)
        return module


def _head_norm(norm: LayerNorm | RMSNorm, x: Tensor) -> Tensor:
    dtype = wide(x.dtype)
    norm_of = F.rms_norm if isinstance(norm, RMSNorm) else F.layer_norm
    own = [_each_rank_adds(p).to(dtype) for p in norm.parameters()]  # weight, and bias of a layer norm
    return norm_of(x.to(dtype), own[0].shape, *own, eps=norm.eps).to(x.dtype)


def _each_rank_adds(p: Tensor) -> Tensor:
    """A parameter that all ranks have, for use on a part of its inputs: the gradient is the sum of theirs."""
    assert isinstance(p, DTensor)
    # the way back of the redistribution, from partial sums to what all ranks have, is what is wanted of it
    return p.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _distribute(module: nn.Module, key: str, p: Tensor, mesh: DeviceMesh, placement: Placement) -> None:
    split = distribute_tensor(p, mesh, [placement], src_data_rank=None)
    module.register_parameter(key, nn.Parameter(split, requires_grad=p.requires_grad))

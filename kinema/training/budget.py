"""What a run will need, before a GPU is taken: its own turns are taken on tensors without memory, which is counted.

The networks are laid out, the losses computed and differentiated and the optimizers stepped by the very code that
trains, as rank 0 of a job of that many processes, on torch's fake tensors. So activations, recomputation, gathered
blocks and caches are counted and not guessed. What a GPU adds is not: its context, and what its allocator cannot use.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from kinema import constants, seeds
from kinema.data.batch import Batch
from kinema.models.cache import Cache
from kinema.models.protocols import Spec
from kinema.models.wan.causal import WanCausalTransformer
from kinema.objectives.objective import Metrics, Turn
from kinema.run import Run
from kinema.seeds import Keys
from kinema.training.actor import Actor, backward
from kinema.training.parallel import local, part_of
from kinema.training.world import World

CARDS = {"H200": 140.4, "H100": 79.6, "A100": 79.2, "A100-40": 39.4, "L40S": 44.5, "4090": 23.6}  # GiB, as drivers say
CPU = torch.device("cpu")


@dataclass(frozen=True)
class RoleBudget:
    """Parameters of a role, and bytes of one rank."""

    parameters: int
    learning: int
    weights: int
    gradients: int
    moments: int
    average: int

    @property
    def held(self) -> int:
        return self.weights + self.gradients + self.moments + self.average


@dataclass(frozen=True)
class TurnBudget:
    """One turn of one rank. `peak` are the bytes alive at once, `caches` those of key-value caches after a pass.

    `tokens` (that learn) and `flops` (of the model: without recomputation) are of the whole turn, on all ranks.
    """

    role: str
    every: int
    peak: int
    caches: int
    tokens: int
    flops: int


@dataclass(frozen=True)
class Budget:
    processes: int
    roles: dict[str, RoleBudget]
    turns: tuple[TurnBudget, ...]
    checkpoint: int

    @property
    def peak(self) -> int:
        return max(turn.peak for turn in self.turns)

    @property
    def held(self) -> int:
        """What stays from step to step. Gradients do not, but some role's are there when the memory is fullest."""
        return sum(role.held - role.gradients for role in self.roles.values())


def budget(run: Run, processes: int, tell: Callable[[str], None] = lambda line: None) -> Budget:
    """Takes every turn of `run` once, without memory. UsageError for what does not fit together."""
    plan = replace(run.plan, compile=False)  # which changes neither what is alive between blocks nor what is computed
    sizes = plan.sizes(processes)
    passes, samples = run.passes(sizes[0] * sizes[1])
    tell("reading one micro-batch")
    batch = _batch(run, samples)
    tell("counting memory")
    simulated = _simulate(replace(run, plan=plan), processes, batch, passes, nullcontext())
    tell("counting operations")
    plain = replace(run, plan=replace(plan, recompute="none", replicate=1, shard=1, context=1, tensor=1))
    # Apart from the memory, as counting operations keeps tensors alive. The kernels are the CPU's, whose tensors these
    # pretend to be.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    kernels = {attention: _attention, attention_back: _attention_backward}
    counter = FlopCounterMode(display=False, custom_mapping=kernels)
    flops = [turn.flops for turn in _simulate(plain, 1, batch, 1, counter).turns]
    times = passes * sizes[0] * sizes[1]
    turns = zip(simulated.turns, flops, strict=True)
    return replace(
        simulated, turns=tuple(replace(turn, tokens=turn.tokens * times, flops=n * times) for turn, n in turns)
    )


def fits(made: Budget, card: str) -> bool:
    """Whether it fits a card, a name of `CARDS` or a number of GiB: its context and what an allocator cannot use are
    some 2 to 8 % of that."""
    return made.peak / 2**30 <= 0.92 * _gib_of(card)


def table(made: Budget, run: Run, card: str | None) -> str:
    """The budget in words and numbers; `card` is a name of `CARDS` or a number of GiB."""
    rows = [["role", "parameters", "learn", "weights", "gradients", "moments", "average", "together"]]
    for name, role in made.roles.items():
        parts = (role.weights, role.gradients, role.moments, role.average, role.held)
        rows.append([name, f"{role.parameters:,}", f"{role.learning:,}", *(_gib(n) for n in parts)])
    turns = [["turn", "at its peak", "held", "activations, gathered weights, gradients", "caches", "tokens", "TFLOP"]]
    for turn in made.turns:
        work = turn.peak - made.held - turn.caches
        name = turn.role if turn.every == 1 else f"{turn.role}, every {turn.every} steps"
        amounts = [_gib(turn.peak), _gib(made.held), _gib(work), _gib(turn.caches)]
        turns.append([name, *amounts, f"{turn.tokens:,}", f"{turn.flops / 1e12:,.1f}"])
    replicate, shard, context, tensor = run.plan.sizes(made.processes)
    lines = [
        f"{made.processes} process{'es' * (made.processes > 1)}: replicate {replicate} × shard {shard} × context "
        f"{context} × tensor {tensor}; {run.batch_size} samples a step; GiB of one rank:",
        *_columns(rows),
        "",
        *_columns(turns),
        "",
        f"a checkpoint has {_gib(made.checkpoint)} GiB, on the disk and in the ranks' host memory while it is written",
    ]
    if card is not None:
        room = f"{made.peak / 2**30:.1f} GiB of {_gib_of(card):.1f} on "
        room += f"one {card}" if card in CARDS else "a card of that size"
        if fits(made, card):
            lines.append(f"fits: {room}")
        else:
            lines.append(f"does not fit: {room}; try run.plan.recompute block, a smaller micro_batch, or more shards")
    return "\n".join(lines)


def _simulate(run: Run, processes: int, batch: Batch, passes: int, counter: Any) -> Budget:
    live = _Live()
    with ExitStack() as stack:
        stack.enter_context(_pretended(processes))
        world = World.of(run.plan, CPU, alive=False)
        constants.forget()
        stack.callback(constants.forget)
        fake = stack.enter_context(FakeTensorMode())
        stack.enter_context(live)
        fakes = Batch(
            fake.from_tensor(batch.video),
            Keys(
                fake.from_tensor(batch.keys.key),
                fake.from_tensor(batch.keys.place),
                batch.keys.count,
                batch.keys.shared,
            ),
            {name: fake.from_tensor(x) for name, x in batch.cond.items()},
            {name: fake.from_tensor(x) for name, x in batch.uncond.items()},
            batch.captions,
        )
        roles = run.objective.roles()
        actors = {name: Actor(name, role, run.plan, world, _fill) for name, role in roles.items()}
        cast = {name: actor.reading for name, actor in actors.items()} | {"memory": run.objective.memory()}
        turns = []
        for turn in run.objective.turns():
            turns.append(_take(turn, actors, cast, fakes, passes, run, live, counter))
        state = [tensor for actor in actors.values() for tensor in actor.state().values()]
        return Budget(
            processes,
            {name: _of_role(actor) for name, actor in actors.items()},
            tuple(turns),
            sum(tensor.numel() * tensor.element_size() for tensor in state),
        )


def _take(
    turn: Turn,
    actors: dict[str, Actor],
    cast: dict[str, Any],
    batch: Batch,
    passes: int,
    run: Run,
    live: "_Live",
    counter: Any,
) -> TurnBudget:
    actor, done = actors[turn.role], min(passes, 2)  # in the second pass, gradients are there already
    tokens: list[int] = []

    def note(module: nn.Module, args: tuple, options: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            tokens.append((*args, *options.values())[0].shape[:-1].numel())

    blocks = list(dict(actor.module.named_children()).get("blocks", nn.ModuleList()).children())
    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks[:1]]
    with _caches(actors.values()) as caches:

        def loss(*words: Any) -> tuple[Tensor, Metrics]:
            made = turn.loss(*words)
            live.caches = max(live.caches, sum(cache.nbytes for cache in caches))
            caches.clear()
            return made

        gc.collect()
        live.peak, live.caches = live.now, 0
        with counter:
            for _ in range(done):
                backward(replace(turn, loss=loss), cast, batch, 0, passes, run.plan)
        actor.update(0, 0)
    for hook in hooks:
        hook.remove()
    flops = counter.get_total_flops() if isinstance(counter, FlopCounterMode) else 0
    return TurnBudget(turn.role, turn.every, live.peak, live.caches, sum(tokens) // done, flops)


@contextmanager
def _caches(actors: Iterable[Actor]) -> Iterator[list[Cache]]:
    """All key-value caches that networks make meanwhile."""
    made: list[Cache] = []
    causal = [actor.module for actor in actors if isinstance(actor.module, WanCausalTransformer)]

    def noted(new_cache: Callable[..., Cache]) -> Callable[..., Cache]:
        def note(*args: Any, **options: Any) -> Cache:
            made.append(new_cache(*args, **options))
            return made[-1]

        return note

    for module in causal:
        module.new_cache = noted(module.new_cache)
    try:
        yield made
    finally:
        for module in causal:
            del module.new_cache


def _of_role(actor: Actor) -> RoleBudget:
    def size(tensors) -> int:
        return sum(local(t).numel() * t.element_size() for t in tensors)

    parameters = list(actor.module.parameters())
    learning = size(actor.learning.values())
    return RoleBudget(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in actor.learning.values()),
        size(actor.module.state_dict().values()),
        learning,
        2 * learning,
        size(actor.average.module.state_dict().values()) if actor.average else 0,
    )


def _batch(run: Run, samples: int) -> Batch:
    """The first micro-batch of the run, as its data gives it."""
    numbers = list(range(samples))
    keys = seeds.keys(run.seed, "train", numbers, numbers, run.batch_size)
    return run.data.open(run.seed, CPU)(numbers, keys)


def _fill(spec: Spec, module: nn.Module, device: torch.device) -> nn.Module:
    """Any weights. One by one, since `to_empty` cannot swap what fake tensors have a weak reference to; FSDP can."""
    if isinstance(module, FSDPModule):
        return module.to_empty(device=device)
    made: dict[Tensor, nn.Parameter] = {}
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            if p not in made:
                value = part_of(p, torch.empty(local(p).shape, dtype=p.dtype, device=device))
                made[p] = nn.Parameter(value, requires_grad=p.requires_grad)
            part.register_parameter(name, made[p])
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, torch.empty_like(buffer, device=device))
    return module


@contextmanager
def _pretended(processes: int) -> Iterator[None]:
    """A job of so many processes of which this is the first and the others are nobody."""
    if processes == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive: now, and the most since `peak` was last set."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.caches = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, made)
        return made

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def noted(storage, size):  # FSDP frees and fills what it gathers in this way, behind the dispatcher's back
            made = resize(storage, size)
            self._resized(storage, size)
            return made

        self._resize, torch.UntypedStorage.resize_ = resize, noted  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        return super().__exit__(*error)

    def _note(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta" or type(tensor).__name__ == "DTensor":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._freed, key)
            self._resized(storage, storage.nbytes())

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata in self._sizes:
            self.now += size - self._sizes[storage._cdata]
            self._sizes[storage._cdata] = size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _attention(q, k, v, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(*_per_query_head(q, k, v))


def _attention_backward(grad, q, k, v, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(_shape(grad), *_per_query_head(q, k, v))


def _per_query_head(*qkv: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of grouped attention as its work has them: every head of queries has keys and values."""
    return tuple((*_shape(qkv[0])[:2], *_shape(x)[2:]) for x in qkv)


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(getattr(x, "shape", x))  # the counter gives tensors, or has taken their shapes already


def _gib_of(card: str) -> float:
    return CARDS[card] if card in CARDS else float(card)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]

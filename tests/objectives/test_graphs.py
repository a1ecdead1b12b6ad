"""Turns as CUDA graphs: what a turn says it decides is all that it decides, and replayed turns are the plain ones."""

import gc
from dataclasses import replace

import pytest
import torch
from test_games import game
from test_games import run as played
from torch.utils._python_dispatch import TorchDispatchMode
from world import COGVIDEOX, Stories, run, token_game

from kinema.diffusion.times import PerChunk, Shifted, Stratified
from kinema.errors import UsageError
from kinema.models.cogvideox.spec import CogVideoX
from kinema.models.ttt.edit import TTT, MixerKind
from kinema.objectives.denoising import Denoising
from kinema.objectives.dmd import DMD
from kinema.objectives.gan import GAN
from kinema.objectives.objective import Role
from kinema.objectives.ode_regression import OdeRegression
from kinema.objectives.reinforce import Reinforce
from kinema.objectives.sid import SiD
from kinema.optim import Optim
from kinema.recipes.sprites_ttt import KINDS, TIMES
from kinema.run import Plan
from kinema.training import graphs
from kinema.training.actor import backward
from kinema.training.trainer import Trainer


def told_long(mixer: MixerKind):
    small = replace(COGVIDEOX, heads=2, layers=1, grid=(3, 2, 2))
    student = Role(CogVideoX(small, edits=(TTT(mixer),)), Optim())
    return run(objective=Denoising(student, times=TIMES), data=Stories(side=2), steps=4)


RUNS = {
    "denoising": lambda: run(steps=4),
    "dmd": lambda: played(game(DMD, frames=(4, 4), share_rollout=True), steps=10, micro_batch=1),
    "sid": lambda: played(game(SiD), steps=8),
    "gan": lambda: played(game(GAN, relativistic=True, r1=0.1, branch_warmup=3, share_rollout=True), steps=12),
    "ode": lambda: played(OdeRegression(student=game(DMD).student), steps=4),
    "dimo in steps": lambda: replaced(token_game(steps=10, micro_batch=2), steps_at=(1.0, 0.5)),
    **{f"long {kind}": lambda mixer=mixer: told_long(mixer) for kind, mixer in KINDS.items() if kind != "none"},
    "reinforce": lambda: replaced(token_game(Reinforce, steps=6, micro_batch=2), critic_first=1),
}


def replaced(run, **changes):
    return replace(run, objective=replace(run.objective, **changes))


class Tape(TorchDispatchMode):
    """The operations that run, with the shapes of their tensors and all other arguments."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.ops.aten.detach.default:
            self.ops.append((func, *map(told, args), *map(told, kwargs.values())))
        return func(*args, **kwargs)


def told(argument):
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.dtype
    return tuple(map(told, argument)) if isinstance(argument, list | tuple) else repr(argument)  # NaN equals itself so


@pytest.mark.parametrize("name", RUNS)
def test_turns_that_decide_the_same_run_the_same_operations(name, tmp_path):
    seen: dict = {}
    repeated = 0

    def learn(turn, cast, batch, step, passes, plan, learning):
        nonlocal repeated
        key = (turn.role, turn.first, turn.decides(batch, step))
        with Tape() as tape:
            made = backward(turn, cast, batch, step, passes, plan)
        times = seen.setdefault(key, [])
        if batch.micro == 0:  # later passes add to gradients that are there
            times.append(tape.ops)
        if len(times) > 2 and batch.micro == 0:  # constants are made the first time, which is no graph
            repeated += 1
            assert times[-1] == times[1]
        return made

    trainer = Trainer(RUNS[name](), tmp_path, torch.device("cpu"))
    trainer.graphs = learn
    trainer.train()
    assert repeated


@pytest.mark.parametrize("name", RUNS)
def test_no_autograd_graph_outlives_its_turn(name, tmp_path):
    """Else the next turn adds to gradients with its nodes, on the stream of then, which a recording refuses."""

    def learn(turn, cast, batch, step, passes, plan, learning):
        nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in learning]
        assert not any(node.metadata for node in nodes), f"{turn.role}, step {step}, micro-batch {batch.micro}"
        for node in nodes:  # a node that no graph has is made anew, without what was written on it
            node.metadata["step"] = step
        return backward(turn, cast, batch, step, passes, plan)

    trainer = Trainer(replace(RUNS[name](), steps=3), tmp_path, torch.device("cpu"))
    trainer.graphs = learn
    gc.collect()
    gc.disable()
    try:
        trainer.train()
    finally:
        gc.enable()


def test_a_turn_that_does_not_say_what_it_decides_is_refused():
    turn = Denoising(run().objective.student, times=PerChunk(Stratified(Shifted(3.0)))).turns()[0]
    with pytest.raises(UsageError, match=r"run.plan.graph: the losses of student may differ"):
        graphs.Graphs(backward)(turn, {}, None, 0, 1, Plan(), [])


def test_graphs_are_refused_where_there_is_no_cuda_device(tmp_path):
    with pytest.raises(UsageError, match=r"run.plan.graph is for one process with one CUDA device, not for the cpu"):
        Trainer(run(plan=Plan(graph=True)), tmp_path, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", RUNS)
def test_replayed_turns_equal_plain_ones(name, tmp_path):
    def trained(graph: bool):
        torch.manual_seed(0)
        plan = Plan(graph=graph)
        trainer = Trainer(replace(RUNS[name](), plan=plan), tmp_path / str(graph), torch.device("cuda"))
        trainer.train()
        return {key: value.clone() for key, value in trainer._state().items()}

    plain, replayed = trained(False), trained(True)
    for key, value in plain.items():
        torch.testing.assert_close(
            replayed[key], value, rtol=1e-4, atol=1e-5, msg=lambda told, key=key: f"{key}: {told}"
        )

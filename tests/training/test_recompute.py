"""What is computed again in the backward, and that it changes nothing."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from kinema import seeds
from kinema.bench import flops
from kinema.models.wan.spec import Wan
from kinema.models.wan.transformer import WanSize
from kinema.run import Plan
from kinema.training import parallel
from kinema.training.budget import _attention, _attention_backward
from kinema.training.world import World

SIZE = WanSize(dim=48, ffn_dim=64, heads=2, layers=3, text_dim=16, text_len=8, freq_dim=16)
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
KERNELS = {KERNEL: _attention, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}


def taken(recompute):
    """Gradients of a network under this plan, and the operations they took."""
    spec, plan = Wan(size=SIZE), Plan(recompute=recompute)
    module = parallel.lay_out(spec.build(), spec, plan, World(torch.device("cpu")))
    spec.load(module, "cpu")
    draw = seeds.keys(0, "test", [0])
    x, text = draw.normal(4, 16, 8, 8), draw.fold("text").normal(8, 16)
    with torch.no_grad():
        module.head.head.weight.fill_(0.1)
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        module(x, torch.full((1, 1), 500.0), text=text).square().mean().backward()
    return {name: p.grad for name, p in module.named_parameters()}, counter.get_total_flops()


def test_recomputing_changes_no_gradient_and_spares_what_it_keeps():
    plain, once = taken("none")
    block, twice = taken("block")
    linear, less = taken("linear")
    for grads in (block, linear):
        assert all(torch.equal(grads[name], grad) for name, grad in plain.items())
    tokens = 4 * 4 * 4
    assert once < less < twice and twice - less == flops.attention(SIZE, tokens, tokens)

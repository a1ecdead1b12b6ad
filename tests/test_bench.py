"""`kinema bench` measures what it says, tiny and on a CPU in seconds; what it counts is what is computed."""

import json

import pytest
import torch
from tiny_causal import SIZE, network, noise
from torch.utils.flop_counter import FlopCounterMode

from kinema.bench import flops
from kinema.bench.measure import Clock, Ledger, Watch, quantile
from kinema.bench.train import Training, _run, _Stage
from kinema.cli import main
from kinema.diffusion.chunks import Chunks
from kinema.models.causality import Window
from kinema.models.wan.spec import Wan
from kinema.training.budget import _attention, _attention_backward

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
KERNELS = {
    ATTENTION: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
TIMES = 2 * (SIZE.freq_dim * SIZE.dim + SIZE.dim**2 + 6 * SIZE.dim**2)  # of embedding one time


def counting():
    return FlopCounterMode(display=False, custom_mapping=KERNELS)


@pytest.mark.parametrize("what", ["stream", "vae", "train", "ttt", "dimo", "cogvideox"])
def test_every_bench_runs_tiny_on_a_cpu_and_prints_one_line_of_json(what, capsys):
    assert main(["bench", what, "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bench"] == what and told["config_hash"] and told["machine"]["torch"] == torch.__version__
    assert all(value > 0 for value in (told["ceilings"] | told["ceilings_after"]).values())
    if what in ("stream", "vae"):
        told |= told.get("diffusion", {})
        assert told["fps"] > 0 and told["steady_fps"] > 0 and len(told["block_ms"]) == 3
    if what == "stream":
        assert told["end_to_end"]["first_frames_ms"] > 0 and told["end_to_end"]["gap_p50_ms"] > 0
        assert told["last_pass"]["operators"] > 0
    if what in ("train", "ttt", "dimo", "cogvideox"):
        for turn in told["turns"].values():
            split = turn["split"]
            assert {"student", "backward", "optimizer", "rest"} <= set(split) and split["backward"] > 0
            assert sum(split.values()) == pytest.approx(turn["seconds"], abs=1e-3)
    if what == "train":
        assert set(told["turns"]) == {"student", "critic"} and len(told["turns"]["student"]["seconds_each"]) == 4
        mean = told["turns"]["student"]["seconds"] / 5 + told["turns"]["critic"]["seconds"]
        assert told["mean_iteration_s"] == pytest.approx(mean, rel=1e-2)


def test_options_that_mean_nothing_are_refused(capsys):
    assert main(["bench", "train", "--frames", "9"]) == 2
    assert "bench train has a size of its own" in capsys.readouterr().err


@pytest.mark.parametrize("window", [{}, {"window": 6, "sink": 1}])
def test_flops_of_chunks_are_those_counted(window):
    module = network(**window)
    x, t, text = noise("x", 1, 12, 4, 4, 6), torch.full((1, 1), 500.0), noise("text", 1, 12, 20)
    tokens, chunks = 6, Chunks(3)
    with torch.no_grad():
        cache, counted = module.new_cache(12), []
        for k in range(4):
            with counting() as counter:
                module(x[:, 3 * k : 3 * k + 3], t, text=text, cache=cache, write=True)
            counted.append(counter.get_total_flops())
    expected = flops.chunk_passes(SIZE, 12, tokens, chunks, Window(window.get("window"), window.get("sink", 0)))
    expected = [each + TIMES for each in expected]
    expected[0] += flops.text(SIZE)
    assert counted == expected
    assert flops.rollout([1.0, 2.0, 3.0], 4) == 24 + 3


def test_flops_of_training_are_those_counted():
    spec = Wan(size=SIZE)
    module = spec.load(spec.build(), "cpu")
    x, t, text = noise("x", 1, 3, 4, 4, 6), torch.full((1, 1), 500.0), noise("text", 1, 12, 20)
    with counting() as counter:
        made = module(x, t, text=text)
    forward = counter.get_total_flops()
    with counting() as counter:
        made.sum().backward()
    assert forward == flops.forward(SIZE, 18, 18) + flops.text(SIZE) + TIMES
    # No gradients of the text, the patches and the sinusoid, whose products are one of two.
    less = 12 * 2 * SIZE.text_dim * SIZE.dim + 18 * 2 * 4 * 4 * SIZE.dim + 2 * SIZE.freq_dim * SIZE.dim
    assert counter.get_total_flops() == flops.backward(SIZE, 18, 18) + 2 * flops.text(SIZE) + 2 * TIMES - less


def test_a_turns_steps_end_with_each_of_the_students_steps():
    stage = _Stage(_run(Training("train", "tiny")), torch.device("cpu"))
    for turn in stage.run.objective.turns():
        steps = stage.steps(turn, 2)
        assert [stage._exit(turn, step) for step in steps] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert len(set(steps)) == 8 and stage.work(turn, steps[0]) < stage.work(turn, steps[-1])


def test_time_within_a_span_counts_once():
    ledger = Ledger(Clock(torch.device("cpu")))
    with ledger.span("outer"), ledger.span("inner"):
        pass
    with ledger.span("outer"):
        pass
    assert set(ledger.read()) == {"outer"} and ledger.read() == {}
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and quantile([1.0, 2.0], 0.95) == 2.0


def test_what_slowed_a_card_is_read_from_what_its_driver_says():
    cool, hot = (
        "1980, 1980, 420.11, 700.00, 51, 0x0000000000000000\n",
        "1365, 1980, 701.5, 700.00, 84, 0x0000000000000024\n",
    )
    looks = [Watch.parsed(line) for line in (cool, hot, "1500, 1980, [N/A], 700.00, 80, 0x4\n")]
    told = Watch.told(looks)
    assert told["clocks.sm"] == [1365, 1500, 1980] and told["power.draw"] == [420.11, 701.5, 701.5]
    assert told["clocks.sm in time"] == [1980, 1365, 1500] and told["slowed by"] == {
        "power cap": 0.67,
        "heat, by software": 0.33,
    }
    assert Watch.parsed("Field is not a valid field to query.\n") is None and Watch.told([]) is None


def test_a_card_is_looked_at_meanwhile_and_nothing_of_it_without_one():
    watch = Watch(torch.device("cpu"))
    with watch:
        pass
    assert watch.read() is None
    watch._command = ["echo", "1980, 1980, 420.11, 700.00, 51, 0x4"]  # the driver's program, as it answers
    with watch:
        pass
    assert watch.read()["looks"] == 1 and watch.read()["slowed by"] == {"power cap": 1.0}

"""The command itself under torchrun: equal losses, agreement on when to stop, and an end when a rank dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kinema.training import checkpoint

pytestmark = pytest.mark.xdist_group("distributed")
TESTS = Path(__file__).parents[1]


def start(folder, *options, processes=2, **environment):
    job = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", "-m"]
        if processes
        else ["-m"]
    )
    command = [sys.executable, *job, "kinema", "train", "world:tiny", "--out", str(folder), "--device", "cpu", *options]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS / "training")])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss/student"] for row in rows}


def when(condition, seconds=180):
    """Waits until it is so; polls, as the other process is not ours to be told by."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.05)


def children(pid):
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listing.split()]


def test_two_processes_have_the_losses_of_one(tmp_path):
    jobs = [start(tmp_path / "one", processes=0), start(tmp_path / "two")]
    for job in jobs:
        _, complaints = job.communicate(timeout=120)
        assert job.returncode == 0, complaints
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() == {2, 4, 6, 8}
    assert two == pytest.approx(one, rel=1e-5)


def test_a_signal_to_one_rank_stops_all_at_one_step_with_a_checkpoint(tmp_path):
    job = start(tmp_path, "--steps", "100000", "--slowly", "0.02")
    when(lambda: checkpoint.complete(tmp_path / "checkpoints"))
    os.kill(children(job.pid)[1], signal.SIGUSR2)
    out, _ = job.communicate(timeout=180)
    assert job.returncode != 0, "it can go on, but is not done: nothing that needs it may begin"
    last = checkpoint.step_of(checkpoint.latest(tmp_path / "checkpoints"))
    assert f"stopped at step {last} of 100000" in out


def test_a_killed_rank_ends_the_job_with_a_readable_cause(tmp_path):
    job = start(tmp_path, "--steps", "100000", "--slowly", "0.02")
    when(lambda: checkpoint.complete(tmp_path / "checkpoints"))
    os.kill(children(job.pid)[1], signal.SIGKILL)
    _, complaints = job.communicate(timeout=180)  # far below any collective's own time-out
    assert job.returncode != 0
    assert "kinema: rank 0: rank 1 is gone (killed" in complaints
    assert checkpoint.latest(tmp_path / "checkpoints") is not None


def test_a_wrong_number_of_processes_is_told_once(tmp_path):
    job = start(tmp_path, "--run.plan.replicate", "3")
    _, complaints = job.communicate(timeout=180)
    assert job.returncode != 0 and not (tmp_path / "run.yaml").exists()
    said = [line for line in complaints.splitlines() if line.startswith("kinema: ")]
    assert said == [
        "kinema: rank 0: replicate 3 × shard 1 × context 1 × tensor 1 is 3, but the job has 2 processes; "
        "start another number of them, or change run.plan"
    ]

"""A run as a job: on submitit's local executor, and on a real Slurm of one node where one can be started."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cluster
import pytest

from kinema import cli
from kinema.training import checkpoint

pytestmark = pytest.mark.xdist_group("distributed")
TESTS = Path(__file__).parents[1]


@pytest.fixture
def paths(monkeypatch):
    """Lets this process and those it starts find the tests' recipe."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS / "training")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def launch(folder, *options):
    return ["launch", "world:tiny", "--out", str(folder), "--gpus-per-node", "0", "--processes-per-node", "2", *options]


def test_a_local_job_trains_on_all_its_processes(tmp_path, capsys, paths):
    assert cli.main(launch(tmp_path, "--local")) == 0
    assert "finished" in capsys.readouterr().out
    marker = checkpoint.latest(tmp_path / "checkpoints") / checkpoint.MARKER
    assert sum(name.endswith(".safetensors") for name in json.loads(marker.read_text())["files"]) == 2


def test_a_job_that_does_not_fit_is_refused_before_it_is_queued(tmp_path, capsys):
    assert cli.main(launch(tmp_path, "--nodes", "2", "--run.plan.tensor", "3")) == 2
    assert "but the job has 4 processes" in capsys.readouterr().err
    assert cli.main(launch(tmp_path, "--slurm", "account")) == 2
    assert "--slurm account is not NAME=VALUE" in capsys.readouterr().err


@pytest.mark.skipif(cluster.which("sbatch") is not None, reason="there is a Slurm")
def test_without_slurm_the_way_out_is_named(tmp_path, capsys):
    assert cli.main(launch(tmp_path)) == 1
    assert "--local" in capsys.readouterr().err


@pytest.mark.skipif(bool(cluster.missing()), reason=f"no cluster can be started: {cluster.missing()}")
def test_a_warned_job_saves_requeues_itself_and_finishes(tmp_path, paths):
    """The warning that Slurm sends before a job's time is over is sent by hand: its own may come a minute early."""
    (tmp_path / "slurm").mkdir()
    folder = tmp_path / "run"
    with cluster.cluster(tmp_path / "slurm") as environment:
        command = [sys.executable, "-m", "kinema", *launch(folder, "--cpus-per-task", "1", "--hours", "1")]
        slow = ["--steps", "120", "--slowly", "0.05"]
        said = subprocess.run([*command, *slow], env=environment, capture_output=True, text=True, timeout=60)
        assert said.returncode == 0, said.stderr
        number = said.stdout.split()[1]
        when(lambda: checkpoint.complete(folder / "checkpoints"))
        subprocess.run(["scancel", "--signal=USR2", number], env=environment, check=True)
        when(lambda: "Restarts=1" in shown(number, environment))
        saved = checkpoint.step_of(checkpoint.latest(folder / "checkpoints"))
        assert 4 <= saved < 120
        when(lambda: "JobState=COMPLETED" in shown(number, environment))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and {*range(2, 121, 2), saved} == set(steps), "each logged step once"
    assert f"going on from step {saved}" in "".join(file.read_text() for file in (folder / "jobs").glob("*.out"))


def shown(number, environment):
    return subprocess.run(["scontrol", "show", "job", number], env=environment, capture_output=True, text=True).stdout


def when(condition, seconds=240):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.1)

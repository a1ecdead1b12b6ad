"""A Slurm cluster of one node, this machine, while a test needs it: munged, slurmctld and slurmd on loopback."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")


def missing() -> str:
    """Why no cluster can be started here, or nothing."""
    absent = [name for name in PROGRAMS if which(name) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and the rest speak to the cluster."""
    host, ports = socket.gethostname().partition(".")[0], [free_port(), free_port()]
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    for part in ("state", "spool"):
        (folder / part).mkdir()
    (folder / "slurm.conf").write_text(
        f"""ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
    )
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    names = ("munge.socket", "key", "munge.log", "munge.pid", "munge.seed")
    sock, key, log, pid, seed = (str(folder / name) for name in names)
    munge = [f"--socket={sock}", f"--key-file={key}", f"--log-file={log}", f"--pid-file={pid}", f"--seed-file={seed}"]
    daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", host]]
    running = []
    try:
        for daemon in daemons:
            output = open(folder / f"{daemon[0]}.out", "w")  # noqa: SIM115  (open as long as the daemon)
            command = [which(daemon[0]) or daemon[0], *daemon[1:]]
            running.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            time.sleep(1)
        until = time.monotonic() + 60
        while "idle" not in (said := states(environment)):
            assert time.monotonic() < until, f"the node is {said!r}:\n" + "".join(
                file.read_text()[-2000:] for file in (folder / "slurmctld.log", folder / "slurmd.log") if file.exists()
            )
            time.sleep(0.5)
        yield environment
    finally:
        for process in reversed(running):
            process.kill()
            process.wait()


def states(environment: dict[str, str]) -> str:
    done = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

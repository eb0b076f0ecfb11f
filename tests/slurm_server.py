"""Starts a SLURM of one node on loopback; `python slurm_server.py` says whether it could run here.

It needs root, and neither systemd nor accounting. All its files lie in one folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")
_PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
_CONF = """\
ClusterName=loop
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory_mb} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):  # noqa: N818 - a skip's reason, no fault
    """What is missing, and the line that brings it."""


def check_programs() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        raise Unavailable(
            f"SLURM's {missing[0]} is missing; "
            "apt-get install slurm-wlm slurmctld slurmd slurm-client munge"
        )
    if os.geteuid() != 0:
        raise Unavailable("SLURM's servers start as root only")


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of SLURM's commands. Raises Unavailable where it cannot run."""
    check_programs()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 8 // 10 // 2**20
    controller, node = find_ports(2)
    conf = folder / "slurm.conf"
    conf.write_text(
        _CONF.format(
            folder=folder,
            controller=controller,
            node=node,
            cores=os.cpu_count(),
            memory_mb=memory_mb,
        )
    )
    env = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(conf)}
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
    with contextlib.ExitStack() as stack:
        # SLURM is stopped before munge.
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            stack.enter_context(running(command, folder, env))
        until = time.monotonic() + 60
        while ask(["sinfo", "-h", "-o", "%T"], env) != "idle":
            if time.monotonic() > until:
                logs = "\n".join(path.read_text()[-1000:] for path in folder.glob("*.log"))
                raise RuntimeError(f"SLURM did not start:\n{logs}")
            time.sleep(0.2)
        yield env
        subprocess.run(["scancel", "--me"], env=env, check=False)


def ask(command: list[str], env: dict[str, str]) -> str:
    """What a command prints; "no answer" if it fails."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return "no answer" if done.returncode else done.stdout.strip()


def find_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def running(command: list[str], folder: Path, env: dict[str, str]) -> Iterator[None]:
    # So that it ends even with a test run that is killed.
    tether = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    with (
        (folder / f"{command[0]}.out").open("w") as out,
        subprocess.Popen([*tether, *command], env=env, stdout=out, stderr=out) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    try:
        check_programs()
    except Unavailable as missing:
        sys.exit(f"The tests on a real SLURM will be skipped: {missing}.")

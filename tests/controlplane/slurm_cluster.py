"""A real Slurm on this host: a controller and a few nodes, all on loopback, with state of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

_CONFIG = """\
ClusterName=gem
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
MessageTimeout=3
KillWait=5
ReturnToService=2
{nodes}
PartitionName=main Nodes=gem[0-{last}] Default=YES State=UP
"""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """The cluster of the whole session, and the environment by which Slurm's commands find it."""
    if why := why_not_here():
        pytest.skip(why)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    with pytest.MonkeyPatch.context() as patch:
        try:
            cluster.start()
            patch.setenv("SLURM_CONF", str(cluster.config))
            yield cluster
        finally:
            cluster.close()


def why_not_here() -> str:
    """Says why Slurm cannot run on this machine; empty if it can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "squeue", "scancel") if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed here ({', '.join(missing)}): apt-get install slurm-wlm"
    return "" if os.geteuid() == 0 else "slurmd needs root"


class SlurmCluster:
    """Starts and ends the daemons; commands find it by ``SLURM_CONF``.

    Args:
        directory: For configuration, state and logs.
        nodes: How many, each of one processor, so that one machine fills it.
    """

    def __init__(self, directory: Path, nodes: int = 4) -> None:
        self.directory, self.nodes = directory, nodes
        self.config = directory / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        ports = _free_ports(self.nodes + 1)
        host = socket.gethostname()
        nodes = [
            f"NodeName=gem{index} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
            for index, port in enumerate(ports[1:])
        ]
        (self.directory / "state").mkdir(parents=True)
        fields = {"directory": self.directory, "controller_port": ports[0], "user": "root", "last": self.nodes - 1}
        self.config.write_text(_CONFIG.format(nodes="\n".join(nodes), **fields))
        self._spawn("slurmctld", "-D")
        for index in range(self.nodes):
            self._spawn("slurmd", "-D", "-N", f"gem{index}")
        deadline = time.monotonic() + 20
        while self.command("sinfo", "-h", "-o", "%t %D").stdout.split() != ["idle", str(self.nodes)]:
            assert time.monotonic() < deadline, self._why()
            time.sleep(0.1)

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for daemon in self._daemons:
                if daemon.poll() is None:
                    daemon.send_signal(number)
            _, alive = psutil.wait_procs(
                [psutil.Process(daemon.pid) for daemon in self._daemons if daemon.poll() is None], 5
            )
            if not alive:
                break
        for daemon in self._daemons:
            daemon.wait()
        for process in self._of_this_cluster():
            with contextlib.suppress(psutil.Error):
                process.kill()

    @property
    def controller(self) -> subprocess.Popen[bytes]:
        return self._daemons[0]

    def command(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs one of Slurm's commands as a person would."""
        environment = {**os.environ, "SLURM_CONF": str(self.config)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)

    def _spawn(self, *command: str) -> None:
        name = "-".join(word.strip("-") for word in command)
        with (self.directory / f"{name}.log").open("wb") as log:
            environment = {**os.environ, "SLURM_CONF": str(self.config)}
            self._daemons.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _why(self) -> str:
        logs = [f"{path.name}: {path.read_text()[-500:]}" for path in self.directory.glob("*.log")]
        return "Slurm did not come up\n" + "\n".join(logs)

    def _of_this_cluster(self) -> list[psutil.Process]:
        """Steps that outlived their daemon."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(self.config):
                    found.append(process)
        return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]

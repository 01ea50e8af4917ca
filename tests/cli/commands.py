"""retina-fast as people start it: in a process, or several, of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*arguments: object, processes: int = 1, module: str = "retina_fast.cli") -> list[str]:
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", module]
    return [sys.executable, "-m", *(several if processes > 1 else [module]), *map(str, arguments)]


def start(line: list[str], **variables: object) -> subprocess.Popen[str]:
    environment = ENVIRONMENT | {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(line: list[str]) -> str:
    """What the command wrote; it must have ended well."""
    done = subprocess.run(line, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def finish_as_by_srun(line: list[str], processes: int) -> str:
    """The command in the processes, and with the variables, that SLURM's srun gives it on one machine."""
    job = {"SLURM_JOB_ID": os.getpid(), "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost", "SLURM_NNODES": 1}
    job |= {"SLURM_NTASKS": processes, "SLURM_NTASKS_PER_NODE": processes, "SLURM_NODEID": 0}
    return _finish_all([start(line, SLURM_PROCID=rank, SLURM_LOCALID=rank, **job) for rank in range(processes)])


def finish_on_two_machines(*arguments: object, processes: int, module: str) -> str:
    """The command by torchrun on each of two machines, with so many processes on each; both machines are this one."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--rdzv-id={os.getpid()}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={processes}", *meeting]
    return _finish_all([start([*torchrun, "-m", module, *map(str, arguments)]) for _ in range(2)])


def _finish_all(runs: list[subprocess.Popen[str]]) -> str:
    outputs = [run.communicate()[0] for run in runs]
    assert not any(run.returncode for run in runs), "".join(outputs)
    return "".join(outputs)


def children(process: int) -> list[int]:
    """The ids of the processes that a process has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_the_name = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(after_the_name[1]) == process:
            found.append(int(entry.parent.name))
    return sorted(found)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the condition holds, or the process ends, which it must not."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)

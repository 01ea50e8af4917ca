"""Running retina-fast in processes of its own, which are forked from the test's or started by torchrun.

A forked process has nothing to import, which saves the seconds that a new interpreter needs. It cannot use CUDA.
"""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retina_fast import cli

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Forked:
    """A command in a process that is forked from this one. Its methods are those of `subprocess.Popen`.

    `module` is imported there before the command runs, and `variables` are set in its environment.
    """

    def __init__(self, arguments: tuple[object, ...], module: str = "retina_fast.cli", **variables: object) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        run = multiprocessing.get_context("fork").Process(
            target=self._run, args=(list(map(str, arguments)), module, variables)
        )
        run.start()
        self._process, self.pid, self.terminate = run, run.pid or 0, run.terminate

    def _run(self, arguments: list[str], module: str, variables: dict[str, object]) -> None:
        os.environ.update({name: str(value) for name, value in variables.items()})
        for stream in (1, 2):
            os.dup2(self._output.fileno(), stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False, buffering=1) for stream in (1, 2))  # noqa: SIM115
        importlib.import_module(module)
        cli.app(arguments)

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if timeout is not None and self.returncode is None:
            raise subprocess.TimeoutExpired("retina-fast", timeout)
        self._output.seek(0)
        return self._output.read(), None


Run = Forked | subprocess.Popen[str]


def forked_by_srun(
    *arguments: object, processes: int, module: str = "retina_fast.cli", **variables: object
) -> list[Forked]:
    """The command in forked processes that have the variables of SLURM's srun, on one machine."""
    job: dict[str, Any] = {
        "SLURM_JOB_ID": os.getpid(),
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
        "SLURM_NNODES": 1,
    }
    job |= {"SLURM_NTASKS": processes, "SLURM_NTASKS_PER_NODE": processes, "SLURM_NODEID": 0}
    job |= {"MASTER_PORT": free_port()} | variables
    ranks = range(processes)
    return [Forked(arguments, module, SLURM_PROCID=rank, SLURM_LOCALID=rank, **job) for rank in ranks]


def forked_by_torchrun(*arguments: object, machines: int, processes: int, module: str) -> list[Forked]:
    """The command in forked processes that have the variables of torchrun, `processes` on each of several machines."""
    job: dict[str, object] = {"TORCHELASTIC_RUN_ID": os.getpid(), "WORLD_SIZE": machines * processes}
    job |= {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    return [
        Forked(arguments, module, RANK=machine * processes + rank, LOCAL_RANK=rank, GROUP_RANK=machine, **job)
        for machine in range(machines)
        for rank in range(processes)
    ]


def started_by_torchrun(*arguments: object, processes: int, module: str = "retina_fast.cli", options: Any = ()) -> Run:
    """The command in new processes that torchrun starts."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", *(options or ["--standalone"])]
    line = [*torchrun, f"--nproc-per-node={processes}", "-m", module, *map(str, arguments)]
    return subprocess.Popen(line, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def started_on_two_machines(*arguments: object, processes: int, module: str) -> list[Run]:
    """The command by torchrun, started twice on this machine as if on two machines, with `processes` on each."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", f"--rdzv-id={os.getpid()}"]
    options = ["--nnodes=2", *meeting]
    return [started_by_torchrun(*arguments, processes=processes, module=module, options=options) for _ in range(2)]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as free:
        return free.getsockname()[1]


def finish(*runs: Run) -> str:
    """Wait for the processes, which must end with code 0, and return what they wrote."""
    outputs = [run.communicate()[0] for run in runs]
    assert all(run.returncode == 0 for run in runs), "".join(outputs)
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


def wait_for(condition: Callable[[], bool], run: Run) -> None:
    """Wait until the condition holds. The process must not end before."""
    while not condition():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)

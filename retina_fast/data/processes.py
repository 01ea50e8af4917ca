"""The processes of one command: a single one, or those that torchrun or SLURM's srun started.

    torchrun --nproc-per-node 8 -m retina_fast.cli train ...                                  one machine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m retina_fast.cli train ...                                                          on each of two machines
    srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 retina-fast train ...                SLURM

Each process has one GPU, or computes on the CPU of a machine without GPUs. Besides gradients, processes exchange Python
objects and numbers on the host, through gloo.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from retina_fast.data.errors import UserError


@dataclass(frozen=True)
class Processes:
    """The number of this process and how many there are.

    Attributes:
        rank: the number of this process among all of them, 0 to count - 1.
        count: how many processes there are on all machines.
        local_rank: the number of this process on its machine, 0 to local_count - 1.
        local_count: how many processes there are on this machine.
        environment: Lightning's description of the program that started them; None for a single process.

    Example::

        >>> Processes().first, list(Processes(rank=1, count=2).share(5))
        (True, [1, 3])
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    environment: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, and writes the files that only one process writes."""
        return self.rank == 0

    def share(self, length: int) -> range:
        """This process's part of the indices of a list; each index is in the part of exactly one process."""
        return range(self.rank, length, self.count)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, in the first process; an empty list in the others."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.gather_object(value, values if self.first else None)
        return values if self.first else []

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each value over the processes, in all of them."""
        if self.count == 1:
            return values
        sums = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(sums)
        return dict(zip(values, (sums / self.count).tolist(), strict=True))

    def any(self, wish: bool) -> bool:
        """Whether `wish` is true in at least one process: the same answer in all of them."""
        return self.mean({"wish": float(wish)})["wish"] > 0


ALONE = Processes()
"""The one process of a command that was not started several times."""

WORKERS = max(1, (os.cpu_count() or 1) // 2)
"""How many further processes read images, unless a caller says otherwise: half of the cores, the others compute."""


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Connects the processes that were started together for the time of the block.

    Raises:
        UserError: if a machine has fewer GPUs than processes, if SLURM was not told how many processes a machine
            has, or if another process ended too early.

    Example::

        >>> with joined() as processes:
        ...     processes.count
        1
    """
    environment = _environment()
    if environment is None or environment.world_size() == 1:
        yield ALONE
        return
    count = environment.world_size()
    machines = int(os.environ.get("SLURM_NNODES") or 1)
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE") or count // machines)  # by torchrun, or equally many a machine
    processes = Processes(environment.global_rank(), count, environment.local_rank(), local_count, environment)
    gpus = torch.cuda.device_count()
    if gpus:
        if gpus < local_count:
            raise UserError(f"{local_count} processes were started on a machine with {gpus} GPUs: start one a GPU")
        torch.cuda.set_device(processes.local_rank)
    # Reading these properties sets the variables where they are missing.
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, rank=processes.rank, world_size=processes.count)
    try:
        yield processes
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise UserError(
            f"process {processes.rank} of {processes.count} lost the others: one of them ended before its time, see "
            "what it said. A training run goes on from its last checkpoint with --resume"
        ) from error
    dist.destroy_process_group()


def _environment() -> Any:
    """Lightning's description of torchrun or srun, if one of them started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_NTASKS" not in os.environ:
        return None  # This saves the import of Lightning, which takes seconds.
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    try:
        return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None
    except RuntimeError as error:  # --ntasks was given without --ntasks-per-node.
        raise UserError(str(error)) from error

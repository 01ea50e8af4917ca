"""Kills a training run again and again and resumes it each time; it must end like a run that was left alone.

    python -m tests.train.kills --kills 20 [--processes 2]

A kill is SIGKILL to all of its processes, at a random moment of one and a half intervals. In every other life these
begin with its first new checkpoint, so that the run makes progress on a slow machine, too; in the other lives with its
first step. So a kill meets steps, validations and half-written files.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

from retina_fast import checkpoint
from tests.cli.commands import Forked, Run, children, finish, started_by_torchrun, wait_for
from tests.conftest import write_shapes

_INTERVAL = 2  # steps


def kill_and_resume(folder: Path, kills: int, processes: int, seed: int) -> list[int]:
    """The step of the newest file after each kill. Raises an AssertionError if the runs end differently."""
    json_file, images = write_shapes(folder / "shapes", count=6)
    data = ("--json", json_file, "--images", images, "--val-json", json_file, "--val-images", images)
    steps = _INTERVAL * 3 * (kills + 1)  # more than the lives that are killed reach
    size = ("--crop", 32, "--batch-size", 2, "--steps", steps, "--every", _INTERVAL, "--keep", 2, "--workers", 1)

    def start(output: Path, *more: str) -> Run:
        line = ("train", *data, *size, "--output", output, *more)
        return Forked(line) if processes == 1 else started_by_torchrun(*line, processes=processes)

    unbroken, killed = folder / "unbroken", folder / "killed"
    begun = time.monotonic()
    finish(start(unbroken))
    files = [path.stat().st_mtime for path in sorted(unbroken.glob("step-*.ckpt"))]
    interval = files[1] - files[0]
    print(f"unbroken: {steps} steps in {time.monotonic() - begun:.0f} s, {interval:.2f} s an interval", flush=True)
    rng = random.Random(seed)
    stood: list[int] = []
    while len(stood) < kills:
        run = start(killed, "--resume") if (killed / "last.ckpt").exists() else start(killed)
        _wait_until_written(killed / ("log.csv" if len(stood) % 2 else "last.ckpt"), run)
        time.sleep(rng.uniform(0, 1.5 * interval))
        _kill(run)
        stood.append(_whole(killed))
        print(f"kill {len(stood)}: at step {stood[-1]}", flush=True)
    finish(start(killed, "--resume"))
    one, other = (torch.load(output / "last.ckpt", weights_only=True) for output in (unbroken, killed))
    assert one["global_step"] == other["global_step"] == steps
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items()), key
    for name in ("model.pt", "best.pt"):
        weights = [checkpoint.load(output / name).state_dict for output in (unbroken, killed)]
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items()), name
    rows = [(output / "log.csv").read_text().splitlines() for output in (unbroken, killed)]
    assert [row.split(",")[:4] for row in rows[0]] == [row.split(",")[:4] for row in rows[1]]
    return stood


def _wait_until_written(file: Path, run: Run) -> None:
    """Waits until this life has written the file: the log, which it begins anew, or its first checkpoint."""
    begun = time.time()
    wait_for(lambda: file.exists() and file.stat().st_mtime > begun, run)


def _kill(run: Run) -> None:
    family, seen = [run.pid], 0
    while seen < len(family):  # torchrun's processes, and theirs that load images
        family += children(family[seen])
        seen += 1
    for process in family:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run.communicate()


def _whole(folder: Path) -> int:
    """The step of the newest checkpoint. Raises if a file cannot be read."""
    for name in ("model.pt", "best.pt"):
        if (folder / name).exists():
            checkpoint.load(folder / name)
    for path in folder.glob("*.ckpt"):
        torch.load(path, weights_only=True)
    last = folder / "last.ckpt"
    return torch.load(last, weights_only=True)["global_step"] if last.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(Path(folder), arguments.kills, arguments.processes, arguments.seed)
    print("the weights are equal to the last bit")


if __name__ == "__main__":
    main()

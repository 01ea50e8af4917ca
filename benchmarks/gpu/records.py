"""The file of a measurement, benchmarks/results/<device>.json: records, failures, and what they depend on."""

import datetime
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

from retina_fast.data.files import replacing

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Record:
    """One comparison of ours with a baseline.

    `ceiling_fraction` is the share of the device's limit that ours reaches: of the measured bandwidth of a copy, or of
    the measured rate of a bfloat16 product, whichever is nearer.
    """

    goal: str | None
    case: str
    dtype: str
    baseline: str
    baseline_ms: float
    ours_ms: float
    ratio: float
    ceiling_fraction: float
    peak_mb: float
    baseline_peak_mb: float
    raw_ms: dict[str, float]


@dataclass
class Failure:
    """A case without a figure, or one of its baselines; then `baseline` names it."""

    goal: str | None
    case: str
    dtype: str
    baseline: str | None
    error: str


class Results:
    """A file of records, written after each case, so that a run that is cut short can be taken up again.

    Every ratio in a file comes from one state of the code on one machine: records of another commit, device, or version
    of torch or triton are dropped when the file is read.

    Args:
        path: the file.
        environment: what :func:`environment` returns.
        earlier: a file to begin from, where `path` does not exist.
    """

    SAME = ("device", "driver", "torch", "triton", "torchvision", "commit", "dirty", "small")

    def __init__(self, path: Path, environment: dict[str, Any], earlier: Path | None = None) -> None:
        self.path, self.environment = path, environment
        self.records: list[Record] = []
        self.failures: list[Failure] = []
        source = path if path.exists() or earlier is None else earlier
        if source.exists():
            stored = json.loads(source.read_text())
            if all(stored["environment"].get(key) == environment[key] for key in self.SAME):
                self.records = [Record(**record) for record in stored["records"]]
                self.failures = [Failure(**failure) for failure in stored["failures"]]

    def knows(self, case: str, dtype: str) -> bool:
        """Returns whether there is a record or a failure of a case."""
        known: list[Record | Failure] = [*self.records, *self.failures]
        return any((entry.case, entry.dtype) == (case, dtype) for entry in known)

    def add(self, records: list[Record], failures: list[Failure]) -> None:
        """Puts what came of a case in place of what was known of it, and writes the file."""
        added: list[Record | Failure] = [*records, *failures]
        new = {(entry.case, entry.dtype) for entry in added}
        self.records = [record for record in self.records if (record.case, record.dtype) not in new] + records
        self.failures = [failed for failed in self.failures if (failed.case, failed.dtype) not in new] + failures
        goals = [(record.goal, record.baseline) for record in self.records if record.goal]
        assert len(goals) == len(set(goals)), f"a goal is claimed twice: {goals}"
        self.write()

    def write(self) -> None:
        """Writes the file, all of it or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stored = {
            "environment": self.environment,
            "records": [asdict(record) for record in self.records],
            "failures": [asdict(failure) for failure in self.failures],
        }
        with replacing(self.path) as partial:
            partial.write_text(json.dumps(stored, indent=1) + "\n")


def environment(
    device: torch.device, ceilings: dict[str, float] | None = None, commit: str | None = None, small: bool = False
) -> dict[str, Any]:
    """Returns what a figure depends on: device, versions, commit, and the ceilings that were just measured.

    Args:
        device: what is measured.
        ceilings: what :func:`benchmarks.timing.ceilings` returns.
        commit: what is measured, where the checkout lacks its .git.
        small: whether the shapes are the small ones.
    """

    def git(*arguments: str) -> str | None:
        return _output("git", "-C", str(ROOT), *arguments)

    import triton

    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "driver": driver.splitlines()[0] if driver else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "torchvision": torchvision.__version__,
        "commit": git("rev-parse", "HEAD") or commit,
        "dirty": None if changes is None else bool(changes),
        "small": small,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **{name: float(f"{value:.4g}") for name, value in (ceilings or {}).items()},
    }


def _output(*command: str) -> str | None:
    """Returns what a program prints, or None where it is missing or fails."""
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None

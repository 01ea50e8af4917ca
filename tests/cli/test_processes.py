"""Several processes, which communicate by gloo, train, evaluate and detect with the results of one process."""

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from retina_fast import cli
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.data.processes import Processes, joined
from retina_fast.train import TrainSettings, train
from retina_fast.train.detector import Detector
from retina_fast.train.loaders import StepSampler
from retina_fast.train.start import starting_network
from tests.cli.commands import (
    Forked,
    children,
    finish,
    forked_by_srun,
    forked_by_torchrun,
    started_by_torchrun,
    started_on_two_machines,
    wait_for,
)
from tests.conftest import write_shapes

STEPS = 8
DOUBLE = "tests.train.double"


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Any, ...]:
    """Images of which every second has no object, so that some processes have a step without one."""
    json_file, images = write_shapes(tmp_path_factory.mktemp("processes") / "shapes", count=11)
    content = json.loads(json_file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 2]
    json_file.write_text(json.dumps(content))
    return ("--json", json_file, "--images", images)


def training(data: tuple[Any, ...], output: Path, every: int = 4) -> tuple[Any, ...]:
    size = ("--crop", 32, "--batch-size", 4, "--steps", STEPS, "--workers", 0, "--no-bf16", "--keep", 9)
    return ("train", *data, *size, "--every", every, "--output", output)


@pytest.fixture(scope="module")
def run_by(data, tmp_path_factory) -> Callable[[int], Path]:
    """The folder of the same run by one process, by two as of srun, or by four as of torchrun on two machines.

    All are forked, since srun and torchrun differ for them only in the variables that they set.
    """

    @functools.cache
    def folder_of(count: int) -> Path:
        folder = tmp_path_factory.mktemp("runs") / str(count)
        line = training(data, folder)
        if count == 1:
            finish(Forked(line, DOUBLE))
        elif count == 2:
            finish(*forked_by_srun(*line, processes=2, module=DOUBLE))
        else:
            finish(*forked_by_torchrun(*line, machines=2, processes=count // 2, module=DOUBLE))
        return folder

    return folder_of


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=True, mmap=True)  # else a look at the step reads 100 MB


def assert_close(one: Path, several: Path) -> None:
    """Asserts that two runs in float64 differ by rounding only."""
    a, b = state(one), state(several)
    assert a["global_step"] == b["global_step"] == STEPS
    for key in ("state_dict", "current_model_state"):
        for name, value in a[key].items():
            assert value.isfinite().all()
            torch.testing.assert_close(b[key][name], value, rtol=1e-7, atol=1e-9, msg=f"{key} {name}")
    rows = [(folder / "log.csv").read_text().splitlines()[1:] for folder in (one, several)]
    for row, other in zip(*rows, strict=True):
        assert list(map(float, row.split(",")[:4])) == pytest.approx(list(map(float, other.split(",")[:4])))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_weights_of_one(run_by, count):
    assert_close(run_by(1), run_by(count))


@pytest.mark.slow
def test_torchrun_on_two_machines_gives_the_weights_of_one(data, run_by, tmp_path):
    finish(*started_on_two_machines(*training(data, tmp_path), processes=2, module=DOUBLE))
    assert_close(run_by(1), tmp_path)


def test_a_run_is_resumed_by_another_number_of_processes(data, run_by, tmp_path):
    shutil.copy(run_by(2) / "step-00000004.ckpt", tmp_path / "last.ckpt")
    shutil.copy(run_by(2) / "log.csv", tmp_path / "log.csv")
    finish(Forked((*training(data, tmp_path), "--resume"), DOUBLE))
    assert_close(run_by(1), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["srun", "torchrun"])
def test_processes_that_are_killed_or_stopped_are_resumed_to_the_same_weights(by, data, run_by, tmp_path):
    """One of two processes is killed. The run is resumed and stopped, and then resumed to its end."""
    line = training(data, tmp_path, every=2)
    torchrun = by == "torchrun"
    run, *others = (
        [started_by_torchrun(*line, processes=2, module=DOUBLE)]
        if torchrun
        else forked_by_srun(*line, processes=2, module=DOUBLE)
    )
    wait_for((tmp_path / "last.ckpt").exists, run)
    os.kill(children(run.pid)[-1] if torchrun else others[0].pid, signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode
    # torchrun has its own summary: it may stop the other process before that has noticed.
    told = (
        "Signal 9 (SIGKILL)" if torchrun else "error: process 0 of 2 lost the others: one of them ended before its time"
    )
    assert told in " ".join(output.split())
    saved = state(tmp_path)["global_step"]
    assert 2 <= saved < STEPS

    both = forked_by_srun(*line, "--resume", processes=2, module=DOUBLE)
    wait_for(lambda: state(tmp_path)["global_step"] > saved, both[0])
    for process in both:
        process.terminate()
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [130, 130], outputs
    assert "Stopped and saved. To go on, give the same command with --resume" in " ".join(outputs[0].split())
    assert saved < state(tmp_path)["global_step"] < STEPS
    finish(*forked_by_srun(*line, "--resume", processes=2, module=DOUBLE))
    one, other = state(run_by(2)), state(tmp_path)
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items())


def test_the_batches_of_a_step_are_shared_without_overlap_or_loss(data):
    dataset = CocoDataset(data[1], data[3])
    settings = TrainSettings("retinanet_resnet18_fpn_lite", steps=6, batch_size=8, crop=64).resolve(dataset)
    network, about = starting_network(settings, dataset)

    def keys(count: int, rank: int) -> list[list[tuple[int, int]]]:
        module = Detector(network, about, settings, Processes(rank, count))
        return list(StepSampler(module, dataset))

    whole = keys(1, 0)
    for count in (2, 4, 8):
        shares = [keys(count, rank) for rank in range(count)]
        assert [list(chain(*step)) for step in zip(*shares, strict=True)] == whole
    seen = list(chain(*whole))
    assert sorted(seen[: len(dataset)]) == [(0, index) for index in range(len(dataset))]


def test_a_batch_that_cannot_be_shared_evenly_is_refused(data, tmp_path):
    dataset = CocoDataset(data[1], data[3])
    settings = TrainSettings("retinanet_resnet18_fpn_lite", steps=6, batch_size=6, crop=64)
    with pytest.raises(UserError, match=r"--batch-size 6 is of all 4 processes together.*multiple of 4, at least 4"):
        train(settings, dataset, output=tmp_path, workers=0, processes=Processes(0, 4))


def test_slurm_must_say_how_many_processes_a_machine_has(monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"--ntasks-per-node"), joined():
        pass


@pytest.mark.slow
def test_evaluate_and_detect_by_two_processes_equal_one(data, run_by, tmp_path):
    model = ("--checkpoint", run_by(1) / "model.pt")
    missing = Path(data[3]).parent / "missing.txt"
    missing.write_text(f"{data[3]}/none.png\n")
    folders = {count: tmp_path / str(count) for count in (1, 2)}
    found = ("detect", missing, data[3], *model, "--score", 0.02, "--workers", 0, "--output")
    measured = ("evaluate", *data, *model, "--workers", 0)
    here = CliRunner()
    one = here.invoke(cli.app, list(map(str, measured))).output
    assert one.splitlines()[-1].startswith("AP50")
    two = finish(*forked_by_srun(*measured, processes=2))
    assert one in two
    assert two.count("AP50 ") == one.count("AP50 ")
    outputs = [here.invoke(cli.app, [*map(str, found), str(folders[1])]).output]
    outputs += [finish(*forked_by_srun(*found, folders[2], processes=2))]
    assert all("1 of 12 images could not be read" in output for output in outputs)
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders.values()]
    assert files[0] == files[1]
    assert set(files[0]) == {"detections.json", *(f"{index}.jpg" for index in range(11))}
    coco = json.loads(files[0]["detections.json"])
    assert [image["id"] for image in coco["images"]] == list(range(2, 13))
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    assert len(coco["annotations"]) > 11

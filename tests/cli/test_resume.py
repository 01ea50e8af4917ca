"""`retina-fast detect --resume`: runs that are killed with SIGKILL, and what the next one makes of their files."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.io import write_png
from typer.testing import CliRunner

from retina_fast import cli
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.errors import ImageError, UserError
from retina_fast.data.processes import Processes
from retina_fast.predict import detect as module
from retina_fast.predict.detect import detect
from retina_fast.predict.parts import Parts
from retina_fast.predict.pictures import Picture, Read

CONTENT = Checkpoint("", {}, ["thing"], [7], {})
COUNT = 9

pytestmark = pytest.mark.usefixtures("one_thread")


class Finder(nn.Module):
    """Finds a box in every image, as wide as its first pixel is bright, and counts the images that it sees."""

    seen = 0
    die_after: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        self.seen += len(images)
        if self.die_after is not None and self.seen > self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        boxes = [torch.tensor([[0.0, 0, float(image[0, 0, 0]) * 255, 4]]) for image in images]
        return [{"boxes": box, "scores": torch.tensor([0.5]), "labels": torch.zeros(1).long()} for box in boxes]


class Share(Processes):
    """One of several processes that run one after another here, so that none waits for another."""

    def any(self, wish: bool) -> bool:
        return wish

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for i in range(1, COUNT + 1):
        write_png(torch.full((3, 16, 16), i, dtype=torch.uint8), str(tmp_path / "photos" / f"{i}.png"))
    return tmp_path / "photos"


def run(photos: Path, output: Path, resume: bool = True, **options: Any) -> tuple[int, dict[str, Any]]:
    """How many images a run looked at, and what it wrote."""
    finder = Finder()
    detect(finder, CONTENT, [photos], output, 0.1, workers=0, resume=resume, **options)
    assert not list(output.glob("*.partial"))
    return finder.seen, json.loads((output / "detections.json").read_text())


def killed(work: Callable[[], object]) -> None:
    """Does work in a process that kills itself."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def kill_run(photos: Path, output: Path, after: int, **options: Any) -> None:
    finder = Finder()
    finder.die_after = after
    killed(lambda: detect(finder, CONTENT, [photos], output, 0.1, workers=0, **options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("resume_first", [True, False])
def test_a_run_that_was_killed_goes_on(photos, tmp_path, resume_first):
    """Also twice; and it writes, byte for byte, what one run writes."""
    kinds = ("coco", "csv", "yolo", "html")
    _, whole = run(photos, tmp_path / "whole", kinds=kinds)
    output = tmp_path / "out"
    kill_run(photos, output, 4, resume=resume_first, kinds=kinds)
    assert not (output / "detections.json").exists()
    kill_run(photos, output, 2, resume=True, kinds=kinds)
    seen, found = run(photos, output, kinds=kinds)
    assert (seen, found) == (COUNT - 6, whole)
    assert contents(output) == contents(tmp_path / "whole")


def test_without_resume_a_run_begins_anew(photos, tmp_path):
    kill_run(photos, tmp_path / "out", 4, resume=True)
    assert list((tmp_path / "out").glob("*.partial"))
    assert run(photos, tmp_path / "out", resume=False)[0] == COUNT


def test_without_resume_no_process_takes_up_rows_that_the_first_one_deletes(photos, tmp_path):
    output, met = tmp_path / "out", []
    options: Any = {"workers": 0, "tile": 8, "overlap": 0.0}

    class Second(Share):
        def any(self, wish: bool) -> bool:
            met.append(wish)
            for file in output.glob("*.partial") if len(met) == 2 else []:  # as late as the first one may be
                file.unlink()
            return wish

    finder = Finder()
    finder.die_after = 3
    killed(lambda: detect(finder, CONTENT, [photos], output, 0.1, processes=Share(1, 2), **options))
    assert list(output.glob("tiles.*.partial"))
    assert detect(Finder(), CONTENT, [photos], output, 0.2, processes=Second(1, 2), **options) is None


def test_a_finished_run_leaves_nothing_to_go_on_from(photos, tmp_path):
    assert [run(photos, tmp_path / "out")[0] for _ in range(2)] == [COUNT, COUNT]


def test_a_line_that_was_not_finished_counts_as_not_written(photos, tmp_path):
    output = tmp_path / "out"
    kill_run(photos, output, 4)
    (part,) = output.glob("detections.1.0.partial")
    part.write_bytes(part.read_bytes()[:-7])
    assert run(photos, output)[0] == COUNT - 3
    kill_run(photos, output, 4)
    part.write_bytes(part.read_bytes()[:20])  # not even the first
    assert run(photos, output)[0] == COUNT


def test_images_that_are_others_now_are_detected_in_again(photos, tmp_path):
    """One is added before all others, so that every number changes; one has changed, one is gone, one was drawn and the
    picture deleted."""
    output = tmp_path / "out"
    kill_run(photos, output, 5)
    write_png(torch.full((3, 16, 16), 99, dtype=torch.uint8), str(photos / "0.png"))
    write_png(torch.full((3, 16, 16), 77, dtype=torch.uint8), str(photos / "2.png"))
    (photos / "3.png").unlink()
    (output / "4.jpg").unlink()
    seen, found = run(photos, output)
    assert seen == COUNT - 2  # 1 and 5 were kept
    assert [image["id"] for image in found["images"]] == list(range(1, COUNT + 1))
    assert [box["bbox"][2] for box in found["annotations"]] == [99, 1, 77, 4, 5, 6, 7, 8, 9]
    assert (output / "4.jpg").exists()


def test_another_number_of_processes_goes_on(photos, tmp_path):
    output = tmp_path / "out"
    for rank in range(2):
        kill_run(photos, output, 2, processes=Share(rank, 2), resume=True)
        assert list(output.glob(f"detections.*.{rank}.partial"))
    seen, found = run(photos, output)
    assert seen == COUNT - 4
    assert [box["bbox"][2] for box in found["annotations"]] == list(range(1, COUNT + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tile": 8},
            r"is of a run with another tile \(None, not 8\); give the same, or leave out --resume",
        ),
        ({"kinds": ("html",)}, r"another choice of html \(False, not True\)"),
        ({"model": Finder()}, "another model; give the same"),
        ({"content": replace(CONTENT, classes=["other"])}, r"another list of classes \(\['thing'\], not \['other'\]\)"),
        ({"score": 0.2}, r"detections\.1\.0\.(kept\.)?partial: is of a run with another score \(0\.1, not 0\.2\)"),
    ],
)
def test_a_run_with_other_options_is_refused(photos, tmp_path, options, message):
    kill_run(photos, tmp_path / "out", 4)
    before = contents(tmp_path / "out")
    given = {"model": Finder(), "content": CONTENT, "score": 0.1} | options
    with torch.no_grad():
        given["model"].weight += "model" in options
    with pytest.raises(UserError, match=message):
        detect(given.pop("model"), given.pop("content"), [photos], tmp_path / "out", workers=0, resume=True, **given)
    assert contents(tmp_path / "out") == before


def test_damaged_files_are_named_and_foreign_ones_stay(photos, tmp_path):
    output = tmp_path / "out"
    kill_run(photos, output, 4)
    (part,) = output.glob("detections.1.0.partial")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text(lines[0] + '{"id": 1}\n' + "".join(lines[1:]))
    with pytest.raises(UserError, match=r"detections\.1\.0\.partial: is damaged; delete it, or leave out --resume"):
        run(photos, output)
    part.unlink()
    (output / "detections.7.0.partial").write_text("somebody's\n")
    (output / "tiles.mine.partial").write_text("somebody's\n")
    detect(Finder(), CONTENT, [photos], output, 0.1, workers=0)
    assert {file.name for file in output.glob("*.partial")} == {"detections.7.0.partial", "tiles.mine.partial"}


def test_rows_of_tiles_go_on(photos, tmp_path):
    """A picture of five rows of tiles, of which two are finished, between two that are whole."""
    large = torch.arange(90, dtype=torch.uint8)[None, :, None].expand(3, 90, 16).contiguous()
    output = tmp_path / "out"
    options: Any = {"tile": 16, "overlap": 0.0}
    shutil.rmtree(photos)
    photos.mkdir()
    for name, image in (("a", large[:, :16]), ("b", large), ("c", large[:, 16:32])):
        write_png(image.contiguous(), str(photos / f"{name}.png"))
    _, whole = run(photos, tmp_path / "whole", **options)
    kill_run(photos, output, 3, **options)
    seen, found = run(photos, output, **options)
    assert (seen, found) == (8 - 3, whole)
    kill_run(photos, output, 3, **options)
    with pytest.raises(UserError, match=r"another tile \(16, not 32\)"):
        run(photos, output, tile=32, overlap=0.0)
    assert run(photos, output, resume=False, **options)[0] == 8


def test_rows_of_tiles_stay_until_the_picture_is_drawn(photos, tmp_path, monkeypatch):
    """Drawing a large raster takes minutes, too: a run that is killed then has all rows."""
    output = tmp_path / "out"
    options: Any = {"tile": 8, "overlap": 0.0}
    for i in range(3, COUNT + 1):
        (photos / f"{i}.png").unlink()

    def draw(image, *_):
        if image[0, 0, 0] == 2:
            assert len(list(output.glob("tiles.*"))) == 1
            raise KeyboardInterrupt
        return image

    with monkeypatch.context() as patch:
        patch.setattr(module, "draw_detections", draw)
        with pytest.raises(KeyboardInterrupt):
            run(photos, output, **options)
    seen, found = run(photos, output, **options)
    assert (seen, len(found["images"])) == (0, 2)


def test_a_picture_that_comes_twice_has_two_files_of_rows(tmp_path):
    picture = Picture("a.png", lambda: Read(torch.zeros(3, 4, 4)), "photos/a.png")
    parts = Parts(tmp_path, {}, resume=True, rank=0)
    assert parts.rows(picture, "a", [1, 2]) == parts.rows(picture, "a", [1, 2])
    assert len({parts.rows(picture, name, [1, 2]) for name in ("a", "a_2")}) == 2
    assert parts.rows(picture, "a", None) is None  # a URL, which may give another picture next time


def test_no_process_leaves_rows_of_a_picture_that_it_could_not_read_to_the_end(photos, tmp_path):
    class Failing(Finder):
        def forward(self, images):
            if self.seen == 3:
                self.seen += 1
                raise ImageError("2.png: damaged")
            return super().forward(images)

    output = tmp_path / "out"
    processes = Share(1, 2)
    detect(Failing(), CONTENT, [photos], output, 0.1, tile=8, overlap=0.0, workers=0, processes=processes)
    assert "2.png: damaged" in (output / "detections.1.1.partial").read_text()
    assert not list(output.glob("tiles.*"))


@pytest.mark.parametrize("resume", [True, False])
def test_after_ctrl_c_files_stay_only_for_resume(photos, tmp_path, monkeypatch, resume):
    output = tmp_path / "out"
    drawn = module.write_picture
    for i in range(3, COUNT + 1):
        (photos / f"{i}.png").unlink()

    def stop(image, file, partial):
        if file.name == "2.jpg":
            partial.write_bytes(b"half")
            raise KeyboardInterrupt
        drawn(image, file, partial)

    monkeypatch.setattr(module, "write_picture", stop)
    arguments = ["detect", str(photos), "--output", str(output), "--workers", "0", "--tile", "800"]
    result = CliRunner().invoke(cli.app, [*arguments, *["--resume"] * resume])
    assert result.exit_code == 130
    assert ("out keeps what was found: the same command goes on" in result.output) == resume
    assert bool(list(output.glob("detections.*.partial"))) == resume
    assert not list(output.glob("picture.*"))
    assert resume or not list(output.glob("*.partial"))
    monkeypatch.undo()
    result = CliRunner().invoke(cli.app, [*arguments, "--resume"])
    assert result.exit_code == 0
    assert len(json.loads((output / "detections.json").read_text())["images"]) == 2
    assert not list(output.glob("*.partial"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("0", "a camera or stream shows nothing twice: leave out --resume"),
        ("", "source is an empty word: give a path, or . for the folder"),  # as of a variable that is not set
    ],
)
def test_sources_from_which_no_run_goes_on(tmp_path, source, message):
    with pytest.raises(UserError, match=message):
        detect(Finder(), CONTENT, [source], tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()

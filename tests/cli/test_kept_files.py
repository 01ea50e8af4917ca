"""More files that no command may replace: by links, in other folders than the one given, and of earlier runs."""

import json
import os
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from examples import detect_folder
from retina_fast.data.errors import UserError
from retina_fast.data.outputs import check_folder, save_plot
from retina_fast.deploy.bench import bench
from retina_fast.predict.load import TREES
from retina_fast.train import TrainSettings, train
from retina_fast.train.resume import check_new_run, set_aside
from tests.cli.test_outputs import photo, problem
from tests.conftest import write_shapes
from tests.data.fuzz import XML, write_pictures


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def voc(tmp_path) -> Path:
    """A folder of Pascal VOC files, with a list of its images."""
    root = tmp_path / "voc"
    write_pictures(root / "JPEGImages", 2)
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for number in range(2):
        (root / "Annotations" / f"p{number}.xml").write_text(XML.format(file=f"p{number}.png"))
    (root / "ImageSets" / "Main" / "train.txt").write_text("p0\np1\n")
    return root


PLOTS = {
    "by its path": lambda root, picture: picture,
    "up and down": lambda root, picture: root / "Annotations" / ".." / "JPEGImages" / picture.name,
    "by a hard link": lambda root, picture: _linked(os.link, picture, root.parent / "plot.png"),
    "by a link": lambda root, picture: _linked(os.symlink, picture, root.parent / "plot.png"),
    "by a linked folder": lambda root, picture: _linked(os.symlink, root, root.parent / "other") / "JPEGImages/p0.png",
}


def _linked(link, old: Path, new: Path) -> Path:
    link(old, new)
    return new


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("command", ["check", "evaluate"])
def test_a_plot_replaces_no_image_of_a_list(command, name, voc):
    before = contents(voc)
    plot = PLOTS[name](voc, voc / "JPEGImages" / "p0.png")
    listed = voc / "ImageSets" / "Main" / "train.txt"
    assert "p0.png, which is read" in problem(command, *(["--voc"] * (command != "check")), listed, "--plot", plot)
    assert contents(voc) == before


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_plot_does_not_replace_the_model(link, tmp_path):
    json_file, images = write_shapes(tmp_path / "shapes", count=1)
    shutil.copy(TREES, tmp_path / "m.pt")
    link(tmp_path / "m.pt", tmp_path / "m.png")
    data = ("--json", json_file, "--images", images, "--checkpoint", tmp_path / "m.pt")
    assert "m.pt, which is read" in problem("evaluate", *data, "--plot", tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes() == TREES.read_bytes()


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_plot_takes_the_place_of_a_link_and_not_of_what_it_leads_to(link, tmp_path):
    old = photo(tmp_path / "old.png")
    link(tmp_path / "old.png", tmp_path / "newest.PNG")
    save_plot(Figure(), tmp_path / "newest.PNG")
    assert (tmp_path / "old.png").read_bytes() == old
    with Image.open(tmp_path / "newest.PNG") as picture:
        assert picture.format == "PNG"
    assert sorted(os.listdir(tmp_path)) == ["newest.PNG", "old.png"]


def test_export_onto_a_hard_link_of_its_checkpoint(tmp_path):
    shutil.copy(TREES, tmp_path / "trees.pt")
    os.link(tmp_path / "trees.pt", tmp_path / "trees.onnx")
    (tmp_path / "folder").symlink_to(tmp_path)
    for output in ("trees.onnx", "folder/trees.onnx", "folder/./trees.pt", "trees.pt/"):
        error = problem("export", tmp_path / "trees.pt", "--size", "64x64", "--output", f"{tmp_path}/{output}")
        assert "would replace" in error
    assert (tmp_path / "trees.pt").read_bytes() == TREES.read_bytes()


@pytest.mark.parametrize("content", ['{"benchmarks": []}', "[]", "7", "no JSON", ""])
@pytest.mark.parametrize("name", ["bench.json", "bench.png"])
def test_bench_replaces_nobodys_file(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: is of no earlier bench; give another folder as --output"):
        bench(None, [], [1], 1, tmp_path, "model", Console(quiet=True))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


def test_a_folder_is_looked_at_and_not_made(tmp_path):
    check_folder(tmp_path / "a" / "b", ["c.json"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "to_nothing").symlink_to(tmp_path / "nothing")
    for folder in ("to_nothing", "to_nothing/below"):
        with pytest.raises(UserError, match=r"cannot be written into \(No such file or directory\)"):
            check_folder(tmp_path / folder)
    (tmp_path / "c.json").mkdir()
    with pytest.raises(UserError, match=r"c\.json: is a folder"):
        check_folder(tmp_path, ["c.json"])


def test_what_is_refused_leaves_no_folder(tmp_path):
    photo(tmp_path / "in" / "a.png")
    model = ("--checkpoint", tmp_path / "none.pt")
    assert "no such model file" in problem("detect", tmp_path / "in", *model, "--output", tmp_path / "out")
    assert "exclude each other" in problem("bench", *model, "--model", "x", "--output", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


# A run that was killed in its first interval


@pytest.fixture
def killed(tmp_path) -> dict[str, bytes]:
    files = {
        "log.csv": b"step,classification\n500,0.5\n",
        "model.pt": b"model",
        "best.pt": b"best",
        "loss.png": b"loss",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return files


def test_its_files_get_other_names(killed, tmp_path):
    (tmp_path / "best.1.pt").write_bytes(b"somebody's")
    check_new_run(tmp_path)
    assert contents(tmp_path) == killed | {"best.1.pt": b"somebody's"}  # looking changes nothing
    with pytest.warns(
        UserWarning, match=r"left no checkpoint are now model\.2\.pt, best\.2\.pt, log\.2\.csv, loss\.2\.p"
    ):
        set_aside(tmp_path)
    renamed = {name.replace(".", ".2.", 1): content for name, content in killed.items()}
    assert contents(tmp_path) == renamed | {"best.1.pt": b"somebody's"}


def test_a_new_run_begins_in_its_place(killed, tmp_path):
    from retina_fast.data.coco import CocoDataset

    (tmp_path / "last.ckpt.12345.partial").write_bytes(b"half")
    (tmp_path / "photos.partial").write_bytes(b"somebody's")
    data = CocoDataset(*write_shapes(tmp_path / "data", count=2))
    settings = TrainSettings("retinanet_resnet18_fpn_lite", steps=1, batch_size=1, crop=32, weights_backbone="none")
    with pytest.warns(UserWarning, match=r"are now model\.1\.pt"):
        train(settings, data, output=tmp_path, workers=0)
    found = contents(tmp_path)
    assert all(found[name.replace(".", ".1.", 1)] == content for name, content in killed.items())
    assert len(found["model.pt"]) > 1000
    assert not any(name.startswith("last.ckpt.") for name in found)
    assert found["photos.partial"] == b"somebody's"


def test_nothing_of_it_is_moved_where_the_new_run_is_refused(killed, tmp_path):
    json_file, images = write_shapes(tmp_path / "data", count=2)
    line = ("train", "--json", json_file, "--images", images, "--crop", 64, "--steps", 1, "--workers", 0)
    assert "no such model file" in problem(*line, "--checkpoint", tmp_path / "none.pt", "--output", tmp_path)
    assert {name: content for name, content in contents(tmp_path).items() if "/" not in name} == killed


def test_with_a_checkpoint_it_is_resumed_and_without_a_log_nothing_is_its(killed, tmp_path):
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        check_new_run(tmp_path)
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "log.csv").write_bytes(b"date,weight\n")
    with pytest.raises(UserError, match=r"already holds model\.pt"):
        check_new_run(tmp_path)
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UserError, match="tensorboard: is a file, where the run needs a folder"):
        check_new_run(tmp_path)


# The example


def test_the_example_writes_into_a_new_folder_alone(tmp_path, capsys):
    before = {name: photo(tmp_path / "in" / name, color) for name, color in (("a.png", "red"), ("a.jpg", "blue"))}
    with pytest.raises(SystemExit, match="is there already: give the name of a new folder"):
        detect_folder.main(tmp_path / "in", tmp_path / "in")
    detect_folder.main(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "in") == before
    assert sorted(os.listdir(tmp_path / "out")) == ["a.jpg", "a_2.jpg", "detections.html", "detections.json"]
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {Path(image["file_name"]).name for image in found["images"]} == before.keys()

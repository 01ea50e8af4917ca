"""Outputs: no file of the user's is replaced, and what cannot be written is named before the work."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from retina_fast import checkpoint, cli
from retina_fast.data.errors import UserError
from retina_fast.data.files import replacing
from retina_fast.data.outputs import check_file, check_folder, check_plot
from retina_fast.deploy.export.exported import may_be_replaced
from retina_fast.deploy.export.onnx_file import checksum
from retina_fast.predict.detect import detect
from retina_fast.predict.drawn_pictures import is_drawn
from retina_fast.predict.image_files import picture_names
from retina_fast.predict.load import TREES
from tests.cli.test_detect import CONTENT, Finder
from tests.conftest import write_shapes


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def problem(*arguments: object) -> str:
    """The one sentence of a command that fails before it has worked: none of the models runs."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return error


def photo(path: Path, color: str = "red", size: tuple[int, int] = (32, 24)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path.read_bytes()


def run(inputs: list[Path], output: Path):
    return detect(Finder(), CONTENT, inputs, output, 0.1, workers=0)


SPELLINGS = {
    "the folder": lambda folder: folder,
    "up and down": lambda folder: folder / ".." / folder.name,
    "a link": lambda folder: _link(folder),
    "from here": lambda folder: Path(os.path.relpath(folder)),
}


def _link(folder: Path) -> Path:
    link = folder.with_name("link")
    link.symlink_to(folder)
    return link


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_detect_leaves_the_originals_beside_its_pictures(spelling, tmp_path):
    folder = tmp_path / "photos"
    kept = {name: photo(folder / name, color) for name, color in {"a.jpg": "red", "b.JPG": "blue"}.items()}
    kept["b.jpg"] = photo(folder / "b.jpg", "green")  # is not among the inputs of the first run
    output = SPELLINGS[spelling](folder)
    for inputs in ([folder / "a.jpg", folder / "b.JPG"], [folder], [output, folder]):
        found = run(inputs, output)
        assert found is not None
        assert {name: (folder / name).read_bytes() for name in kept} == kept
        assert found.images == len(found.first) == (2 if len(inputs) == 2 and inputs[0] != output else 3)
    assert {path.name for path in folder.glob("*.jpg")} >= {"a_2.jpg", "b_2.jpg"}


def test_pictures_of_an_earlier_run_are_replaced_and_other_pictures_stay(tmp_path):
    photo(tmp_path / "in" / "x.png", "red")
    other = photo(tmp_path / "out" / "x.jpg", "blue")
    for _ in range(2):
        run([tmp_path / "in"], tmp_path / "out")
        assert (tmp_path / "out" / "x.jpg").read_bytes() == other
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"x.jpg", "x_2.jpg", "detections.json"}
    with Image.open(tmp_path / "out" / "x_2.jpg") as picture:
        assert picture.size == (32, 24)
        assert picture.info["comment"] == b"drawn by retina-fast detect"


def test_links_in_the_output_are_not_followed(tmp_path):
    original = photo(tmp_path / "in" / "x.jpg")
    (tmp_path / "out").mkdir()
    os.link(tmp_path / "in" / "x.jpg", tmp_path / "out" / "x.jpg")
    (tmp_path / "out" / "y.jpg").symlink_to(tmp_path / "in" / "nothing.jpg")
    photo(tmp_path / "in" / "y.png")
    (tmp_path / "out" / "z.jpg").mkdir()
    photo(tmp_path / "in" / "z.png")
    unknown = b"\0\0\0\x18ftypheic\xff"  # a picture of a kind that nothing here reads
    (tmp_path / "out" / "w.jpg").write_bytes(unknown)
    photo(tmp_path / "in" / "w.png")
    run([tmp_path / "in"], tmp_path / "out")
    assert (tmp_path / "in" / "x.jpg").read_bytes() == original
    assert not (tmp_path / "in" / "nothing.jpg").exists()
    assert (tmp_path / "out" / "z_2.jpg").is_file()
    assert (tmp_path / "out" / "w.jpg").read_bytes() == unknown


def test_pictures_of_two_folders_where_one_is_the_output(tmp_path):
    kept = [photo(tmp_path / name / "x.jpg", color) for name, color in (("a", "red"), ("b", "blue"))]
    found = run([tmp_path / "a", tmp_path / "b"], tmp_path / "b")
    assert found is not None
    assert found.images == 2  # and not the pictures that were drawn there meanwhile
    assert [(tmp_path / name / "x.jpg").read_bytes() for name in "ab"] == kept


def test_names_that_some_file_systems_do_not_tell_apart():
    names = [name for _, name in picture_names(map(Path, ["a/X.png", "b/x.png", "caf\u00e9.png", "cafe\u0301.png"]))]
    assert names == ["X", "x_2", "caf\u00e9", "cafe\u0301_2"]
    long = [name for _, name in picture_names(map(Path, ["木" * 80 + "1.png", "木" * 80 + "2.png"]))]
    assert long[0] != long[1]
    assert all(len(os.fsencode(f"{name}.jpg")) < 255 for name in long)


def test_very_long_names_are_written(tmp_path):
    photo(tmp_path / "in" / ("n" * 251 + ".png"))
    found = run([tmp_path / "in"], tmp_path / "out")
    assert found is not None
    assert found.images == 1
    assert len(list((tmp_path / "out").glob("n*.jpg"))) == 1


def test_a_picture_longer_than_a_jpeg_can_be(tmp_path):
    photo(tmp_path / "in" / "x.png", size=(70_000, 2))
    found = run([tmp_path / "in"], tmp_path / "out")
    assert found is not None
    assert found.images == 1
    with Image.open(tmp_path / "out" / "x.jpg") as picture:
        assert picture.size == (35_000, 1)


def test_annotations_of_the_name_of_the_detections_stay(tmp_path):
    photo(tmp_path / "in" / "x.png")
    for text in ('[{"image_id": 1}]', '{"images": [{"id": 1}], "annotations": []}', ""):
        (tmp_path / "detections.json").write_text(text)
        with pytest.raises(UserError, match=r"detections\.json: is no file of an earlier detection; give another"):
            run([tmp_path / "in"], tmp_path)
        assert (tmp_path / "detections.json").read_text() == text


def test_a_run_that_is_interrupted_leaves_no_unfinished_file(tmp_path, monkeypatch):
    photo(tmp_path / "in" / "x.png")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("retina_fast.predict.detect.draw_detections", stop)
    result = invoke("detect", tmp_path / "in", "--output", tmp_path / "out", "--workers", 0)
    assert result.exit_code == 130
    assert "stopped before the end" in result.stderr
    assert not list((tmp_path / "out").iterdir())


def test_export_replaces_neither_its_checkpoint_nor_what_it_was_not_told_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "trees.pt"
    shutil.copy(TREES, model)
    (tmp_path / "link.pt2").symlink_to(model)
    for output in ("trees.pt", "../" + tmp_path.name + "/trees.pt", "link.pt2"):
        assert "would replace" in problem("export", model, "--size", "64x64", "--output", output)
    assert model.read_bytes() == TREES.read_bytes()
    (tmp_path / "trees.onnx").write_text("of another run")
    assert "is there already; to replace it, give its name" in problem("export", model, "--size", "64x64")
    (tmp_path / "folder").mkdir()
    assert "is a folder" in problem("export", model, "--size", "64x64", "--output", "folder")
    assert "no such folder" in problem("export", model, "--size", "64x64", "--output", "none/file.onnx")
    assert "new.PNG: is the name of an image" in problem("export", model, "--size", "64x64", "--output", "new.PNG")
    others = {
        "photo.PNG": b"a photograph",
        "data.json": b'{"images": []}',
        "best.pt": TREES.read_bytes(),
        "loss.csv": b"step,loss\n",
        "a.pt2": b"PK",
        "theirs.onnx": b"\x08\x08 of another program",
        "photo.xml": b"<annotation><filename>photo.PNG</filename></annotation>",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
        error = problem("export", model, "--size", "64x64", "--format", "onnx", "--output", name)
        assert f"{name}: is there already, and is no exported model; give another name" in error
        assert (tmp_path / name).read_bytes() == content
    for name, content in (("a.onnx", b"model" + checksum(b"model")), ("a.xml", b"<net/><!-- sha256 00 -->\n")):
        (tmp_path / name).write_bytes(content)
        assert may_be_replaced(tmp_path / name)


def test_devices_and_pipes_are_not_replaced(tmp_path):
    """A file that takes the place of /dev/null or /dev/stdout would break the system of a user who may do that."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "null"):
        place = tmp_path / name
        assert f"{name}: is a device or a pipe" in problem("export", "--size", "64x64", "--output", place)
        with pytest.raises(UserError, match=f"{name}: is a folder, a device or a pipe"), replacing(place):
            pass
        assert not place.is_file()
    (tmp_path / "in").mkdir()
    photo(tmp_path / "in" / "a.png")
    os.mkfifo(tmp_path / "a.jpg")
    invoke("detect", tmp_path / "in", "--output", tmp_path, "--workers", 0)
    assert {"a.jpg", "a_2.jpg"} <= {file.name for file in tmp_path.iterdir()}
    assert (tmp_path / "a.jpg").is_fifo()
    assert not is_drawn(tmp_path / "a.jpg")  # and does not wait for somebody to write into it


@pytest.mark.parametrize("name", ["model.pt", "best.pt", "step-00000500.ckpt", "loss.png", "log.csv", "last.ckpt"])
def test_a_new_run_replaces_no_file(name, tmp_path):
    json_file, images = write_shapes(tmp_path / "shapes", count=2)
    output = tmp_path / "run"
    output.mkdir()
    (output / name).write_text("somebody's")
    line = ("train", "--json", json_file, "--images", images, "--crop", 64, "--steps", 1, "--workers", 0)
    error = problem(*line, "--output", output)
    assert "already holds" in error
    assert name == "last.ckpt" or f"{name}, which the run would replace: choose another --output" in error
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [(name, "somebody's")]


def test_a_run_does_not_replace_the_model_that_it_starts_from(tmp_path):
    json_file, images = write_shapes(tmp_path / "shapes", count=2)
    (tmp_path / "run").mkdir()
    shutil.copy(TREES, tmp_path / "run" / "model.pt")
    line = ("train", "--json", json_file, "--images", images, "--checkpoint", tmp_path / "run" / "model.pt")
    assert "already holds model.pt" in problem(*line, "--steps", 1, "--output", tmp_path / "run")
    assert (tmp_path / "run" / "model.pt").read_bytes() == TREES.read_bytes()


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_anew(tmp_path):
    from retina_fast.train.resume import check_new_run

    (tmp_path / "log.csv").write_text("step,classification\n")
    (tmp_path / "loss.png").write_text("a picture")
    check_new_run(tmp_path)
    (tmp_path / "precision_recall.png").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_new_run(tmp_path)


PLOTS = {
    "nowhere/p.png": "no such folder",
    "p.bmp": r"the suffix of a plot must be one of .*\.png.*, got '.bmp'",
    "p": "got ''",
    "p.pgf": "got '.pgf'",
    "folder.png": "is a folder",
    "shapes/images/0.png": "would replace .*0.png, which is read",
}


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("command", ["evaluate", "check"])
def test_a_plot_that_cannot_be_drawn_is_named_before_the_work(command, plot, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "build", None)  # a model that is built would be a traceback
    json_file, images = write_shapes(tmp_path / "shapes", count=1)
    before = (images / "0.png").read_bytes()
    (tmp_path / "folder.png").mkdir()
    data = (json_file,) if command == "check" else ("--json", json_file)
    error = problem(command, *data, "--images", images, "--plot", tmp_path / plot)
    with pytest.raises(UserError, match=PLOTS[plot]):
        raise UserError(error)
    assert (images / "0.png").read_bytes() == before


def test_plots_of_every_case_of_suffix(tmp_path):
    for name in ("a.png", "a.PNG", "a.svg", "a.pdf"):
        check_plot(tmp_path / name)


def test_bench_leaves_the_images_that_it_measures(tmp_path):
    before = photo(tmp_path / "bench.png")
    error = problem("bench", tmp_path, "--rounds", 1, "--batch-sizes", 1, "--output", tmp_path)
    assert "would replace" in error
    assert (tmp_path / "bench.png").read_bytes() == before
    assert "--size is of the noise" in problem("bench", tmp_path, "--size", 64)


def test_folders_that_take_no_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file; give a folder as --output"):
        check_folder(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot be written into \(Not a directory\)"):
        check_folder(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"cannot be written into \(File name too long\)"):
        check_folder(tmp_path / ("n" * 300))
    with pytest.raises(UserError, match=r"cannot be written into \(Invalid name\)"):
        check_folder(tmp_path / "a\0b")
    with pytest.raises(UserError, match=r"cannot be written \(Invalid name\)"):
        check_file(tmp_path / "a\0b")

    with pytest.raises(UserError, match=r"cannot be written \(File name too long\)"):
        check_file(tmp_path / ("n" * 300))

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(UserError, match=r"cannot be written into \(Permission denied\)"):
        check_folder(tmp_path)
    with pytest.raises(UserError, match=r"model\.onnx: cannot be written \(Permission denied\)"):
        check_file(tmp_path / "model.onnx")
    monkeypatch.setattr(os, "access", lambda file, mode: False)
    with pytest.raises(UserError, match="file: is there already and read-only"):
        check_file(tmp_path / "file")


def test_other_errors_of_files_are_one_sentence(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", "a/file")

    monkeypatch.setattr("retina_fast.predict.load.load_model", denied)
    assert problem("detect", tmp_path) == "error: a/file: Permission denied"

"""Weights that arrived damaged: the file is named, and what is wrong with it, and no code of it ever runs."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet18_Weights, resnet18
from typer.testing import CliRunner

from retina_fast import checkpoint, cli, load_exported, retinanet_resnet18_fpn, retinanet_resnet50_fpn
from retina_fast.backbones.published import load_published_weights
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.data.files import damage, replacing
from retina_fast.predict.load import load_model, load_published
from retina_fast.train import TrainSettings
from retina_fast.train.resume import check_resume


class Evil:
    """Creates a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    begin = content.index(b"\x01\x02\x03\x04")
    content[begin] ^= 0xFF
    path.write_bytes(content)


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def blown(path: Path) -> None:
    """The same archive, compressed, with millions of zeros in it."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content + bytes(2_000_000))


WEIGHTS = {"weight": torch.arange(1, 9, dtype=torch.uint8)}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "nothing but zeros"),
    "a web page": (lambda path: path.write_text("<html>404</html>" * 50), "it is a web page"),
    "a web page after a byte order mark": (lambda path: path.write_text("\ufeff\n<!DOCTYPE html>"), "it is a web page"),
    "an answer": (lambda path: path.write_text('{"error": "quota exceeded"}'), "a server's answer"),
    "a text": (lambda path: path.write_text("Not Found\n"), "it is a text"),
    "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "pointer of Git LFS"),
    "cut short": (lambda path: cut(path, 300), "it is cut short"),
    "the begin of an archive": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(5000)), "it is cut short"),
    "an empty archive": (lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)), "an archive with nothing in it"),
    "an archive of zeros": (blown, "it would unpack to more than 100 times its size"),
    "a byte changed": (flipped, "does not agree with its checksum"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 9), ""),
    "a bare pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2])), ""),
}


@pytest.fixture(params=DAMAGES)
def damaged(request) -> tuple[Callable[[Path], object], str]:
    return DAMAGES[request.param]


def test_what_is_wrong_is_said(damaged, tmp_path):
    spoil, words = damaged
    path = saved(tmp_path / "file.pt", WEIGHTS)
    assert damage(path) is None
    spoil(path)
    assert words in (damage(path) or "")
    assert words or damage(path) is None


def test_a_model_file(damaged, tmp_path):
    spoil, words = damaged
    path = saved(tmp_path / "model.pt", WEIGHTS)
    spoil(path)
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert str(error.value).startswith(f"{path}: damaged, or not a model file written by retina-fast train (")
    assert words in str(error.value)
    assert str(error.value).endswith("copy it again, or give another")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The file of ResNet-18's weights in torch hub's folder; there is no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    return path


def test_torch_hubs_folder(damaged, hub):
    spoil, words = damaged
    spoil(saved(hub, WEIGHTS))
    with pytest.raises(UserError) as error:
        retinanet_resnet18_fpn(num_classes=2)
    assert str(error.value).startswith(f"{hub}: damaged, or not the weights ResNet18_Weights.IMAGENET1K_V1 (")
    assert words in str(error.value)
    assert "delete it, and it is downloaded again, or put a whole copy in its place" in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_weights_in_torch_hubs_folder_are_loaded(zipped, hub):
    torch.manual_seed(1)
    network = resnet18()
    torch.save(network.state_dict(), hub, _use_new_zipfile_serialization=zipped)
    model = retinanet_resnet18_fpn(num_classes=2)
    assert torch.equal(model.backbone.body.conv1.weight, network.conv1.weight)
    torch.manual_seed(0)
    expected = resnet18()
    after = torch.rand(1)
    torch.manual_seed(0)
    load_published_weights(resnet18(), ResNet18_Weights.IMAGENET1K_V1, progress=False)
    assert torch.equal(torch.rand(1), after)  # loading draws no random number
    assert not torch.equal(expected.conv1.weight, network.conv1.weight)


def test_weights_of_another_network_are_named(hub):
    torch.save(resnet18(num_classes=3).state_dict(), hub)
    with pytest.raises(
        UserError, match=r"resnet18-.*\.pth: damaged, or not the weights .*loading state_dict for ResNet"
    ):
        retinanet_resnet18_fpn(num_classes=2)
    torch.save([1, 2], hub)
    with pytest.raises(UserError, match=r"resnet18-.*\.pth: damaged, or not the weights"):
        retinanet_resnet18_fpn(num_classes=2)


def test_a_whole_models_weights_by_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "retinanet_resnet50_fpn_coco-eeacb38b.pth"
    path.parent.mkdir(parents=True)
    path.touch()
    for build in (load_published, lambda name, weights: retinanet_resnet50_fpn(weights=weights)):
        with pytest.raises(UserError, match=r"retinanet_resnet50_fpn_coco-eeacb38b\.pth: damaged, .*it is empty"):
            build("retinanet_resnet50_fpn", "COCO_V1")
    line = ["detect", str(tmp_path), "--model", "retinanet_resnet50_fpn", "--weights", "COCO_V1"]
    result = CliRunner().invoke(cli.app, line)
    assert result.exit_code == 1
    assert path.name in result.stderr.replace("\n", "")


@pytest.fixture
def run(shapes, tmp_path):
    """What check_resume is given, for a last.ckpt that is still to be written."""
    data = CocoDataset(*shapes)
    settings = TrainSettings("retinanet_resnet18_fpn_lite", steps=2).resolve(data)
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "last.ckpt", settings, data


def test_the_checkpoint_of_a_run(damaged, run):
    spoil, words = damaged
    spoil(saved(run[0], WEIGHTS))
    with pytest.raises(UserError) as error:
        check_resume(*run)
    assert str(error.value).startswith(
        f"{run[0]}: damaged; copy an older one in its place (there are: none) to resume ("
    )
    assert words in str(error.value)
    saved(run[0].with_name("step-00000002.ckpt"), WEIGHTS)
    with pytest.raises(UserError, match=r"there are: step-00000002\.ckpt"):
        check_resume(*run)


def test_a_checkpoint_of_something_else(run):
    for content in (WEIGHTS, [1], {"settings": 3}):
        saved(run[0], content)
        with pytest.raises(UserError, match=r"last\.ckpt: is not what retina-fast train wrote: it has no"):
            check_resume(*run)
    state: dict = dict.fromkeys(("global_step", "state_dict", "optimizer_states", "loops", "callbacks"), 0)
    saved(run[0], state | {"settings": {"model": "x", "newer": 1}})
    with pytest.raises(UserError, match=r"last\.ckpt: has settings of another version of retina_fast, newer"):
        check_resume(*run)
    good = {"model": "retinanet_resnet18_fpn_lite", "steps": 2}
    for settings in (3, {"steps": 2}, good | {"model": 3}, good | {"recipe": [1]}):
        saved(run[0], state | {"settings": settings})
        with pytest.raises(UserError, match=r"last\.ckpt: is not what retina-fast train wrote: its settings are"):
            check_resume(*run)


def test_an_exported_file(damaged, tmp_path):
    spoil, words = damaged
    path = saved(tmp_path / "model.onnx", WEIGHTS)
    spoil(path)
    with pytest.raises(UserError) as error:
        load_exported(path)
    assert str(error.value).startswith(f"{path}: damaged, or not a file that retina-fast export wrote")
    assert words in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_runs(zipped, hub, run, tmp_path):
    """It would create a file, wherever it stands: in a model file, in torch hub's folder, in a run's checkpoint."""
    planted = tmp_path / "planted"
    evil = Evil(planted)
    contents: tuple[dict, ...] = ({"weight": evil}, vars(checkpoint.Checkpoint("", {}, [], [], {})) | {"metrics": evil})
    for content in contents:
        for path, read in (
            (tmp_path / "model.pt", lambda: checkpoint.load(tmp_path / "model.pt")),
            (hub, lambda: retinanet_resnet18_fpn(num_classes=2)),
            (run[0], lambda: check_resume(*run)),
        ):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(UserError) as error:
                read()
            assert str(error.value).startswith(f"{path}: damaged")
            assert not planted.exists()
            if zipped and path != hub:
                assert "it asks for code to be run, which is refused" in str(error.value)
    torch.load(run[0], weights_only=False)
    assert planted.exists()  # so the code would have run


def test_model_files_that_hold_something_else(tmp_path):
    whole = vars(checkpoint.Checkpoint("x", {}, ["a"], [1], {})) | {"version": checkpoint.VERSION}
    changes: list[dict] = [{"builder": 1}, {"kwargs": []}, {"classes": "abc"}, {"category_ids": 3}, {"state_dict": [1]}]
    for change in [*changes, {"metrics": None}]:
        saved(tmp_path / "m.pt", whole | change)
        (name,) = change
        with pytest.raises(UserError, match=rf"m\.pt: not a model file of retina_fast: its {name} is no "):
            checkpoint.load(tmp_path / "m.pt")
    others: tuple[tuple[dict, str], ...] = (
        ({"state_dict": {"a": 1}}, "its state_dict holds more than tensors"),
        ({"state_dict": {1: torch.zeros(1)}}, "its state_dict holds more than tensors by their names"),
        ({"state_dict": {"a": torch.zeros(1).expand(10**12)}}, "its a is larger than the numbers that it holds"),
        ({"metrics": {"AP50": "high"}}, "its metrics are not one number a name"),
        ({"version": "1"}, "is of version '1', this package reads 1"),
    )
    for change, message in others:
        saved(tmp_path / "m.pt", whole | change)
        with pytest.raises(UserError, match=message):
            checkpoint.load(tmp_path / "m.pt")


def test_what_other_files_of_weights_are_is_said(tmp_path):
    saved(tmp_path / "m.pt", WEIGHTS)
    with pytest.raises(UserError, match=r"has no builder, .*: it holds weights alone: give them to the network"):
        checkpoint.load(tmp_path / "m.pt")
    saved(tmp_path / "m.pt", {"state_dict": WEIGHTS, "pytorch-lightning_version": "2.5"})
    with pytest.raises(UserError, match=r"has no builder, .*: it is a checkpoint of Lightning's, .* model\.pt"):
        checkpoint.load(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": []}, "its classes are no list of names"),
        ({"classes": [None]}, "its classes are no list of names"),
        ({"classes": [1]}, "its classes are no list of names"),
        ({"category_ids": []}, "its category_ids are not one number a class"),
        ({"category_ids": [1, 2]}, "its category_ids are not one number a class"),
        ({"category_ids": ["1"]}, "its category_ids are not one number a class"),
        ({"category_ids": [True]}, "its category_ids are not one number a class"),
        (
            {"state_dict": {"a.weight": torch.tensor([1.0, torch.nan])}},
            "of a run that diverged: a.weight holds NaN (1 ",
        ),
        ({"state_dict": {"a.weight": torch.tensor([-torch.inf])}}, "a.weight holds infinite numbers (1 "),
        ({"kwargs": {"fetch": True}}, "the arguments {'fetch': True} do not fit"),
        ({"builder": "__init__"}, "there is no model '__init__'"),
        ({"kwargs": {"num_classes": 3}}, "the arguments {'num_classes': 3} do not fit retinanet_resnet18_fpn_lite"),
        ({"kwargs": {"weights": "COCO_V1"}}, "the arguments {'weights': 'COCO_V1'} do not fit"),
        ({"kwargs": {1: 2}}, "the arguments {1: 2} do not fit"),
        ({"kwargs": {"image_scale": 2.0, "min_size": 9}}, "image_scale needs min_size=None, got min_size=9"),
        ({"kwargs": {"weights_backbone": "none"}}, "backbone's weights none"),
    ],
)
def test_model_files_whose_parts_do_not_fit(change, message, tmp_path):
    whole = vars(checkpoint.Checkpoint("retinanet_resnet18_fpn_lite", {}, ["a"], [1], {}))
    saved(tmp_path / "m.pt", whole | {"version": checkpoint.VERSION} | change)
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "m.pt")
    assert f"{tmp_path}/m.pt: " in str(error.value)
    assert message in str(error.value)


def test_archives_that_python_cannot_open(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(UserError, match=r"a\.pt: damaged, or not a model file"):
        checkpoint.load(tmp_path / "a.pt")


def test_what_is_interrupted_leaves_no_partial_file(tmp_path):
    def write(error: type[BaseException]) -> None:
        with replacing(tmp_path / "a.txt") as partial:
            partial.write_text("half")
            raise error

    for error, seen in ((KeyboardInterrupt, KeyboardInterrupt), (KeyError, KeyError), (OSError, UserError)):
        with pytest.raises(seen):
            write(error)
        assert not list(tmp_path.iterdir())

import numpy as np
import pytest
import torch
from torch import nn

from retina_fast import checkpoint
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.errors import UserError

LITE = "retinanet_resnet18_fpn_lite"


@pytest.fixture(scope="module")
def lite() -> Checkpoint:
    torch.manual_seed(0)
    weights = checkpoint.build(LITE, 2).state_dict()
    return Checkpoint(LITE, {"score_thresh": 0.1}, ["cat", "dog"], [3, 8], weights, {"AP50": 0.5})


@pytest.fixture
def file(lite, tmp_path):
    checkpoint.save(lite, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_round_trip(lite, file):
    loaded = checkpoint.load(file)
    plain = ("builder", "kwargs", "classes", "category_ids", "metrics")
    assert all(getattr(loaded, name) == getattr(lite, name) for name in plain)
    model = loaded.build()
    assert model.score_thresh == 0.1
    for name, value in model.state_dict().items():
        assert value.dtype == lite.state_dict[name].dtype
        torch.testing.assert_close(value, lite.state_dict[name], rtol=2**-11, atol=1e-7)
    assert file.stat().st_size < 7e6


def test_a_value_beyond_float16_is_kept(lite, tmp_path):
    name = "backbone.body.bn1.running_var"
    weights = lite.state_dict | {name: torch.full((64,), 1e6)}
    checkpoint.save(Checkpoint(**vars(lite) | {"state_dict": weights}), tmp_path / "model.pt")
    assert torch.equal(checkpoint.load(tmp_path / "model.pt").state_dict[name], weights[name])


class Evil:
    def __reduce__(self):
        return print, ("code of the file's author ran",)


def test_code_in_a_file_does_not_run(tmp_path, capsys):
    torch.save({"builder": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt: damaged, or not a model file"):
        checkpoint.load(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("keep", [0, 10, 1000, 1_000_000])
def test_a_damaged_file_is_named(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.pt: damaged, or not a model file"):
        checkpoint.load(file)


def test_a_flipped_byte_does_not_pass_unseen(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pt: damaged"):
        checkpoint.load(file)


def test_other_files_are_refused(lite, tmp_path):
    path = tmp_path / "other.pt"
    with pytest.raises(UserError, match=r"other\.pt: no such model file"):
        checkpoint.load(path)
    torch.save(lite.state_dict, path)
    with pytest.raises(UserError, match="not a model file of retina_fast: it has no builder, category_ids"):
        checkpoint.load(path)
    torch.save(vars(lite) | {"version": 99}, path)
    with pytest.raises(UserError, match="is of version 99, this package reads 1: update retina_fast"):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="not a model file of retina_fast"):
        checkpoint.load(path)


def test_weights_that_do_not_fit_are_named(lite):
    def built(**changes):
        return Checkpoint(**vars(lite) | changes).build()

    with pytest.raises(UserError, match=r"there is no model 'resnet'; choose one of .*retinanet_resnet50_fpn"):
        built(builder="resnet")
    fewer = dict(list(lite.state_dict.items())[1:])
    with pytest.raises(UserError, match=r"they lack backbone.* \(1 in all\)"):
        built(state_dict=fewer)
    with pytest.raises(UserError, match="they have an unknown extra"):
        built(state_dict=lite.state_dict | {"extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"do not fit retinanet_resnet18_fpn_lite: size mismatch for .*cls_logits"):
        built(classes=["one"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused(lite, dtype):
    """load_state_dict would make floats of them, and nothing would be found, in silence."""
    weights = lite.state_dict | {"backbone.body.conv1.weight": torch.zeros(64, 3, 7, 7, dtype=dtype)}
    with pytest.raises(UserError, match=rf"backbone.body.conv1.weight is {dtype}, not floating point"):
        Checkpoint(**vars(lite) | {"state_dict": weights}).build()


def test_numbers_and_words_of_numpy_are_read_again(lite, tmp_path):
    own = {"classes": np.array(["cat", "dog"]), "category_ids": np.array([3, 8]), "metrics": {"AP50": np.float32(0.5)}}
    checkpoint.save(Checkpoint(**vars(lite) | own | {"kwargs": {"score_thresh": np.float64(0.1)}}), tmp_path / "m.pt")
    again = vars(checkpoint.load(tmp_path / "m.pt"))
    assert {name: again[name] for name in (*own, "kwargs")} == {name: vars(lite)[name] for name in (*own, "kwargs")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"builder": checkpoint.build}, "its builder is <function build"),
        ({"kwargs": {"norm": nn.BatchNorm2d}}, r"its kwargs\['norm'\] is <class"),
        ({"kwargs": {"anchors": [object()]}}, r"its kwargs\['anchors'\]\[0\] is <object"),
        ({"classes": "cat"}, "its classes is no list"),
        ({"category_ids": [3]}, "its category_ids are not one number a class"),
        ({"state_dict": nn.Linear(2, 2)}, "its state_dict is no dict"),
        ({"state_dict": {"a": 1.5}}, "its state_dict holds more than tensors"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(lite, change, message, tmp_path):
    with pytest.raises(UserError, match=f"the model.*: {message}"):
        checkpoint.save(Checkpoint(**vars(lite) | change), tmp_path / "m.pt")
    assert not (tmp_path / "m.pt").exists()

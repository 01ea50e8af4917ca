"""`retina_fast.load` and `from_pretrained`: DeepForest's models and the Hub's, ready to predict."""

from types import SimpleNamespace

import pytest
import torch

import retina_fast
from retina_fast import checkpoint as model_file
from retina_fast.data.errors import UserError
from retina_fast.predict.load import TREES

PHOTO = torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)


@pytest.fixture(scope="module")
def forest():
    """What DeepForest's checkpoint holds, with random weights."""
    torch.manual_seed(0)
    state = model_file.build("retinanet_resnet50_fpn", 1, weights_backbone="IMAGENET1K_V1").state_dict()
    config = {"score_thresh": 0.1, "nms_thresh": 0.05, "model": {"name": None}}
    named = {f"model.{name}": value for name, value in state.items()}
    return {"state_dict": named, "hyper_parameters": {"config": config}, "label_dict": {"Tree": 0}}


def test_a_checkpoint_of_deepforest(forest, tmp_path):
    torch.save(forest, tmp_path / "forest.pl")
    model = retina_fast.load(tmp_path / "forest.pl")
    assert (model.classes, model.nms_thresh, model.training) == (["Tree"], 0.05, False)
    model.transform.min_size = (64,)
    assert model.predict(PHOTO, engine=False).size == (64, 96)
    torch.save(forest | {"hyper_parameters": {}, "state_dict": {}}, tmp_path / "other.pl")
    with pytest.raises(UserError, match=r"other\.pl: it has no configuration of DeepForest"):
        retina_fast.load(tmp_path / "other.pl")


def test_a_live_model_of_deepforest():
    network = retina_fast.convert.to_torchvision(retina_fast.load("trees"))
    model = retina_fast.load(SimpleNamespace(model=network, label_dict={"Tree": 0}, config={"nms_thresh": 0.2}))
    assert (model.classes, model.category_ids, model.nms_thresh) == (["Tree"], [0], 0.2)
    assert repr(model.predict(PHOTO, 0.9)) == "<Results 96x64 pixels: nothing>"


def test_a_folder_of_the_hub(tmp_path):
    pytest.importorskip("safetensors")
    pytest.importorskip("huggingface_hub")
    retina_fast.save_pretrained(TREES, tmp_path / "trees", license="bsd-3-clause")
    ours, expected = retina_fast.load(tmp_path / "trees"), retina_fast.load("trees")
    assert ours.classes == expected.classes
    assert all(torch.equal(x, expected.state_dict()[name]) for name, x in ours.state_dict().items())
    assert retina_fast.from_pretrained(str(tmp_path / "trees")).classes == ["Tree"]


def test_what_is_no_name():
    with pytest.raises(TypeError, match="name must be a name or a path"):
        retina_fast.load(3)
    with pytest.raises(UserError, match=r"runs/model\.pt: no such model file"):  # the Hub is not asked
        retina_fast.load("runs/model.pt")

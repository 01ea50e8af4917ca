"""DeepForest's checkpoints and models, as its version 2.1 writes them; the package itself is not needed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchvision.models import resnet50
from torchvision.models.detection._utils import overwrite_eps

from retina_fast import checkpoint as model_file
from retina_fast.convert import to_torchvision
from retina_fast.data.errors import UserError
from retina_fast.deploy.deepforest import (
    deepforest_checkpoint,
    deepforest_hub_checkpoint,
    from_deepforest,
    is_deepforest,
)
from tests.conftest import imagenet

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = {"Bird": 1, "Tree": 0}
CONFIG = {"score_thresh": 0.1, "nms_thresh": 0.05, "num_classes": 2, "model": {"name": None}, "retinanet": None}


@pytest.fixture(scope="module")
def theirs():
    """torchvision's detector with frozen norms, as DeepForest starts one from COCO's weights: eps is 0."""
    torch.manual_seed(0)
    model: Any = model_file.build("retinanet_resnet50_fpn", 2, weights_backbone="IMAGENET1K_V1")
    body = {name: x for name, x in imagenet(resnet50).items() if not name.startswith("fc")}
    model.backbone.body.load_state_dict(body, strict=False)
    for name, x in model.named_buffers():
        if name.endswith("running_var"):
            x.uniform_(1e-4, 2)  # so small that eps shows
    logits = model.head.classification_head.cls_logits
    torch.nn.init.normal_(logits.weight, std=0.1)
    torch.nn.init.constant_(logits.bias, -2.0)
    model.score_thresh, model.nms_thresh = 0.1, 0.05
    made = small(to_torchvision(model))
    overwrite_eps(made, 0.0)
    made.label_dict = LABELS
    return made


def small(model):
    """The model, which enlarges images less, for a quick test."""
    model.transform.min_size, model.transform.max_size = (96,), 96
    return model.eval()


def saved(theirs, **changes):
    state = {f"model.{name}": x for name, x in theirs.state_dict().items()} | {"iou_metric.sum": torch.ones(1)}
    return {"state_dict": state, "hyper_parameters": {"config": CONFIG}, "label_dict": LABELS, "epoch": 3} | changes


def detections(model):
    generator = torch.Generator().manual_seed(1)
    return model([torch.rand(3, 80, 96, generator=generator)])[0]


def test_a_checkpoint_detects_the_same(theirs):
    content = saved(theirs)
    assert is_deepforest(content)
    read = deepforest_checkpoint(content)
    assert (read.classes, read.category_ids) == (["Tree", "Bird"], [0, 1])
    with torch.no_grad():
        ours, expected = detections(small(read.build())), detections(theirs)
    assert len(expected["boxes"]) > 5
    assert torch.equal(ours["labels"], expected["labels"])
    torch.testing.assert_close(ours["scores"], expected["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["boxes"], expected["boxes"], rtol=0, atol=1e-2)


def test_eps_of_a_model_from_the_hub(theirs):
    """There the norms have torchvision's usual eps, so that the weights stay as they are."""
    config = CONFIG | {"model": {"name": "weecology/deepforest-tree"}}
    for read in (
        deepforest_checkpoint(saved(theirs, hyper_parameters={"config": config})),
        deepforest_hub_checkpoint(CONFIG | {"label_dict": LABELS}, theirs.state_dict()),
    ):
        assert read.kwargs == {"score_thresh": 0.1, "nms_thresh": 0.05, "weights_backbone": "IMAGENET1K_V1"}
        assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in read.state_dict.items())


def test_a_live_model_is_made_fast(theirs):
    model = SimpleNamespace(model=theirs, label_dict=LABELS, config=CONFIG | {"nms_thresh": 0.3})
    assert is_deepforest(model)
    assert is_deepforest(theirs)
    fast, classes = from_deepforest(model)
    assert classes == ["Tree", "Bird"]
    assert fast.nms_thresh == 0.3
    assert fast.head is theirs.head
    without = SimpleNamespace(model=None, label_dict=LABELS)
    others: Any = (without, torch.nn.Linear(1, 1), "trees.pt", {"state_dict": {}})
    for other in others:
        assert not is_deepforest(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hyper_parameters": {}}, "no configuration of DeepForest"),
        ({"state_dict": {"model.backbone.weight": torch.ones(1)}}, "no RetinaNet"),
        ({"label_dict": {"Tree": 1}}, "label_dict must give"),
        ({"label_dict": {}}, "label_dict must give"),
    ],
)
def test_refused(theirs, changes, message):
    with pytest.raises(UserError, match=message):
        deepforest_checkpoint(saved(theirs, **changes))


def test_a_repository_of_another_kind_is_refused(theirs):
    with pytest.raises(UserError, match=r"config\.json is not DeepForest's"):
        deepforest_hub_checkpoint({"label_dict": LABELS}, {})

"""An engine in the place of a client's detector: it is a module that moves, copies and shows its parts, or says no."""

import copy
import io

import pytest
import torch
from torch import nn

from retina_fast import compile_inference, retinanet_resnet18_fpn_lite
from retina_fast.deploy.report import Difference
from tests.deploy.engine_soak import small_model
from tests.deploy.pictures import floats, images

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = floats(images((50, 70), (64, 64)))


class Client(nn.Module):
    """Holds a detector as DeepForest's LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)


@pytest.fixture
def own():
    return compile_inference(small_model(), dtype=torch.float32)


def same(one, other) -> bool:
    """Whether detections agree, up to the rounding of convs that a GPU chooses for each engine by timing them."""
    pairs = [(a[key].double(), b[key].double()) for a, b in zip(one, other, strict=True) for key in a]
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=1e-3 * x.is_cuda) for x, y in pairs)


def test_it_takes_the_place_of_a_part(own):
    client = Client(small_model())
    client.model = own
    assert client.eval() is client
    assert not own.training
    found = client(BATCH)
    assert len(found[0]["boxes"])
    assert same(found, own(BATCH))
    assert same(found, own(tuple(BATCH)))
    assert same(found, own(BATCH, [{}, {}]))  # in evaluation a model passes over targets, too
    assert {id(p) for p in own.parameters()} <= {id(p) for p in client.parameters()}
    assert any(name.startswith("model.model.backbone") for name in client.state_dict())


def test_hooks_of_the_client_run(own):
    seen = []
    own.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    own(BATCH)
    assert seen == [2]


@pytest.mark.parametrize("name", ["score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"])
def test_thresholds_are_read_and_changed_live(name, own):
    changed = {"score_thresh": 0.9, "nms_thresh": 0.1, "detections_per_img": 1, "topk_candidates": 2}[name]
    model = small_model()
    assert getattr(own, name) == getattr(model, name)
    before = own(BATCH)
    setattr(own, name, changed)
    assert getattr(own, name) == getattr(own.model, name) == changed
    fresh = small_model()
    setattr(fresh, name, changed)
    after = own(BATCH)
    assert same(after, compile_inference(fresh, dtype=torch.float32)(BATCH))
    assert not same(after, before)


def test_a_changed_threshold_makes_the_plans_anew(own):
    own(BATCH)
    (plan,) = own._plans.values()
    own(BATCH)
    assert list(own._plans.values()) == [plan]
    own.model.score_thresh = 0.31  # a captured graph would hold the old one
    own(BATCH)
    assert plan not in own._plans.values()


def test_parts_are_read_but_not_replaced(own):
    assert own.transform is own.model.transform
    assert own.anchor_generator is own.model.anchor_generator
    assert next(own.backbone.parameters()) is next(own.model.backbone.parameters())
    with pytest.raises(AttributeError, match="roi_heads"):
        own.roi_heads  # noqa: B018
    for part in ("transform", "head", "box_coder"):
        with pytest.raises(TypeError, match=f"{part} cannot be replaced in an engine: replace it in the model"):
            setattr(own, part, getattr(own, part))


def test_it_is_not_trained(own):
    for train in (own.train, Client(own).train):
        with pytest.raises(TypeError, match=r"an engine cannot be trained, .*: train the model, and call"):
            train()
    own.training = True
    with pytest.raises(TypeError, match=r"an engine cannot be trained, .*: call its eval\(\)"):
        own(BATCH)
    assert len(own.eval()(BATCH)) == 2


def test_what_an_engine_cannot_do_is_refused(own):
    image = BATCH[0]
    calls = {
        "traced": lambda: torch.jit.trace(lambda x: own([x])[0]["boxes"], image),
        "exported": lambda: torch.export.export(Client(own), ([image],)),
        "differentiated": lambda: torch.func.grad(lambda x: own([x])[0]["scores"].sum())(image),
    }
    for way, call in calls.items():
        with pytest.raises(Exception, match=f"can be neither .*{way}.*retina_fast.export, or the model"):
            call()
    with pytest.raises(TypeError, match="classes cannot be changed"):
        own.set_num_classes(3)


def test_it_moves_to_another_dtype(own, device):
    before = own(BATCH)
    own.report.difference = measured = Difference(1, 0.0, 0.0, 0.0)
    assert own.to(device) is own
    assert len(own.shapes()) == 1  # nothing has moved
    assert own.report.difference is measured
    own.to(torch.bfloat16)
    assert own.shapes() == []
    assert "accuracy: not measured" in str(own)
    assert own.settings.dtype == own.report.dtype == torch.bfloat16
    expected = compile_inference(small_model(), dtype=torch.bfloat16)
    assert "bfloat16" in str(own)
    for ours, theirs in zip(own(BATCH), expected(BATCH), strict=True):
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=0.02)
        assert ours["boxes"].dtype == torch.float32
    assert len(Client(own).float()(BATCH)) == len(before)
    assert own.settings.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_moves_to_the_gpu_and_back(own):
    before = own.cpu()(BATCH)
    client = Client(own).cuda()
    assert own.settings.graphs
    for ours, theirs in zip(client(BATCH), before, strict=True):
        torch.testing.assert_close(ours["boxes"].cpu(), theirs["boxes"], rtol=0, atol=0.05)
    own.score_thresh = 1.0
    assert not any(len(image["boxes"]) for image in client(BATCH))
    client.cpu()
    assert not own.settings.graphs


def test_copies_and_pickles_find_the_same(own):
    file = io.BytesIO()
    lite = compile_inference(retinanet_resnet18_fpn_lite(num_classes=2, score_thresh=0.0), dtype=torch.float32)
    expected = lite(BATCH)
    torch.save(Client(lite), file)
    file.seek(0)
    for other, found in ((copy.deepcopy(own), own(BATCH)), (torch.load(file, weights_only=False).model, expected)):
        assert other.shapes() == []
        assert same(other(BATCH), found)
        other.score_thresh = 1.0
        assert not any(len(image["boxes"]) for image in other(BATCH))
    assert len(own(BATCH)[0]["boxes"])


def test_its_state_fits_an_engine_made_alike(own):
    found = own(BATCH)
    other = compile_inference(small_model(), dtype=torch.float32)
    for weight in other.parameters():
        weight.zero_()
    Client(other).load_state_dict(Client(own).state_dict())
    assert same(other(BATCH), found)

"""Ways in: live models and subclasses of torchvision's, old checkpoints, fake tensors."""

import copy
import pickle
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torchvision.models.detection import retinanet as tv

import retina_fast
from tests.model.pairs import assert_same, good_targets, torchvision_model


class Locked(tv.RetinaNet):
    """Holds what cannot be copied, and leaves it out of its state."""

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "lock"}


def test_a_subclass_says_what_its_state_is():
    plain = torchvision_model(cls=Locked)
    plain.lock = threading.Lock()
    twin = copy.deepcopy(retina_fast.from_torchvision(plain))
    assert isinstance(twin, Locked)
    assert not hasattr(twin, "lock")


class RetinaNetHub(tv.RetinaNet):
    """In the manner of DeepForest's: own anchors, one class, a state_dict hook that holds the module."""

    def __init__(self, *args, label_dict=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._register_load_state_dict_pre_hook(RetinaNetHub._strip_prefix, with_module=True)
        self.label_dict = label_dict or {"Tree": 0}

    @staticmethod
    def _strip_prefix(module, state_dict, prefix, *_):
        assert module.label_dict == {"Tree": 0}
        for key in [key for key in state_dict if key.startswith("model.")]:
            state_dict[key.removeprefix("model.")] = state_dict.pop(key)


def test_from_torchvision_with_a_subclass():
    plain = torchvision_model(num_classes=1, cls=RetinaNetHub)
    fast = retina_fast.from_torchvision(plain)
    assert isinstance(fast, RetinaNetHub)
    assert isinstance(fast, retina_fast.RetinaNet)
    assert all(a is b for a, b in zip(fast.parameters(), plain.parameters(), strict=True))
    assert_same(fast, plain, targets=[{**t, "labels": t["labels"] * 0} for t in good_targets()])
    old = {f"model.{key}": value + 1 for key, value in plain.state_dict().items()}
    del plain  # the hook must hold the fast model, not the one it came from
    fast.load_state_dict(dict(old))
    assert all(torch.equal(value, old[f"model.{key}"]) for key, value in fast.state_dict().items())
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(twin) is type(fast)
        assert twin.label_dict == {"Tree": 0}
    assert retina_fast.from_torchvision(fast) is fast


def test_from_torchvision_leaves_the_original_as_it_is():
    plain = torchvision_model()
    fast = retina_fast.from_torchvision(plain)
    assert type(plain) is tv.RetinaNet
    assert type(fast) is retina_fast.RetinaNet
    fast.score_thresh = 0.9
    assert plain.score_thresh == 0.05
    with torch.no_grad():
        plain.head.classification_head.cls_logits.bias.fill_(1.0)
    assert (fast.head.classification_head.cls_logits.bias == 1).all()


def test_old_checkpoints_keys():
    model = retina_fast.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    state = model.state_dict()
    old = {key.replace(".conv.0.0.", ".conv.0.") if "head" in key else key: value for key, value in state.items()}
    for i in range(1, 4):
        old = {k.replace(f".conv.{i}.0.", f".conv.{2 * i}.") if "head" in k else k: v for k, v in old.items()}
    assert old.keys() != state.keys()
    model.load_state_dict(old)


@pytest.mark.parametrize("name", ["retinanet_resnet18_fpn", "retinanet_resnet18_fpn_v2"])
def test_a_model_can_be_built_of_fake_tensors_on_a_gpu(name):
    """As torchvision's; its weights are laid out all the same."""
    with FakeTensorMode(), torch.device("cuda"):
        model = getattr(retina_fast, name)(weights_backbone=None)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    kernels = [p for p in model.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


@pytest.mark.parametrize("loss_type", ["l1", "smooth_l1"])
def test_gradients_of_each_sample_by_vmap(loss_type):
    """As for differentially private training."""
    image, target = torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(3)), good_targets()[:1]
    plain = torchvision_model()
    plain.head.regression_head._loss_type = loss_type
    found = []
    for model in (plain, retina_fast.from_torchvision(plain)):
        weights = {name: weight.detach() for name, weight in model.named_parameters()}

        def loss(given, pixels, model=model):
            return sum(torch.func.functional_call(model, given, ([pixels], target)).values())

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")
        found.append(each(weights, torch.stack([image, image / 2])))
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 1e-4 * expected.norm()

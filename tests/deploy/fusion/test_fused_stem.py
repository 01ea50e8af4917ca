"""The first conv of a ResNet with its max pooling: what becomes one, what runs as it is, and the ways it may run in."""

from typing import Any

import pytest
import torch
from torch import nn

from retina_fast import compile_inference, retinanet_resnet18_fpn
from retina_fast.deploy.fusion.fuse import fuse_convs
from retina_fast.deploy.fusion.layers import FusedConv, FusedStem
from tests.deploy.fusion.fusing import error, fused_count
from tests.instruments.fake_gpu import TorchOp, gpu_work_of

pytestmark = pytest.mark.usefixtures("one_thread")


def stem(dtype: torch.dtype = torch.float32, **pooling: Any) -> Any:
    """A chain as a ResNet begins, followed by another conv."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1, **pooling}
    conv, pool = nn.Conv2d(3, 16, 7, stride=2, padding=3, dtype=dtype), nn.MaxPool2d(**sizes)
    return nn.Sequential(conv, nn.Identity(), nn.ReLU(), pool, nn.Conv2d(16, 4, 1, dtype=dtype))


def images(device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(2, 3, 33, 40).to(device, dtype).contiguous(memory_format=torch.channels_last)


def test_a_stem_takes_its_pooling():
    pairs: dict[str, Any] = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)}
    for pooling in ({}, pairs):
        chain = stem(**pooling)
        assert fused_count(chain, images()) == (2, ["relu", "none"])
        assert [type(part) for part in chain] == [FusedStem, nn.Identity, nn.Identity, nn.Identity, FusedConv]


def test_a_models_stem_takes_its_pooling():
    body = compile_inference(
        retinanet_resnet18_fpn(num_classes=3, weights=None, weights_backbone=None)
    ).model.backbone.body
    assert isinstance(body.conv1, FusedStem)
    assert isinstance(body.maxpool, nn.Identity)


@pytest.mark.parametrize(
    "pooling", [{"kernel_size": 2, "padding": 0}, {"stride": 1}, {"dilation": 2}, {"ceil_mode": True}], ids=str
)
def test_other_poolings_run_as_they_are(pooling):
    chain = stem(**pooling)
    assert fused_count(chain, images())[0] == 2
    assert not any(isinstance(part, FusedStem) for part in chain)


class OwnPool(nn.MaxPool2d):
    """A user's own part."""


def test_what_is_the_users_own_runs_as_it_is():
    """A hook on the pooling, a class of the user's own, no ReLU or two of them, and what is called from elsewhere."""
    hooked, own, linear, twice = stem(), stem(), stem(), stem()
    seen = []
    hooked[3].register_forward_hook(lambda *_: seen.append(1))
    own[3] = OwnPool(3, 2, 1)
    linear[2] = nn.Identity()
    twice[1] = nn.SiLU()
    for chain in (hooked, own, linear):
        assert fused_count(chain, images())[0] == 2
        assert not any(isinstance(part, FusedStem) for part in chain)
    assert seen
    assert fused_count(twice, images())[1] == ["swish", "none"]

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = stem()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.chain(x) + self.chain[2](self.chain[0](x)).mean()

    reading = Reading()
    assert fused_count(reading, images())[0] == 2
    assert type(reading.chain[0]) is FusedConv


@torch.no_grad()
def test_every_way_gives_the_same():
    chain, x = stem(), images()
    expected = chain[:4](x)
    fused_count(chain, x)
    for way in ("eager", "fused", "pooled", "stem"):
        assert error(chain[0].run(way, x, None), expected) < 1e-6
    chain[0].ways = {tuple(x.shape): "stem"}  # from a file of a GPU
    assert chain[0].possible_ways(x, None)[-1] != "stem"
    assert error(chain[0](x), expected) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "ways", "names"),
    [
        (torch.bfloat16, ["pooled", "stem"], ["_stem_conv_kernel", "_max_pool_relu_kernel"]),
        (torch.float32, ["pooled"], ["convolution", "_max_pool_relu_kernel"]),
    ],
)
def test_ways_on_a_gpu(dtype, ways, names):
    """On fake CUDA tensors: in half precision both kernels run, in float32 that of the pooling."""

    def prepare() -> Any:
        with torch.device("cuda"):
            chain, x = stem(dtype), images("cuda", dtype)
        fuse_convs(chain, lambda: chain(x))
        return chain[0], x

    @torch.no_grad()
    def call(prepared: Any) -> None:
        conv, x = prepared
        assert conv.possible_ways(x, None) == ["eager", "epilogue", *ways]
        assert conv(x).shape == (2, 16, 9, 10)

    work = gpu_work_of(call, prepare)
    assert [step.name if isinstance(step, TorchOp) else step.kernel.__name__ for step in work] == names

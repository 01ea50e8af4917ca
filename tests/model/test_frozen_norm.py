"""Frozen BatchNorm: under autocast torchvision's passes through float32 are gone, its results are not."""

import copy

import pytest
import torch
import torchvision
from torchvision.models.detection import retinanet as tv
from torchvision.ops import misc

import retina_fast
from retina_fast.backbones.frozen_norm import FrozenBatchNorm2d, as_torchvision
from retina_fast.backbones.resnet_fpn import resnet_fpn
from retina_fast.convert import to_torchvision


@pytest.fixture
def norms() -> tuple[FrozenBatchNorm2d, misc.FrozenBatchNorm2d]:
    """Ours and torchvision's, of the same random buffers."""
    generator = torch.Generator().manual_seed(0)
    ours = FrozenBatchNorm2d(64, eps=0.0)  # as torchvision's detection weights have it
    for name, buffer in ours.named_buffers():
        buffer.uniform_(0.2, 2.0, generator=generator).mul_(1 if name.endswith("var") else -1)
    theirs = copy.deepcopy(ours)
    as_torchvision(theirs)
    assert type(theirs) is misc.FrozenBatchNorm2d
    return ours, theirs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_one_dtype_it_is_torchvisions(norms, dtype, layout):
    x = torch.randn(2, 64, 9, 7, dtype=dtype).contiguous(memory_format=layout)
    ours, theirs = (norm.to(dtype)(x) for norm in norms)
    assert torch.equal(ours, theirs)
    assert ours.stride() == x.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_mixed_precision_it_rounds_once(norms, dtype, layout, device):
    x = torch.randn(2, 64, 9, 7).to(device, dtype).contiguous(memory_format=layout)
    grad = torch.randn(2, 64, 9, 7).to(device, dtype)
    results = []
    for norm in norms:
        given = x.clone().requires_grad_()
        out = norm.to(device)(given)
        (given_grad,) = torch.autograd.grad(out, given, grad.to(out.dtype))
        results.append((out, given_grad))
    (out, given), (wanted, wanted_grad) = results
    assert (out.dtype, wanted.dtype) == (dtype, torch.float32)
    assert out.stride() == x.stride()
    step = torch.finfo(dtype).eps
    # float32 sums of other order may lie across the middle of two numbers of the half precision
    torch.testing.assert_close(out.float(), wanted, rtol=0.5001 * step, atol=1e-6)
    torch.testing.assert_close(given.float(), wanted_grad.float(), rtol=1.001 * step, atol=1e-6)


def kept_and_losses(model: tv.RetinaNet, dtype: torch.dtype | None) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes of the activations kept for backward, and the losses."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 4 and len(tensor) == 2:  # not the weights
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 320, 320, generator=generator) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[16.0, 20, 90, 100]]), "labels": torch.tensor([1])}] * 2
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None),
    ):
        losses = model(images, targets)
        torch.stack([*losses.values()]).sum().backward()
    return sum(kept.values()), losses


@pytest.mark.slow
def test_a_step_keeps_less_and_loses_as_in_float32():
    torch.manual_seed(0)
    trunk = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    model = retina_fast.RetinaNet(resnet_fpn(trunk, 3, p6_from_c5=False), 3, min_size=320, max_size=320).train()
    _, wanted = kept_and_losses(model, None)
    kept, losses = kept_and_losses(model, torch.bfloat16)
    kept_by_torchvisions_norms, _ = kept_and_losses(retina_fast.from_torchvision(to_torchvision(model)), torch.bfloat16)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, wanted[name], rtol=1e-2, atol=0)
    assert kept < 0.85 * kept_by_torchvisions_norms


def test_pretrained_builders_have_it_and_torchvisions_copy_has_not():
    model = retina_fast.retinanet_resnet18_fpn(weights_backbone="IMAGENET1K_V1", num_classes=2, _fetch=False)
    kinds = {type(part) for part in model.modules() if isinstance(part, misc.FrozenBatchNorm2d)}
    assert kinds == {FrozenBatchNorm2d}
    copied = {type(part) for part in to_torchvision(model).modules() if isinstance(part, misc.FrozenBatchNorm2d)}
    assert copied == {misc.FrozenBatchNorm2d}

"""Box decoding against torchvision's coder."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image

from retina_fast.kernels import box_decode as module
from retina_fast.kernels.box_decode import box_decode, box_decode_reference
from tests.ptx.cases import OTHER_ORDERS, check, names


def case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(2, 3 * 4, h, w, generator=generator).to(dtype) for h, w in ((7, 5), (3, 2))]
    corner = torch.rand(123, 2, generator=generator) * 60 - 10
    anchors = torch.cat((corner, corner + 5 + 30 * torch.rand(123, 2, generator=generator)), dim=1)
    return deltas, anchors, torch.randint(0, 123, (2, 29), generator=generator), torch.tensor([[40, 60], [64, 37]])


def test_matches_torchvision():
    deltas, anchors, index, sizes = case()
    deltas[0][0, :, 0, 0] = 50.0  # far beyond the clamp of log(1000 / 16)
    index[0, 0] = 0
    flat = torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, 4) for level in deltas], dim=1)
    for per_image in (anchors, torch.stack((anchors, anchors + 2))):
        ours = box_decode(deltas, per_image, index, sizes)
        for b in range(2):
            chosen = per_image[index[b]] if per_image.dim() == 2 else per_image[b, index[b]]
            boxes = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(flat[b, index[b]], chosen)
            expected = clip_boxes_to_image(boxes, tuple(sizes[b].tolist()))
            torch.testing.assert_close(ours[b], expected, rtol=0, atol=1e-5)


def test_geometry_is_float32_whatever_the_deltas():
    deltas, anchors, index, sizes = case(torch.bfloat16)
    ours = box_decode(deltas, anchors, index, sizes)
    exact = box_decode([level.float() for level in deltas], anchors, index, sizes)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("anchors_per_image", [False, True])
def test_kernel_matches_the_reference(dtype, anchors_per_image, device):
    deltas, anchors, index, sizes = case(dtype)
    deltas[0][0, :, 0, 0], deltas[0][1, 2, 1, 1], deltas[1][0, 0, 0, 0] = 50.0, float("nan"), -float("inf")
    index[0, 0], index[1, 1], index[0, 2] = 0, 18, 105
    anchors = torch.stack((anchors, anchors + 2)) if anchors_per_image else anchors
    levels = [level.to(device) for level in deltas]
    ours = module._box_decode_triton(levels, anchors.to(device), index.to(device), sizes.to(device))
    # to 1e-6 of the images' size: exp may differ in its last bit
    torch.testing.assert_close(ours.cpu(), box_decode_reference(deltas, anchors, index, sizes), rtol=0, atol=64e-6,
                               equal_nan=True)  # fmt: skip


@pytest.mark.parametrize("anchors_per_image", [False, True])
def test_boxes_of_distributions(anchors_per_image, device):
    """A side that is certain lies at its distance; one that is not, at the expectation."""
    _, anchors, index, sizes = case()
    places = torch.randint(0, 8, (2, 123, 4), generator=torch.Generator().manual_seed(2))
    logits = torch.nn.functional.one_hot(places, 8) * 60.0  # (2, 123, 4, 8): the others have e^-60
    logits[:, :, 3] = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, float("-inf")])  # 3 units
    places[:, :, 3] = 3
    levels = [level.to(device) for level in logits.flatten(2).split([105, 18], dim=1)]
    anchors = torch.stack((anchors, anchors + 2)) if anchors_per_image else anchors
    ours = module._box_decode_triton(levels, anchors.to(device), index.to(device), sizes.to(device), 7)
    size = anchors[..., 2:] - anchors[..., :2]
    centre, distances = anchors[..., :2] + size / 2, places * torch.cat((size, size), dim=-1) / 8
    boxes = torch.cat((centre - distances[..., :2], centre + distances[..., 2:]), dim=-1)
    for b, (height, width) in enumerate(sizes.tolist()):
        expected = clip_boxes_to_image(boxes[b, index[b]], (height, width))
        torch.testing.assert_close(ours[b].cpu(), expected, rtol=0, atol=64e-6)
    torch.testing.assert_close(
        ours.cpu(), box_decode([x.cpu() for x in levels], anchors, index, sizes, 7), rtol=0, atol=64e-6
    )


def test_deltas_are_differentiable():
    deltas, anchors, index, sizes = case()
    deltas = [level.requires_grad_() for level in deltas]
    assert all(
        grad.abs().sum() > 0 for grad in torch.autograd.grad(box_decode(deltas, anchors, index, sizes).sum(), deltas)
    )


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty(shape, device):
    deltas, anchors, _, sizes = case()
    index = torch.zeros(shape, dtype=torch.int64, device=device)
    levels = [level[: shape[0]].to(device) for level in deltas]
    assert module._box_decode_triton(levels, anchors.to(device), index, sizes[: shape[0]].to(device)).shape == (
        *shape,
        4,
    )


def test_errors():
    deltas, anchors, index, sizes = case()
    with pytest.raises(ValueError, match="anchors"):
        box_decode(deltas, anchors[:-1], index, sizes)
    with pytest.raises(ValueError, match=r"a level must be \(B, A\*68, H, W\)"):
        box_decode(deltas, anchors, index, sizes, 16)
    with pytest.raises(ValueError, match="reg_max must be a whole number of at least 0, got -1"):
        box_decode(deltas, anchors, index, sizes, -1)


def test_opcheck(device):
    deltas, anchors, index, sizes = case()
    levels = [level.to(device).flatten(1).view(2, -1, 4) for level in deltas]
    torch.library.opcheck(module._op, (levels, *(t.to(device) for t in (anchors, index, sizes)), 0))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_whole(dynamic, device):
    deltas, anchors, index, sizes = case()
    arguments = [level.to(device) for level in deltas], *(t.to(device) for t in (anchors, index, sizes))
    for function in (box_decode, module._box_decode_triton)[: 1 + dynamic]:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        expected = box_decode_reference(deltas, anchors, index, sizes)
        torch.testing.assert_close(compiled(*arguments).cpu(), expected, rtol=0, atol=64e-6)


# As compiled code


@pytest.mark.parametrize("name", names("box_decode"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("box_decode"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

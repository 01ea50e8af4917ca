"""Box decoding against torchvision's coder."""

import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image

from retina_fast.kernels.box_decode import box_decode


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

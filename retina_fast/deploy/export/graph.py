"""What an exported file computes: from a batch of images to padded detections."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retina_fast.deploy.export.postprocess import Postprocess
from retina_fast.forward import cells_of, head_outputs, run_convs, run_network
from retina_fast.model import RetinaNet
from retina_fast.transform import padded, resized_size

SHAPES = {"images": {0: torch.export.Dim("batch", min=1)}}
"""Which sizes of the inputs are dynamic."""


def _bilinear(size: int, resized: int) -> Tensor:
    """(size, resized): the weights of torch's bilinear resize of one side."""
    return F.interpolate(torch.eye(size, device="cpu")[None], size=resized, mode="linear", align_corners=False)[0]


class Graph(nn.Module):
    """What is traced: images (B, 3, H, W) to the four tensors of ``Detections``.

    Args:
        model: a model on the CPU, where no Triton kernel runs.
        image_size: H and W.
        preprocess: whether it takes uint8 images, else float32 ones as the model's transform makes them.
        postprocess: the class that makes detections.
    """

    down: Tensor
    across: Tensor

    def __init__(
        self,
        model: RetinaNet,
        image_size: tuple[int, int],
        preprocess: bool,
        postprocess: type[Postprocess] = Postprocess,
    ) -> None:
        super().__init__()
        self.model, self.preprocess = model, preprocess
        self.dtype = next(model.parameters()).dtype
        inside = resized_size(model.transform, *image_size) if preprocess else image_size
        self.resizes = inside != tuple(image_size)
        if self.resizes:
            # Runtimes round the coordinates of a resize differently, which changes a pixel's value by up to 1e-5. So
            # the file holds the weights of the resize as constants.
            self.register_buffer("down", _bilinear(image_size[0], inside[0]).T.contiguous())
            self.register_buffer("across", _bilinear(image_size[1], inside[1]))
        with torch.no_grad():
            outputs = run_network(model, self._pixels(torch.zeros(1, 3, *image_size, device="cpu")))
        self.postprocess = postprocess(model, outputs.anchors, outputs.num_classes, image_size, inside)

    def _pixels(self, images: Tensor) -> Tensor:
        """The padded batch that the trunk is given, of the model's dtype."""
        transform = self.model.transform
        if self.preprocess:
            mean, std = (
                torch.tensor(x, device="cpu")[:, None, None] for x in (transform.image_mean, transform.image_std)
            )
            images = (images.float() / 255 - mean.to(images.device)) / std.to(images.device)
            if self.resizes:
                images = self.down @ images @ self.across
        pixels = padded(images, transform.size_divisible).to(self.dtype)
        return padded(pixels, getattr(self.model.backbone, "size_divisible", 1))

    def levels(self, images: Tensor) -> Mapping[str, list[Tensor]]:
        """``cls_logits`` and ``bbox_regression``, level by level."""
        features, returned = run_convs(self.model, self._pixels(images))
        # The anchors are those of the postprocess, so that the file holds them once, as numbers.
        return head_outputs(self.model.head, returned, self.postprocess.anchors, cells_of(features)).levels

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.postprocess(**self.levels(images))

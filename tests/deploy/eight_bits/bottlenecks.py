"""A small detector of bottlenecks and a pyramid, for the tests of FP8."""

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.resnet import Bottleneck, conv1x1
from torchvision.ops import FeaturePyramidNetwork

from retina_fast import RetinaNet
from retina_fast.deploy.fusion.layers import FusedConv


class Trunk(nn.Module):
    """Three bottlenecks, the first of which has a downsampling conv of stride 2, and a pyramid."""

    out_channels = 16

    def __init__(self):
        super().__init__()
        down = nn.Sequential(conv1x1(16, 64, 2), nn.BatchNorm2d(64))
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.chain = nn.Sequential(Bottleneck(16, 16, 2, down), *(Bottleneck(64, 16) for _ in range(2)))
        self.pyramid = FeaturePyramidNetwork([16, 64], 16)

    def forward(self, x):
        x = self.stem(x)
        return self.pyramid({"0": x, "1": self.chain(x)})


def bottleneck_model():
    """A detector with random weights around the trunk, whose scores differ."""
    torch.manual_seed(0)
    generator = AnchorGenerator(((24,), (48,)), ((1.0,),) * 2)
    model = RetinaNet(Trunk(), 3, anchor_generator=generator, min_size=None, score_thresh=0.3)
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight)
    nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.01)
    nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.02)
    nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    return model.eval()


def convs_of(model):
    return [module for module in model.modules() if isinstance(module, FusedConv)]

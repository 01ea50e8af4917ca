"""retina_fast: torchvision's RetinaNet, drop-in, made fast."""

import importlib
import sys
from types import ModuleType
from typing import Any

from retina_fast import ops
from retina_fast.builders import (
    RetinaNet_ResNet50_FPN_V2_Weights,
    RetinaNet_ResNet50_FPN_Weights,
    retinanet_resnet18_fpn,
    retinanet_resnet18_fpn_lite,
    retinanet_resnet18_fpn_v2,
    retinanet_resnet34_fpn,
    retinanet_resnet34_fpn_v2,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
    retinanet_resnet101_fpn,
    retinanet_resnet101_fpn_v2,
    retinanet_resnet152_fpn,
    retinanet_resnet152_fpn_v2,
    retinanet_resnext50_32x4d_fpn,
    retinanet_resnext50_32x4d_fpn_v2,
    retinanet_spinenet49,
    retinanet_spinenet49_mobile,
    retinanet_spinenet49s,
    retinanet_spinenet49s_mobile,
    retinanet_spinenet49xs_mobile,
    retinanet_spinenet96,
    retinanet_spinenet143,
    retinanet_spinenet190,
)
from retina_fast.convert import from_torchvision
from retina_fast.deploy.engine import compile_inference
from retina_fast.deploy.export.exported import load_exported
from retina_fast.deploy.export.write import export
from retina_fast.deploy.hub import push_to_hub, save_pretrained
from retina_fast.detections import Detections
from retina_fast.losses import AtssMatcher, TaskAlignedMatcher
from retina_fast.model import RetinaNet
from retina_fast.predict.load import from_pretrained, load
from retina_fast.predict.results import Results
from retina_fast.training_step import TrainingStep

__all__ = [
    "AtssMatcher",
    "Detections",
    "Results",
    "RetinaNet",
    "RetinaNet_ResNet50_FPN_V2_Weights",
    "RetinaNet_ResNet50_FPN_Weights",
    "TaskAlignedMatcher",
    "TrainingStep",
    "compile_inference",
    "export",
    "from_pretrained",
    "from_torchvision",
    "load",
    "load_exported",
    "ops",
    "push_to_hub",
    "retinanet_resnet18_fpn",
    "retinanet_resnet18_fpn_lite",
    "retinanet_resnet18_fpn_v2",
    "retinanet_resnet34_fpn",
    "retinanet_resnet34_fpn_v2",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "retinanet_resnet101_fpn",
    "retinanet_resnet101_fpn_v2",
    "retinanet_resnet152_fpn",
    "retinanet_resnet152_fpn_v2",
    "retinanet_resnext50_32x4d_fpn",
    "retinanet_resnext50_32x4d_fpn_v2",
    "retinanet_spinenet49",
    "retinanet_spinenet49_mobile",
    "retinanet_spinenet49s",
    "retinanet_spinenet49s_mobile",
    "retinanet_spinenet49xs_mobile",
    "retinanet_spinenet96",
    "retinanet_spinenet143",
    "retinanet_spinenet190",
    "save_pretrained",
]


class _Moved(ModuleType):
    """A module under an earlier name. What is asked of it comes from its place of today, which is imported then."""

    def __init__(self, name: str, place: str) -> None:
        super().__init__(name, f"Moved to {place}.")
        self._place = place

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by tools that walk over all modules
            raise AttributeError(name)
        return getattr(importlib.import_module(self._place), name)


for _name, _folder in {
    "draw": "predict",
    "engine": "deploy",
    "errors": "data",
    "exported": "deploy.export",
    "files": "data",
    "metrics": "data",
}.items():
    globals()[_name] = _Moved(f"retina_fast.{_name}", f"retina_fast.{_folder}.{_name}")
    sys.modules[f"retina_fast.{_name}"] = globals()[_name]

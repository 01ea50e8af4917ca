"""retina_fast: torchvision's RetinaNet, drop-in, made fast."""

from retina_fast import ops
from retina_fast.builders import *  # noqa: F403
from retina_fast.builders import RetinaNet_ResNet50_FPN_V2_Weights, RetinaNet_ResNet50_FPN_Weights
from retina_fast.inference import Detections
from retina_fast.model import RetinaNet, from_torchvision

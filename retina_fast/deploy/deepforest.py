"""DeepForest's detectors (https://deepforest.readthedocs.io): checkpoints and live models, made this package's.

DeepForest 1 and 2 detect by torchvision's RetinaNet on a ResNet-50. Its checkpoint is a file of Lightning's with the
network's weights under ``model.``, the configuration under ``hyper_parameters`` and the classes as ``label_dict``. The
package `deepforest` need not be installed to open one.
"""

from collections.abc import Mapping
from typing import Any

from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet

from retina_fast.checkpoint import Checkpoint
from retina_fast.convert import from_torchvision
from retina_fast.data.errors import UserError
from retina_fast.model import RetinaNet

_BUILDER = "retinanet_resnet50_fpn"
_EPS = 1e-5  # of a frozen norm, except where COCO's weights were the start: there torchvision sets it to 0


def is_deepforest(thing: Any) -> bool:
    """Whether a live object is a ``deepforest.main.deepforest`` or one of its networks, or a file's content is theirs.

    Example::

        >>> is_deepforest({"state_dict": {}, "label_dict": {"Tree": 0}}), is_deepforest({"state_dict": {}})
        (True, False)
    """
    if isinstance(thing, Mapping):
        return "state_dict" in thing and "label_dict" in thing
    return isinstance(getattr(thing, "label_dict", None), Mapping) and isinstance(_network(thing), TorchvisionRetinaNet)


def from_deepforest(model: Any) -> tuple[RetinaNet, list[str]]:
    """A live DeepForest model made fast, which shares its weights, and the names of its classes.

    Args:
        model: a ``deepforest.main.deepforest``, or its network, a ``RetinaNetHub``. Its ``predict_tile`` suppresses by
            ``config.nms_thresh``; so does the fast model.

    Example::

        >>> fast, classes = from_deepforest(deepforest.main.deepforest())  # doctest: +SKIP
    """
    fast = from_torchvision(_network(model)).eval()
    config = getattr(model, "config", None)
    if config is not None and "nms_thresh" in config:
        fast.nms_thresh = float(config["nms_thresh"])
    return fast, _names(model.label_dict)


def deepforest_checkpoint(content: Mapping[str, Any]) -> Checkpoint:
    """The content of a checkpoint that ``deepforest.save_model`` or Lightning wrote.

    Raises:
        UserError: if it holds no RetinaNet on ResNet-50, or classes or thresholds are missing.

    Example::

        >>> deepforest_checkpoint(torch.load("trees.ckpt")).classes  # doctest: +SKIP
        ['Tree']
    """
    try:
        config = content["hyper_parameters"]["config"]
        old = config.get("retinanet") or {}  # where version 1 kept it
        thresholds = {"score_thresh": float(old.get("score_thresh", config.get("score_thresh", 0.1)))}
        thresholds["nms_thresh"] = float(config["nms_thresh"])
        started_from_coco = config["model"]["name"] is None if "model" in config else False
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"it has no configuration of DeepForest ({type(error).__name__}: {error})") from error
    state = {
        name.removeprefix("model."): value for name, value in content["state_dict"].items() if name.startswith("model.")
    }
    if "head.classification_head.cls_logits.weight" not in state:
        raise UserError("it holds no RetinaNet, which alone of DeepForest's architectures can be loaded")
    return _checkpoint(state, _names(content["label_dict"]), thresholds, started_from_coco)


def deepforest_hub_checkpoint(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Checkpoint:
    """The content of a repository of the Hub that DeepForest's ``push_to_hub`` filled: its config.json and weights.

    Raises:
        UserError: if classes or thresholds are missing.

    Example::

        >>> deepforest_hub_checkpoint(config, state_dict).classes  # doctest: +SKIP
        ['Tree']
    """
    try:
        thresholds = {name: float(config[name]) for name in ("score_thresh", "nms_thresh")}
        names = _names(config["label_dict"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"config.json is not DeepForest's ({type(error).__name__}: {error})") from error
    return _checkpoint({name.removeprefix("model."): x for name, x in state_dict.items()}, names, thresholds, False)


def _checkpoint(
    state: dict[str, Any], classes: list[str], thresholds: dict[str, Any], started_from_coco: bool
) -> Checkpoint:
    kwargs = dict(thresholds)
    if any(name.endswith("num_batches_tracked") for name in state):
        kwargs["weights_backbone"] = None
    else:  # frozen norms, which come with pretrained weights
        kwargs["weights_backbone"] = "IMAGENET1K_V1"
        if started_from_coco:
            state = {name: x - _EPS if name.endswith("running_var") else x for name, x in state.items()}
    return Checkpoint(_BUILDER, kwargs, classes, list(range(len(classes))), state)


def _network(thing: Any) -> Any:
    """The network in a ``deepforest.main.deepforest``, or the thing itself."""
    return getattr(thing, "model", None) or thing


def _names(label_dict: Any) -> list[str]:
    """The names of the classes by label.

    Raises:
        UserError: unless the labels are 0, 1, ...
    """
    names = {int(label): str(name) for name, label in dict(label_dict or {}).items()}
    if not names or sorted(names) != list(range(len(names))):
        raise UserError(f"label_dict must give the labels 0, 1, ... to names, got {label_dict}")
    return [names[label] for label in sorted(names)]

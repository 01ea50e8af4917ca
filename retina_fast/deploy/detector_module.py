"""The base of modules, such as the engine, that stand in for a detector inside a module of a client's."""

import threading
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn

from retina_fast.anchors import is_stock_generator
from retina_fast.model import RetinaNet
from retina_fast.predict.method import Predicts
from retina_fast.stock import has_hooks, overrides
from retina_fast.transform import is_stock_transform

_NO_TRAINING = "an engine cannot be trained, since its norms are folded into its convs"
_PARTS = ("backbone", "anchor_generator", "head", "transform", "box_coder", "proposal_matcher")


def _attribute(name: str) -> Any:
    """A property that reads and changes the model's attribute of that name."""

    def read(module: "DetectorModule") -> Any:
        return getattr(module.model, name)

    def change(module: "DetectorModule", value: Any) -> None:
        setattr(module.model, name, value)

    return property(read, change, doc=f"``{name}`` of the model, as torchvision's; it may be changed between calls.")


class DetectorModule(Predicts, nn.Module):
    """Holds a model in evaluation mode, and has its thresholds and parts as attributes of its own.

    It can be moved, copied and pickled: :meth:`prepare` then makes anew what belongs to the device.

    Args:
        model: in evaluation mode.

    Attributes:
        of_the_device: names of the attributes that :meth:`prepare` makes, which are neither copied nor pickled.
    """

    model: RetinaNet
    of_the_device: tuple[str, ...] = ()

    score_thresh = _attribute("score_thresh")
    nms_thresh = _attribute("nms_thresh")
    detections_per_img = _attribute("detections_per_img")
    topk_candidates = _attribute("topk_candidates")
    classes = _attribute("classes")
    category_ids = _attribute("category_ids")

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self.turns = threading.RLock()  # threads that share its buffers take turns

    def prepare(self) -> None:
        """Make what belongs to the device of the model's weights."""
        raise NotImplementedError

    def check_move(self, weight: Tensor) -> None:
        """Called before the weights are moved, with an empty one that has come to lie where they will."""

    def moved(self) -> None:
        """Called when the weights have come to lie elsewhere or have another dtype, before :meth:`prepare`."""

    def train(self, mode: bool = True) -> "DetectorModule":
        """Raise TypeError for ``mode=True``: the module only detects."""
        if mode:
            raise TypeError(f"{_NO_TRAINING}: train the model, and call compile_inference on it again")
        super().train(False)
        return self

    def set_num_classes(self, num_classes: int) -> NoReturn:
        """Raise TypeError: what is compiled has the classes that the model had."""
        raise TypeError("an engine's classes cannot be changed: change the model's, and compile that again")

    def check_mode(self) -> None:
        """Raise TypeError if somebody has set the attribute ``training`` by hand, of this module or of the model."""
        if self.training or self.model.training:
            raise TypeError(f"{_NO_TRAINING}: call its eval()")

    def __getattr__(self, name: str) -> Any:
        """The parts and attributes of the model that this module does not have itself, such as ``transform``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "model":
                raise
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise TypeError for a part of the model, which would be replaced in this module alone."""
        if name in _PARTS:
            raise TypeError(f"{name} cannot be replaced in an engine: replace it in the model, and compile that again")
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DetectorModule":
        weight = next(self.model.parameters())
        self.check_move(fn(weight.new_empty(0)))
        before = weight.data_ptr()
        super()._apply(fn, recurse)
        if next(self.model.parameters()).data_ptr() != before:
            self.moved()
            self.prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in (*self.of_the_device, "turns")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.turns = threading.RLock()
        self.prepare()


def refuse_own_parts(model: RetinaNet, what: str) -> None:
    """Raise TypeError if a part of the user's own would be ignored in ``what``."""
    for part, stock in (
        ("forward", not overrides(model, RetinaNet, "forward") and not has_hooks(model)),
        ("transform", is_stock_transform(model.transform)),
        ("anchor_generator", is_stock_generator(model.anchor_generator)),
        ("box_coder, or its postprocessing,", model.uses_fast_detections()),
    ):
        if not stock:
            raise TypeError(f"the model has a {part} of its own, which {what} would not run: call the model itself")

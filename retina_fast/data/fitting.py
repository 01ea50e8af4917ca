"""Images so elongated that a model would resize them to nothing: they count as images that cannot be read."""

import copy
from typing import Any

from retina_fast.data.coco import CocoDataset, Sample
from retina_fast.data.errors import ImageError, UserError
from retina_fast.transform import is_stock_transform, resized_size


def check_fit(transform: Any, height: int, width: int) -> None:
    """Raise a UserError for an image so elongated that a model's transform would resize it to no pixel.

    Args:
        transform: of the model; one of the user's own is not looked into.
        height: of the image, in pixels.
        width: likewise.

    Example::

        >>> from retina_fast.transform import RetinaNetTransform
        >>> check_fit(RetinaNetTransform(800, 1333, [0.0], [1.0]), 480, 640)
    """
    if not is_stock_transform(transform):
        return
    in_evaluation = copy.copy(transform)  # in training a size would be drawn
    in_evaluation.training = False
    resized = resized_size(in_evaluation, height, width)
    if min(resized) < 1:
        raise UserError(f"its {width}x{height} pixels would be resized to {resized[1]}x{resized[0]}: cut it into parts")


class FittingImages:
    """A data set in which images that the model would resize to nothing count as images that cannot be read.

    Args:
        dataset: whose attributes are this one's, too.
        transform: of the model.

    Example::

        >>> image, target = FittingImages(data, model.transform)[0]  # doctest: +SKIP
    """

    def __init__(self, dataset: CocoDataset, transform: Any) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["dataset"], name) if "dataset" in vars(self) else object.__getattribute__(self, name)

    def __getitem__(self, index: int) -> Sample:
        image, target = self.dataset[index]
        try:
            check_fit(self.transform, *image.shape[1:])
        except UserError as error:
            raise ImageError(f"{target['path']}: {error}") from error
        return image, target

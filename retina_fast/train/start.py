"""The network that a training run starts with."""

from pathlib import Path
from typing import Any

from retina_fast import checkpoint
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.anchor_fit import fitted_anchors
from retina_fast.data.coco import CocoDataset
from retina_fast.data.errors import UserError
from retina_fast.train.recipes import recipe_named
from retina_fast.train.settings import FITTED, RANDOM, ResolvedSettings


def starting_network(
    settings: ResolvedSettings,
    data: CocoDataset,
    start_from: str | Path | None = None,
    resumed: dict[str, Any] | None = None,
) -> tuple[Any, Checkpoint]:
    """The network in training mode, and how it is built and what it finds, without its weights.

    Its weights are random, but for the backbone's published ones; or those of `start_from`, with a random last layer
    where its classes are not the data's. A resumed run overwrites them with its own.

    Args:
        settings: of the run.
        data: whose classes the network is to find.
        start_from: a model file of the same builder.
        resumed: the builder's keyword arguments in the run that is resumed.

    Raises:
        UserError: if there is no such model, if the file is another model's, has boxes of another kind, or anchors are
            to be fitted as well, or if weights cannot be downloaded.

    Example::

        >>> network, about = starting_network(settings, data)  # doctest: +SKIP
        >>> about.classes  # doctest: +SKIP
        ['Tree']
    """

    def about(kwargs: dict[str, Any]) -> Checkpoint:
        return Checkpoint(settings.model, kwargs, data.classes, data.category_ids, {})

    if resumed is not None:
        return checkpoint.build(settings.model, len(data.classes), **resumed), about(resumed)
    if start_from is None:
        kwargs = _builder_arguments(settings, {})
        if settings.anchors == FITTED:
            kwargs["anchors"] = fitted_anchors(checkpoint.build(settings.model, 1, **kwargs), data)
        return checkpoint.build(settings.model, len(data.classes), fetch=True, **kwargs), about(kwargs)
    if settings.anchors == FITTED:
        raise UserError("--anchors and --checkpoint exclude each other: the file's weights are for its own anchors")
    other = checkpoint.load(start_from)
    if other.builder != settings.model:
        raise UserError(f"{start_from} is a {other.builder}: train it with --model {other.builder}")
    reg_max = settings.arguments.get("reg_max")
    if reg_max not in (None, other.kwargs.get("reg_max")):
        raise UserError(f"{start_from} has no weights for --reg-max {reg_max}: leave out one of them")
    other.kwargs = _builder_arguments(settings, other.kwargs)
    network = other.build()
    if other.classes != data.classes:
        network.set_num_classes(len(data.classes))
    return network, about(other.kwargs)


def _builder_arguments(settings: ResolvedSettings, given: dict[str, Any]) -> dict[str, Any]:
    """The builder's keyword arguments: those given, then the recipe's, then what the settings ask for."""
    recipe = recipe_named(settings.recipe)
    kwargs = given | dict(recipe.kwargs) | settings.arguments
    if settings.crop and recipe.crops_are_the_size:
        kwargs |= {"min_size": settings.crop, "max_size": settings.crop}
    if settings.image_scale is not None:
        kwargs |= {"min_size": None, "image_scale": settings.image_scale, "_skip_resize": settings.crop > 0}
    if settings.weights_backbone != RANDOM:
        kwargs |= {"weights_backbone": settings.weights_backbone}
    return kwargs

"""One call for whatever holds images: they are read ahead, detected in batches, and become results."""

import hashlib
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet

from retina_fast.convert import from_torchvision
from retina_fast.data.coco import Sample
from retina_fast.data.errors import ImageError, UserError, whole, within
from retina_fast.data.processes import WORKERS
from retina_fast.data.progress import tracked
from retina_fast.deploy.detector_module import refuse_own_parts
from retina_fast.deploy.engine import Engine, compile_inference
from retina_fast.deploy.export.exported import Exported
from retina_fast.detections import Thresholds
from retina_fast.model import RetinaNet
from retina_fast.predict.again import Again, stamp_of
from retina_fast.predict.batches import detections_of, read_ahead
from retina_fast.predict.draw import above
from retina_fast.predict.method import Predicts
from retina_fast.predict.pictures import Picture, Read
from retina_fast.predict.results import Results
from retina_fast.predict.sources import open_source
from retina_fast.predict.tiled_results import Tiling, tiled_results_of
from retina_fast.predict.tiles import check_tiling

_BATCH = 8  # images that a GPU takes at once by default
_ENGINES: WeakKeyDictionary[Any, tuple[Any, Engine]] = WeakKeyDictionary()
"""The engine of each model that has predicted, with the state of the model that it was made from."""


def predict(
    model: Any,
    source: Any,
    score: float = 0.3,
    *,
    batch_size: int | None = None,
    stream: bool = False,
    bgr: bool = False,
    engine: bool = True,
    progress: bool = True,
    tile: int | None = None,
    overlap: float = 0.2,
    merge: str = "nmm",
    merge_thresh: float = 0.5,
    resume: str | Path | None = None,
) -> Any:
    """Find objects in whatever holds images.

    Args:
        model: a RetinaNet of this package or of torchvision, an engine, or an exported model. Its attribute ``classes``
            names its classes.
        source: one image, or several. A path, the URL of an image, a Pillow image, an array (H, W), (H, W, C) or a
            tensor (C, H, W) is one. A folder, a glob, a ``.txt`` file with a path or URL a line, a batch (B, ...), the
            path or URL of a video, the number of a camera, the URL of a stream, and a list or any iterable of all these
            are several. Arrays and tensors have 1, 3 or 4 channels of uint8, uint16, or floating point in [0, 1].
        score: the least score of a detection, 0 to 1.
        batch_size: the most images at once; only images of one size share a batch. By default 8 on a GPU, and 1 on a
            CPU or from a camera.
        stream: whether to return a generator, which keeps few images in memory, however many there are.
        bgr: whether arrays and tensors have their channels in OpenCV's order, which is never guessed.
        engine: whether to detect by an engine, a copy of the model that is made at the first call and again when the
            model has changed, rather than by the model. A model with parts of a user's own has none.
        progress: whether to show a bar while several images, or rows of tiles, are worked on, if `rich` is installed.
        tile: the sides of tiles in pixels, into which larger images are cut; by default none is cut. Files of rasters,
            such as GeoTIFFs, are then read in windows by `rasterio`, so that they may be larger than memory.
        overlap: the part of a side that neighbouring tiles share. Objects up to that size are whole in one tile.
        merge: ``nmm`` joins the boxes of several tiles that overlap by intersection over the smaller area, so that the
            parts of a larger object become one; ``nms`` keeps the better of two whose IoU is too high.
        merge_thresh: what is enough overlap for that.
        resume: a file that keeps the finished rows of tiles of the one image, so that a run that was cut short goes on;
            it is deleted in the end.

    Returns:
        A :class:`~retina_fast.predict.results.Results` for one image; for several a list of them in the order of the
        source, or a generator. An image of several that cannot be read is warned of, and has results with their
        ``error`` set.

    Raises:
        ImageError: if the one image cannot be read, or does not fit the model; the message names it.
        UserError: if a folder or list cannot be read, a package for the source is missing, or an exported model gives
            no such low score.
        TypeError: for what is no source.
        ValueError: for a score outside [0, 1], a batch size below 1, a tile, overlap or merge that cannot be, a camera
            without ``stream``, or a model in training mode that no engine stands for.

    Example::

        >>> import retina_fast
        >>> model = retina_fast.load("trees")
        >>> predict(model, torch.zeros(3, 64, 96, dtype=torch.uint8), score=0.9)
        <Results 96x64 pixels: nothing>
    """
    check_score(model, score)
    if batch_size is not None and not whole(1, batch_size):
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    check_tiling(1 if tile is None else tile, overlap, merge, merge_thresh)
    opened = open_source(source, bgr)
    if opened.endless and not stream:
        raise ValueError("a camera or stream does not end: give stream=True, and leave the loop when it is enough")
    detector = detector_of(model) if engine else model
    batch_size = 1 if opened.endless else batch_size or default_batch(detector)
    keep = stream or opened.one
    if getattr(detector, "training", False):
        raise ValueError("the model is in training mode: call its eval() first")
    if resume is not None and (tile is None or not opened.one):
        raise ValueError(f"resume is for one image in tiles, got {resume} with tile={tile}")
    console = _console() if progress else None
    if tile is None:
        found = results_of(detector, opened.pictures(), score, *names_of(model), batch_size, keep=keep)
    else:
        about = "" if resume is None else digest_of(detector)
        tiling = Tiling(tile, overlap, merge, merge_thresh, None if resume is None else Path(resume), about)
        bar = console if opened.one else None
        found = tiled_results_of(detector, opened.pictures(), score, *names_of(model), tiling, batch_size, keep, bar)
    if opened.one:
        (result,) = found
        if result.error:
            raise result.error
        return iter([result]) if stream else result
    if stream:
        return _warned(found)
    return list(tracked(_warned(found), "Detecting", opened.count() if console else None, console))


def results_of(
    detector: Any,
    pictures: Iterable[Picture],
    score: float,
    classes: Sequence[str] | None,
    category_ids: Sequence[int] | None,
    batch_size: int = 1,
    workers: int = WORKERS,
    keep: bool = False,
) -> Iterator[Results]:
    """The results of each picture in turn, read by threads while the detector works on those before.

    Args:
        detector: a RetinaNet in evaluation mode, an engine, or an exported one; see :func:`detector_of`.
        pictures: taken as they are needed.
        score: the least score of a detection.
        classes: class names by label, as far as they are known.
        category_ids: their ids in COCO files.
        batch_size: the most images at once.
        workers: how many threads read, each at most two pictures ahead.
        keep: whether results keep their pixels, or read them again when they are asked for.

    Example::

        >>> for results in results_of(engine, source.pictures(), 0.3, ["Tree"], [1]): ...  # doctest: +SKIP
    """
    waiting: deque[Picture] = deque()  # itertools.tee would keep the pixels of 57 pictures
    samples = read_ahead(partial(_sample, keep=keep), _noted(pictures, waiting), workers)
    for found in detections_of(detector, samples, batch_size, score):
        picture = waiting.popleft()
        if isinstance(found, ImageError):
            yield Results.unread(found, picture.path, classes or ())
            continue
        (image, about), detections = found
        detections = above(detections, score)
        yield Results(
            detections["boxes"],
            detections["scores"],
            detections["labels"],
            size=(image.shape[1], image.shape[2]),
            classes=classes or (),
            category_ids=category_ids,
            path=picture.path,
            file=picture.file,
            image=image if keep else Again.of(picture, about["stamp"]),
            georeference=about["georeference"],
        )


def names_of(model: Any) -> tuple[list[str], list[int] | None]:
    """The names of a detector's classes by label, as far as they are known, and their ids in COCO files.

    Example::

        >>> names_of(torch.nn.Identity())
        ([], None)
    """
    classes, ids = getattr(model, "classes", None), getattr(model, "category_ids", None)
    if isinstance(model, Predicts) and isinstance(classes, str):
        raise TypeError(f"the model's classes must be a list of names, got {classes!r}")
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        return [], None
    return list(classes), list(ids) if ids is not None and len(ids) == len(classes) else None


def check_score(model: Any, score: float) -> None:
    """Raise a UserError for a score outside [0, 1], or below what an exported model was made for.

    Example::

        >>> check_score(None, 0.5)
    """
    if not within(0, score, 1):
        raise UserError(f"score must be at least 0 and at most 1, got {score!r}")
    if isinstance(model, Exported):
        least = model.metadata["score_thresh"]
        if score < least:
            raise UserError(f"score {score}: the exported model gives no score under {least}; give at least that")
        if model.metadata["input"] != "uint8":
            raise UserError("the exported model takes prepared images: export it without --no-preprocess")


def default_batch(detector: Any) -> int:
    """How many images are detected at once: several keep a GPU busy, while a CPU gains nothing.

    Example::

        >>> default_batch(torch.nn.Conv2d(3, 8, 3))
        1
    """
    device = detector.device if isinstance(detector, Exported) else next(detector.parameters()).device
    return 1 if device.type == "cpu" else _BATCH


def detector_of(model: Any) -> Any:
    """The engine of a network, made anew if it has changed since the last call; other detectors are themselves.

    Args:
        model: a network with parts of a user's own, which an engine would not run, is itself, too.

    Example::

        >>> import retina_fast
        >>> model = retina_fast.retinanet_resnet18_fpn_lite(num_classes=2, weights_backbone=None)
        >>> detector_of(model) is detector_of(model)
        True
    """
    if not isinstance(model, TorchvisionRetinaNet):
        return model
    network = from_torchvision(model)
    try:
        refuse_own_parts(network, "an engine")
    except TypeError:
        return model
    state = _state(network)
    made_from, engine = _ENGINES.get(model, (None, None))
    if engine is None or made_from != state:
        engine = compile_inference(network)
        _ENGINES[model] = state, engine
    for name, value in Thresholds.of(network)._asdict().items():
        setattr(engine, name, value)
    return engine


def _state(model: RetinaNet) -> Any:
    """What tells whether a model has changed: its parts and their settings, and of each tensor its place, the count of
    its changes, and a hash, which also sees most changes past autograd, through ``.data``."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    hashes = torch.stack([torch.hash_tensor(tensor) for tensor in tensors]).tolist()
    changes = [None if tensor.is_inference() else tensor._version for tensor in tensors]
    places = [(tensor.data_ptr(), tensor.device, tensor.dtype) for tensor in tensors]
    return _settings(model), places, changes, hashes


def _settings(model: RetinaNet) -> Any:
    parts = [vars(part) for part in (model.transform, model.anchor_generator, model.box_coder)]
    return str(model), [{name: repr(value) for name, value in part.items() if name[0] != "_"} for part in parts]


def digest_of(detector: Any) -> str:
    """Says which detector it is, by every bit of its weights or of its file, and its thresholds but for the score.

    Example::

        >>> digest_of(torch.nn.Conv2d(3, 8, 3))[:8] == digest_of(torch.nn.Conv2d(3, 8, 3))[:8]
        False
    """
    if isinstance(detector, Exported):
        with detector.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    network = getattr(detector, "model", detector)
    about = _settings(network) if isinstance(network, RetinaNet) else str(network)
    thresholds = [getattr(detector, name, None) for name in Thresholds._fields if name != "score_thresh"]
    digest = hashlib.sha256(f"{about} {thresholds}".encode())
    if isinstance(network, torch.nn.Module):
        for tensor in (*network.parameters(), *network.buffers()):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _noted(pictures: Iterable[Picture], waiting: deque[Picture]) -> Iterator[Picture]:
    """The pictures, each of which is put into the queue when it is taken."""
    for picture in pictures:
        waiting.append(picture)
        yield picture


def _sample(picture: Picture, keep: bool) -> Sample | ImageError:
    stamp = None if keep else stamp_of(picture.file)  # of no use where the pixels stay
    try:
        read: Read = picture.read()
    except ImageError as error:
        return error
    return read.image, {"path": picture.name, "georeference": read.georeference, "stamp": stamp}


def _warned(results: Iterable[Results]) -> Iterator[Results]:
    """The results, with a warning of each image that could not be read."""
    for result in results:
        if result.error:
            warnings.warn(str(result.error), stacklevel=3)
        yield result


def _console() -> Any:
    """The terminal or notebook, for a bar; None without `rich`, or if nobody looks."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    console = Console(stderr=True)
    return console if console.is_terminal or console.is_jupyter else None

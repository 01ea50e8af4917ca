"""The method `predict`, which networks, engines and exported models have in common."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


class Predicts:
    """Gives a detector the method :meth:`predict`, and the names of its classes.

    Attributes:
        classes: the K class names, by label; None if nobody has given any.
        category_ids: the K ids of these classes in COCO files; None stands for 0 to K - 1.

    Example::

        >>> Predicts().classes is None
        True
    """

    classes: Sequence[str] | None = None
    category_ids: Sequence[int] | None = None

    def predict(
        self,
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
        """Find objects in whatever holds images; see :func:`retina_fast.predict.predict.predict`.

        Args:
            source: a path, URL, folder, glob, ``.txt`` list, video, camera (its number), Pillow image, array, tensor,
                or a list of these.
            score: the least score of a detection, 0 to 1.
            batch_size: the most images at once, which are of one size; by default 8 on a GPU, 1 on a CPU or from a
                camera.
            stream: whether to return a generator, which keeps few images in memory, however many there are.
            bgr: whether arrays and tensors have their channels in OpenCV's order, which is never guessed.
            engine: whether to detect by an engine (:func:`retina_fast.compile_inference`) rather than by the model.
            progress: whether to show a bar while several images are worked on, if `rich` is installed.
            tile: the sides of tiles in pixels, into which larger images are cut; by default none is cut. GeoTIFFs are
                then read in windows, by `rasterio`, and may be larger than memory.
            overlap: the part of a side that neighbouring tiles share.
            merge: what joins the boxes of several tiles: ``nmm``, whose boxes grow together, or ``nms``.
            merge_thresh: from which overlap on.
            resume: a file that keeps the finished rows of tiles of the one image, for a run that is cut short.

        Returns:
            A :class:`~retina_fast.predict.results.Results` for one image, a list of them for several, or a generator.

        Example::

            >>> import retina_fast
            >>> model = retina_fast.load("trees")
            >>> model.predict("examples/photographs/soaproot.jpg")  # doctest: +SKIP
            <Results examples/photographs/soaproot.jpg, 400x400 pixels: 27 Tree>
        """
        # By its name, since a detector lies below what predicts with it.
        run = import_module("retina_fast.predict.predict").predict
        options = {"batch_size": batch_size, "stream": stream, "bgr": bgr, "engine": engine, "progress": progress}
        tiling = {"tile": tile, "overlap": overlap, "merge": merge, "merge_thresh": merge_thresh, "resume": resume}
        return run(self, source, score, **options, **tiling)

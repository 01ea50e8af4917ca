"""Results of pictures that are detected in tile by tile: files of rasters are read in windows, others as a whole."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from os.path import isfile
from pathlib import Path
from typing import Any

from torch import Tensor

from retina_fast.data.errors import ImageError
from retina_fast.predict.again import Again, Stamp, check_unchanged, stamp_of
from retina_fast.predict.batches import detections_of
from retina_fast.predict.draw import above
from retina_fast.predict.geotiff import RasterFile, is_raster, is_turned
from retina_fast.predict.pictures import Picture, called
from retina_fast.predict.results import Results
from retina_fast.predict.tiles import Found, Pixels, Window, detect_tiles


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut and their boxes joined; see :func:`retina_fast.predict.tiles.detect_tiles`.

    Attributes:
        tile, overlap, merge, merge_thresh, resume, keep_rows: its arguments.
        about: says, for ``resume``, which detector it is.
    """

    tile: int
    overlap: float = 0.2
    merge: str = "nmm"
    merge_thresh: float = 0.5
    resume: Path | None = None
    about: str = ""
    keep_rows: bool = False


def tiled_results_of(
    detector: Any,
    pictures: Iterable[Picture],
    score: float,
    classes: Sequence[str] | None,
    category_ids: Sequence[int] | None,
    tiling: Tiling,
    batch_size: int = 1,
    keep: bool = False,
    console: Any = None,
) -> Iterator[Results]:
    """The results of each picture in turn.

    Args:
        detector, pictures, score, classes, category_ids, keep: as for
            :func:`retina_fast.predict.predict.results_of`; but a raster's pixels are always read again when asked for.
        tiling: how the pictures are cut.
        batch_size: the most tiles at once.
        console: where a bar over the rows of tiles is shown, if the picture has several.

    Example::

        >>> for results in tiled_results_of(engine, pictures, 0.3, ["Tree"], [1], Tiling(800)): ...  # doctest: +SKIP
    """
    for picture in pictures:
        try:
            with called(picture.file, picture.name):
                found = _results(detector, picture, score, classes, category_ids, tiling, batch_size, keep, console)
            yield found
        except ImageError as error:
            yield Results.unread(error, picture.path, classes or ())


def _results(
    detector: Any,
    picture: Picture,
    score: float,
    classes: Sequence[str] | None,
    category_ids: Sequence[int] | None,
    tiling: Tiling,
    batch_size: int,
    keep: bool,
    console: Any,
) -> Results:
    about = f"{picture.name} {score} {tiling.about}"
    image: Tensor | Callable[[], Tensor]
    with ExitStack() as stack:
        raster: RasterFile | Pixels
        if picture.file and is_raster(picture.file) and isfile(picture.file) and not is_turned(picture.file):
            raster = stack.enter_context(RasterFile(picture.file))
            stamp = stamp_of(picture.file)
            about += f" {stamp}"
            georeference, image = raster.georeference, RasterImage(picture.file, stamp)
        else:
            stamp = None if keep else stamp_of(picture.file)
            read = picture.read()
            raster, georeference = Pixels(read.image), read.georeference
            image = read.image if keep else Again.of(picture, stamp)
            if tiling.resume:
                about += f" {sha256(read.image.cpu().contiguous().numpy().data).hexdigest()}"
        found = detect_tiles(
            partial(_run, detector, picture.name, score),
            raster,
            tiling.tile,
            tiling.overlap,
            tiling.merge,
            tiling.merge_thresh,
            batch_size,
            tiling.resume,
            about,
            console,
            tiling.keep_rows,
        )
    return Results(
        found["boxes"],
        found["scores"],
        found["labels"],
        size=(raster.height, raster.width),
        classes=classes or (),
        category_ids=category_ids,
        path=picture.path,
        file=picture.file,
        image=image,
        georeference=georeference,
    )


def _run(detector: Any, name: str, score: float, tiles: list[Tensor]) -> list[Found]:
    found = []
    for result in detections_of(detector, [(tile, {"path": name}) for tile in tiles], len(tiles), score):
        if isinstance(result, ImageError):
            raise result
        found.append(above(result[1], score))
    return found


@dataclass(frozen=True)
class RasterImage:
    """The pixels of a raster's file, read when they are asked for.

    Attributes:
        path: the file.
        stamp: of the file when objects were found in it; by default it may have changed since.
    """

    path: Path
    stamp: Stamp = None

    def __call__(self) -> Tensor:
        """All of them, (3, H, W) uint8."""
        return self.reduced(None)

    def reduced(self, size: tuple[int, int] | None) -> Tensor:
        """Those of the whole raster in a picture of that (height, width), (3, height, width) uint8."""
        check_unchanged(self.path, self.stamp)
        with RasterFile(self.path) as raster:
            return raster.reduced(size) if size else raster.read(Window(0, 0, raster.width, raster.height))

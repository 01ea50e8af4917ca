"""Rasters on disk, read in windows by rasterio: GeoTIFF and whatever else GDAL reads."""

import warnings
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from retina_fast.data.errors import ImageError, UserError
from retina_fast.predict.georeference import Georeference
from retina_fast.predict.tiles import Window

_SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".img", ".ecw")
_ORIENTATION = 0x0112  # the tag of TIFF and EXIF
_FILTERS = Lock()  # warnings' filters are those of all threads
_STRIP = 1 << 24  # pixels that are held while a picture is reduced
_CACHE = 256  # megabytes of decoded blocks that GDAL keeps; by itself it takes 5% of all memory


def is_raster(path: Path) -> bool:
    """Whether a file is one of those that are read in windows rather than as a whole, by its name.

    Example::

        >>> is_raster(Path("mosaic.TIF")), is_raster(Path("photo.jpg"))
        (True, False)
    """
    return path.suffix.lower() in _SUFFIXES


def is_turned(path: Path) -> bool:
    """Whether a TIFF says that it is to be shown turned or mirrored, as cameras write it, which GDAL does not do.

    Example::

        >>> is_turned(Path("there/is/none.tif"))
        False
    """
    try:
        with path.open("rb") as file, TiffImageFile(file) as head:  # Image.open refuses large ones
            return head.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # What is no TIFF, or a damaged one, may make the parser raise anything.
        return False


class UnknownPixels(ImageError):
    """The numbers of a raster are of a kind of which nobody can say what is black and what white."""


class RasterFile:
    """A raster file, of which windows are read as RGB uint8.

    The bands are those that the file calls red, green and blue, in whatever order they lie; a palette's colours; else
    the first three, or the first one alone as grey, where the file may say that 0 is white. Alpha is not shown. Of 16
    bits the upper 8 are kept. Pixels without data, by the file's nodata value, mask or alpha, are black.

    Args:
        path: the file.

    Attributes:
        height, width: in pixels.
        georeference: where they lie on the earth, if the file says so in a system that has an EPSG code.

    Raises:
        ImageError: if it cannot be read, or its pixels are neither 8 nor 16 bits; the message names it.
        UserError: if rasterio is not installed.

    Example::

        >>> with RasterFile(Path("mosaic.tif")) as raster:  # doctest: +SKIP
        ...     pixels = raster.read(Window(0, 0, 800, 800))
    """

    def __init__(self, path: Path) -> None:
        try:
            import rasterio
        except ModuleNotFoundError as error:
            raise UserError(f"{path}: reading it in windows needs rasterio: pip install rasterio") from error
        self.path = path
        self._errors: Any = rasterio.errors.RasterioError
        self._environment = rasterio.Env(GDAL_CACHEMAX=_CACHE)
        try:
            with self._environment, _FILTERS, warnings.catch_warnings():
                warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
                self._file = rasterio.open(path)
        except (self._errors, OSError) as error:
            raise ImageError(f"{path}: not a readable raster ({_reason(error)})") from error
        self.height, self.width = self._file.height, self._file.width
        kinds = {*self._file.dtypes}
        if kinds - {"uint8", "uint16"}:
            raise UnknownPixels(f"{path}: its pixels must be uint8 or uint16, got {', '.join(sorted(kinds))}")
        self._bands, self._colours = _bands(self._file)
        self._white_is_zero = self._file.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        names = [colour.name for colour in self._file.colorinterp]
        self._alpha = names.index("alpha") + 1 if "alpha" in names else None  # GDAL knows it only as the last band
        self._masked = any("all_valid" not in [flag.name for flag in flags] for flags in self._file.mask_flag_enums)
        placed = self._file.crs is not None and not self._file.transform.is_identity
        code = self._file.crs.to_epsg() if placed else None
        self.georeference = Georeference(tuple(self._file.transform)[:6], f"EPSG:{code}") if code else None

    def reduced(self, size: tuple[int, int]) -> Tensor:
        """The whole raster in a picture of that (height, width), (3, height, width) uint8: of each part one pixel.

        It is read strip by strip as it is, since GDAL takes minutes to shrink a raster that is compressed as JPEG.

        Raises:
            ImageError: if it cannot be decoded.
        """
        rows, columns = (
            (torch.arange(small, device="cpu") * 2 + 1) * large // (2 * small)
            for small, large in zip(size, (self.height, self.width), strict=True)
        )
        strips = []
        for taken in rows.split(max(1, _STRIP // self.width * size[0] // self.height)):
            top = int(taken[0])
            strip = self.read(Window(0, top, self.width, int(taken[-1]) + 1 - top))
            strips.append(strip[:, taken - top][:, :, columns])
        return torch.cat(strips, dim=1)

    def read(self, window: Window) -> Tensor:
        """The pixels of a window, (3, height, width) uint8.

        Raises:
            ImageError: if they cannot be decoded.
        """
        from rasterio.windows import Window as Part

        part = Part(window.x, window.y, window.width, window.height)
        try:
            with self._environment:
                pixels = self._file.read(self._bands, window=part)
                valid = self._file.dataset_mask(window=part) if self._masked else None
                valid = self._file.read(self._alpha, window=part) if self._alpha else valid
        except (self._errors, OSError) as error:
            raise ImageError(f"{self.path}: not readable at {window.x}, {window.y} ({_reason(error)})") from error
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        if self._colours is not None:
            pixels = np.moveaxis(self._colours[pixels[0]], -1, 0)
        elif self._white_is_zero:
            pixels = 255 - pixels
        if valid is not None:
            pixels = np.where(valid > 0, pixels, np.uint8(0))
        return torch.from_numpy(np.array(np.broadcast_to(pixels, (3, *pixels.shape[1:]))))

    def __enter__(self) -> "RasterFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _bands(file: Any) -> tuple[list[int], Any]:
    """The numbers of the bands that are shown, one or three, and the colours (256, 3) of a palette or None."""
    names = [colour.name for colour in file.colorinterp]
    if "palette" in names:
        band = names.index("palette") + 1
        colours = np.zeros((256, 3), np.uint8)
        for value, colour in file.colormap(band).items():
            colours[value] = colour[:3]
        return [band], colours
    if {"red", "green", "blue"} <= {*names}:
        return [names.index(name) + 1 for name in ("red", "green", "blue")], None
    shown = [number for number, name in enumerate(names, start=1) if name != "alpha"]
    return (shown[:3] if len(shown) >= 3 else shown[:1]) or [1], None


def _reason(error: BaseException) -> str:
    while error.__cause__:  # of which rasterio says no more than that it is there
        error = error.__cause__
    return f"{error}\n".splitlines()[0]

"""The georeference of a GeoTIFF by its tags, as far as Pillow reads them: an affine transform and an EPSG code.

OGC GeoTIFF 1.1 (https://docs.ogc.org/is/19-008r4/19-008r4.html), 7.1 for the keys and annex B for the transform.
"""

from pathlib import Path
from typing import Any, NamedTuple

from PIL.TiffImagePlugin import TiffImageFile

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How files of that kind begin."""

_SCALE, _TIEPOINT, _MATRIX, _KEYS = 33550, 33922, 34264, 34735  # the tags
_RASTER_TYPE, _GEODETIC, _PROJECTED = 1025, 2048, 3072  # the keys
_POINT = 2  # the raster type in which coordinates are those of a pixel's middle
_GDAL_METADATA, _GDAL_NODATA = 42112, 42113  # tags that GDAL has added
_NOWHERE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # a transform that says nothing
_CODES = range(1024, 32767)  # those of EPSG; 32767 stands for a system of the file's own


class Georeference(NamedTuple):
    """Where on the earth the pixels of an image lie."""

    transform: tuple[float, ...]
    """(a, b, c, d, e, f) of rasterio's `Affine`: x = a * column + b * row + c, y = d * column + e * row + f."""
    crs: str
    """The coordinate reference system of x and y, such as ``EPSG:32611``."""


def georeference(file: Path) -> Georeference | None:
    """Where a TIFF lies on the earth.

    Args:
        file: of any kind.

    Returns:
        None for another file, for a TIFF without a georeference, and for one in a system that has no EPSG code.

    Example::

        >>> georeference(Path("there/is/none.tif")) is None
        True
    """
    try:
        tags = _tags(file)
        keys = _keys(tags.get(_KEYS, ()))
        transform = _transform(tags, keys.get(_RASTER_TYPE) == _POINT)
    except Exception:  # A damaged file may make Pillow raise anything.
        return None
    code = keys.get(_PROJECTED) or keys.get(_GEODETIC)
    if transform is None or transform == _NOWHERE or code not in _CODES:
        return None
    return Georeference(transform, f"EPSG:{code}")


def is_geotiff(file: Path) -> bool:
    """Whether a file is a TIFF with tags of GeoTIFF's or GDAL's, which may say where it has no data.

    Example::

        >>> is_geotiff(Path("there/is/none.tif"))
        False
    """
    try:
        return not _tags(file).keys().isdisjoint((_SCALE, _MATRIX, _KEYS, _GDAL_METADATA, _GDAL_NODATA))
    except Exception:  # A damaged file may make Pillow raise anything.
        return False


def _tags(file: Path) -> dict[int, Any]:
    """The tags of a TIFF; none of another file."""
    with file.open("rb") as opened:
        if not opened.read(4).startswith(TIFF):
            return {}
    with TiffImageFile(str(file)) as picture:
        return dict(picture.tag_v2)


def _keys(directory: Any) -> dict[int, int]:
    """The keys of the directory whose values are numbers in it: of the four of an entry, the second is then 0."""
    entries = [directory[i : i + 4] for i in range(4, len(directory) - 3, 4)]
    return {key: value for key, tag, _, value in entries if tag == 0}


def _transform(tags: dict[int, Any], point: bool) -> tuple[float, ...] | None:
    """From columns and rows to coordinates: by a matrix, or by one point and the size of a pixel."""
    if len(tags.get(_MATRIX, ())) == 16:
        a, b, _, c, d, e, _, f = map(float, tags[_MATRIX][:8])
    elif len(tags.get(_SCALE, ())) >= 2 and len(tags.get(_TIEPOINT, ())) == 6:
        a, e, b, d = float(tags[_SCALE][0]), -float(tags[_SCALE][1]), 0.0, 0.0
        column, row, _, x, y, _ = map(float, tags[_TIEPOINT])
        c, f = x - a * column, y - e * row
    else:
        return None
    if point:  # the coordinates are those of the middle of the first pixel, and not of its corner
        c, f = c - (a + b) / 2, f - (d + e) / 2
    return a, b, c, d, e, f

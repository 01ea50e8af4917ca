"""A COCO file of detections, written image by image."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

BEGIN = '{"info": {"description": "detections of retina_fast"}, "images": ['
"""How every file begins that a CocoWriter wrote, and no file of annotations."""


class CocoWriter:
    """Writes a COCO file image by image. At the end of the `with` block it takes the place of an earlier file.

    After an error in the block the earlier file stays as it is.

    Args:
        path: the file.
        categories: its COCO categories.

    Example::

        >>> with CocoWriter(Path("out/detections.json"), categories) as coco:  # doctest: +SKIP
        ...     coco.add({"id": 1, "file_name": "photo.jpg"}, results)  # doctest: +SKIP
    """

    def __init__(self, path: Path, categories: list[dict[str, Any]]) -> None:
        self.path, self.categories = path, categories
        self.images, self.annotations = 0, 0

    def __enter__(self) -> "CocoWriter":
        self._whole, self._boxes = (self.path.with_suffix(suffix) for suffix in (".partial", ".annotations.partial"))
        with ExitStack() as stack:
            self._image_file, self._box_file = (stack.enter_context(x.open("w+")) for x in (self._whole, self._boxes))
            self._stack = stack.pop_all()
        self._image_file.write(BEGIN)
        return self

    def add(self, image: dict[str, Any], results: list[dict[str, Any]]) -> None:
        """Write an image and its detections.

        Args:
            image: its COCO entry.
            results: its detections as COCO results.
        """
        self._image_file.write((", " if self.images else "") + json.dumps(image))
        self.images += 1
        for result in results:
            area = result["bbox"][2] * result["bbox"][3]
            box = {**result, "id": self.annotations + 1, "area": area, "iscrowd": 0}
            self._box_file.write((", " if self.annotations else "") + json.dumps(box))
            self.annotations += 1

    def __exit__(self, kind: object, *_: object) -> None:
        with self._stack:
            if kind is None:
                self._image_file.write('], "annotations": [')
                self._box_file.seek(0)
                shutil.copyfileobj(self._box_file, self._image_file)
                self._image_file.write(f'], "categories": {json.dumps(self.categories)}}}')
        self._boxes.unlink()
        if kind is None:
            self._whole.replace(self.path)
        else:
            self._whole.unlink()

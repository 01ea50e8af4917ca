"""Image files to detect objects in: which they are, how they are read, and the names of their pictures."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from retina_fast.data.coco import IMAGE_SUFFIXES, Sample, read_image
from retina_fast.data.errors import UserError


class ImageFiles:
    """A data set of image files without annotations; its keys are their paths.

    Example::

        >>> image, target = ImageFiles()[Path("photo.jpg")]  # doctest: +SKIP
    """

    def __getitem__(self, path: Path) -> Sample:
        return read_image(path), {"path": str(path)}


def image_files(inputs: list[Path]) -> Iterator[Path]:
    """The image files that the inputs name, in turn: a file, those in a folder, or those in the lines of a .txt file.

    A file comes once, however often files and folders name it; but a list is not looked through for such repetitions.
    At most the names of one folder are in memory at a time.

    Raises:
        UserError: for a folder without images, or a list that cannot be read.

    Example::

        >>> list(image_files([Path("photos"), Path("another.jpg"), Path("list.txt")]))  # doctest: +SKIP
    """
    seen: set[Path] = set()
    for path in inputs:
        if path in seen or path.parent in seen:
            continue
        if path.suffix == ".txt":
            yield from _listed(path)
        elif path.is_dir():
            inside = sorted(p for p in path.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise UserError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
            yield from (file for file in inside if file not in seen)
        else:
            yield path
        seen.add(path)


def _listed(path: Path) -> Iterator[Path]:
    """The files in the lines of a .txt file."""
    try:
        with path.open() as lines:
            for line in lines:
                if line.strip():
                    yield Path(line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a list of image files, one a line ({error})") from error


def picture_names(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Each file with a name for its picture: its own, with a number where an earlier picture has that name.

    Example::

        >>> [name for _, name in picture_names(map(Path, ["a/x.png", "b/x.png", "x_2.png"]))]
        ['x', 'x_2', 'x_2_2']
    """
    names: set[str] = set()
    count: Counter[str] = Counter()
    for path in files:
        name = path.stem
        while name in names:
            count[path.stem] += 1
            name = f"{path.stem}_{count[path.stem] + 1}"
        names.add(name)
        yield path, name

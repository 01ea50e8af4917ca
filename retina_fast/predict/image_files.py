"""Image files to detect objects in: which they are, and the names of their pictures."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from retina_fast.data.encodings import encoding_of
from retina_fast.data.errors import UserError
from retina_fast.data.images import IMAGE_SUFFIXES
from retina_fast.predict.drawn_pictures import is_drawn, is_image

_LONGEST = 200  # bytes of a picture's name; file systems allow 255, with the suffix and a number


def silent(message: str) -> None:
    """Says nothing: where no caller wants to hear which files are passed over."""


def image_files(
    inputs: list[Path],
    say: Callable[[str], object] = silent,
    drawn_in: Path | None = None,
    seen: set[str] | None = None,
    here: str = "",
) -> Iterator[Any]:
    """The image files that the inputs name, in turn: a file, those in a folder, or those in the lines of a .txt file.

    In a folder, a file counts as an image by its suffix, or else by its content. A file comes once, however often files
    and folders name it; but a list is not looked through for such repetitions. At most the names of one folder are in
    memory at a time.

    Args:
        inputs: files, folders and lists.
        say: called with a sentence for each folder in which other files, or folders, are passed over.
        drawn_in: a folder in which drawn pictures are passed over, since they are written there.
        seen: the files and folders that earlier calls have seen, to which this one adds.
        here: the folder that relative paths are of, by default the current one.

    Yields:
        Paths, relative where the input is; and, for the URLs of a list, words.

    Raises:
        UserError: for a folder without images, or a list that cannot be read.

    Example::

        >>> list(image_files([Path("photos"), Path("another.jpg"), Path("list.txt")]))  # doctest: +SKIP
    """
    seen = set() if seen is None else seen
    for path in inputs:
        place = Path(here, path)
        real = os.path.realpath(place)
        if real in seen or (os.path.dirname(real) in seen and counts_as_image(place)):
            continue
        if os.path.isdir(place):
            drawn = drawn_in is not None and real == os.path.realpath(drawn_in)
            inside = _inside(path, say, drawn, here)
            yield from (file for file in inside if os.path.join(real, file.name) not in seen)
        elif path.suffix.lower() == ".txt":
            yield from _listed(path, here)
        else:
            yield path
        seen.add(real)


def _inside(folder: Path, say: Callable[[str], object], without_drawn: bool, here: str) -> list[Path]:
    """The images in a folder by their names."""
    images, others, folders = [], Counter[str](), 0
    try:
        with os.scandir(Path(here, folder)) as entries:
            for entry in entries:
                file = Path(entry.path)
                if os.path.isdir(entry):  # entry.is_dir() raises for links that go round in circles
                    folders += 1
                elif without_drawn and is_drawn(file):
                    others["drawn pictures"] += 1
                elif counts_as_image(file):
                    images.append(folder / entry.name)
                else:
                    others[file.suffix or "no suffix"] += 1
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    if not images:
        raise UserError(f"{folder}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    passed = [f"{others.total()} other files ({', '.join(sorted(others))})"] if others else []
    passed += [f"{folders} folders"] if folders else []
    if passed:
        say(f"{folder}: {' and '.join(passed)} in it are passed over")
    return sorted(images)


def counts_as_image(path: Path) -> bool:
    """Whether a scan of its folder takes the path for an image.

    Example::

        >>> counts_as_image(Path("photo.jpg")), counts_as_image(Path("list.txt"))
        (True, False)
    """
    if os.path.isdir(path):
        return False
    return path.suffix.lower() in IMAGE_SUFFIXES or (os.path.isfile(path) and is_image(path))


def _listed(path: Path, here: str) -> Iterator[Path | str]:
    """The files in the lines of a .txt file, and the URLs as words."""
    empty = True
    try:
        place = Path(here, path)
        with place.open(encoding=encoding_of(place)) as lines:
            for line in filter(None, map(str.strip, lines)):
                empty = False
                yield line if "://" in line else Path(line)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: not a list of image files, one a line ({error})") from error
    if empty:
        raise UserError(f"{path}: names no image")


def no_file(name: str) -> bool:
    """Says that there is no file of that name: where pictures go into a new folder."""
    return False


def picture_names(files: Iterable[Any], occupied: Callable[[str], bool] = no_file) -> Iterator[tuple[Any, str]]:
    """Each file with a name for its picture: its own, with a number where an earlier picture has that name.

    Names that differ in case alone, or in how Unicode writes a letter, count as one, since many file systems do not
    tell them apart. Very long names are cut.

    Args:
        files: paths, or other things that have a `stem` as these do.
        occupied: whether a file that must stay already has the name.

    Example::

        >>> [name for _, name in picture_names(map(Path, ["a/x.png", "b/x.png", "x_2.png", "X.gif"]))]
        ['x', 'x_2', 'x_2_2', 'X_3']
    """
    names: set[str] = set()
    count: Counter[str] = Counter()
    for file in files:
        encoded = os.fsencode(file.stem)
        name = stem = file.stem if len(encoded) <= _LONGEST else encoded[:_LONGEST].decode("utf-8", "ignore")
        while _key(name) in names or occupied(name):
            count[_key(stem)] += 1
            name = f"{stem}_{count[_key(stem)] + 1}"
        names.add(_key(name))
        yield file, name


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()

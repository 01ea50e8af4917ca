"""A progress bar for a loop, on a console or nowhere."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # rich is needed only where something is shown
    from rich.console import Console

T = TypeVar("T")


def tracked(items: Iterable[T], description: str, total: int | None, console: "Console | None") -> Iterator[T]:
    """The items, with a progress bar that disappears after the last of them.

    Args:
        items: what the loop goes over.
        description: the words beside the bar.
        total: how many items there are; None if that is not known.
        console: where the bar is shown; nowhere if it is None.

    Example::

        >>> list(tracked([1, 2], "Counting", total=2, console=None))
        [1, 2]
    """
    if console is None:
        yield from items
    else:
        from rich.progress import track

        yield from track(items, description, total=total, console=console, transient=True)

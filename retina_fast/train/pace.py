"""How fast a training run is, and how long it waits for images."""

import time


class Pace:
    """Images a second since the interval began, and the part of that time in which the steps waited for images.

    Args:
        images: images a step, over all processes.

    Example::

        >>> pace = Pace(images=16)
        >>> pace.begin(now=0.0), pace.step_begins(now=1.0), pace.step_ends(now=4.0)
        (None, None, None)
        >>> pace.images_per_second, pace.waiting
        (4.0, 0.25)
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.begin()

    def begin(self, now: float | None = None) -> None:
        """Begins an interval, at `now` in seconds or at this moment."""
        self.start = self.last = time.monotonic() if now is None else now
        self.steps, self.waited = 0, 0.0

    def step_begins(self, now: float | None = None) -> None:
        """Counts the time since the last step as waiting."""
        self.waited += (time.monotonic() if now is None else now) - self.last

    def step_ends(self, now: float | None = None) -> None:
        """Counts a step."""
        self.last = time.monotonic() if now is None else now
        self.steps += 1

    @property
    def images_per_second(self) -> float:
        """The rate of the interval up to its last step."""
        return self.steps * self.images / max(self.last - self.start, 1e-9)

    @property
    def waiting(self) -> float:
        """The part of the interval in which steps waited for images, 0 to 1."""
        return self.waited / max(self.last - self.start, 1e-9)

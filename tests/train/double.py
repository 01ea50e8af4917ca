"""`python -m tests.train.double train ...`: retina-fast with networks in float64.

Where rounding is far below anything that a threshold or an optimizer makes large, what is left of a difference between
two runs is a difference of what they compute. In float32 a change of 1e-7 in the weights alone moves them, 20 steps
later, by 6% of the way that they have gone.
"""

from typing import Any

from retina_fast import cli
from retina_fast.train import run

_Detector = run.Detector


def _double(*arguments: Any) -> run.Detector:
    return _Detector(*arguments).double()


run.Detector = _double  # type: ignore[assignment, misc]

if __name__ == "__main__":
    cli.app()

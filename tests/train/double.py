"""`python -m tests.train.double train ...`: retina-fast with networks in float64.

In float64, rounding stays so small that thresholds and the optimizer do not make it large: a difference between two
runs is a difference in what they compute. In float32, a change of the weights by 1e-7 has grown after 20 steps to 6% of
the way that the weights have gone.
"""

from typing import Any

from retina_fast import cli
from retina_fast.train import run
from tests.instruments import drawn

_Detector = run.Detector


def _double(*arguments: Any) -> run.Detector:
    return _Detector(*arguments).double()


run.Detector = _double  # pyrefly: ignore[bad-assignment]

if __name__ == "__main__":
    drawn.quicken()  # as the tests have it: the weights of a run that is started are those of one that is forked
    cli.app()

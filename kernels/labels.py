"""The numbers that mark an anchor without a ground truth, in matched indices and in labels, as in torchvision.

An index from 0 up is that of a ground truth, and a label from 0 up is its class: class 0 is a real class.
"""

from retina_fast.kernels.dispatch import tl

BACKGROUND = -1  # no ground truth overlaps the anchor enough: every class is a wrong answer
IGNORED = -2  # the overlap lies between the two thresholds: the anchor takes no part in the loss

# the same numbers as kernels read them
TL_BACKGROUND = tl.constexpr(BACKGROUND)
TL_IGNORED = tl.constexpr(IGNORED)

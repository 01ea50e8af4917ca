"""What anchor matching says of an anchor that matches no ground truth, in torchvision's numbers.

A matched index or a label from 0 up is a ground truth or its class: class 0 is a real class.
"""

from retina_fast.kernels.compiler import tl

BACKGROUND = -1  # no ground truth overlaps the anchor enough: every class is a wrong answer
IGNORED = -2  # the overlap lies between the two thresholds: the anchor takes no part in the loss

# the same numbers as kernels read them
TL_BACKGROUND = tl.constexpr(BACKGROUND)
TL_IGNORED = tl.constexpr(IGNORED)

"""The scales of int8 weights: as small as they can be without sums that some processors cut off.

An x86 processor without VNNI instructions multiplies uint8 codes with int8 weights and adds each two neighbouring
products in 16 bits (VPMADDUBSW), where more than 32,767 becomes 32,767. A code is 255 at most, so that two weights of
one sign may sum to 128 and no more: 255 * 128 = 32,640. Half the range of all weights, as the runtimes offer
(``reduce_range``, ``overflow_fix``), would grant that for any two; but ONNX Runtime and OpenVINO pair the channels 0
and 1, 2 and 3, and so on at one place of the kernel, and few pairs have two large weights of one sign. So only they
count here: the scales are 1.4 times those of all 256 steps in the mean, not 2 times.
"""

from typing import Any

import numpy as np

_MOST = 127  # in 8 bits with a sign
_MOST_OF_PAIR = 128  # times a code of 255 it is below 2**15
_LEAST = 1e-12  # of a channel whose weights are all 0


def weight_scales(weight: Any, moved: float = 0.5) -> Any:
    """The scale of each output channel (O,) of a conv's weights, by which they are divided before they are rounded.

    Args:
        weight: (O, C, kernel height, kernel width) float32.
        moved: how far rounding moves a weight at most, in units of the scale.

    Example::

        >>> weight_scales(np.array([[60, 67, -127, 127], [-100, -154, 0, 0]], np.float32)[:, :, None, None]).tolist()
        [1.0, 2.0]
    """
    flat = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1).astype(np.float64)  # as the runtimes add them up
    if weight.shape[1] % 2:  # only OpenVINO then begins at channel 0 again at each place: so all neighbours count
        first, second = flat[:, :-1], flat[:, 1:]
    else:
        first, second = flat[:, ::2], flat[:, 1::2]
    sums = [np.maximum(sign * first, 0) + np.maximum(sign * second, 0) for sign in (1, -1)]
    of_pairs = np.maximum(*sums).max(axis=1, initial=0) / (_MOST_OF_PAIR - 2 * moved)
    return np.maximum(np.maximum(np.abs(flat).max(axis=1) / _MOST, of_pairs), _LEAST).astype(np.float32)

"""Scales of weights: the least with which no processor cuts off a sum of two products."""

import numpy as np
import pytest

from retina_fast.deploy.eight_bits.weight_scales import weight_scales
from tests.deploy.eight_bits.pairs import INT16, largest_sums


@pytest.mark.parametrize("shape", [(7, 3, 3, 3), (7, 64, 1, 1), (9, 6, 3, 3), (5, 1, 3, 3), (4, 1, 1, 1), (3, 5, 7, 1)])
@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_no_pair_of_products_exceeds_16_bits_and_scales_are_the_least(shape, alike):
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal(shape) * (1 - alike) + alike).astype(np.float32)
    weight[0] *= -1
    scales = weight_scales(weight)
    assert scales.dtype == np.float32
    steps = np.abs(weight).max(axis=(1, 2, 3)) / 127
    assert (scales >= steps * (1 - 1e-6)).all()
    assert (scales <= 2 * steps * (1 + 1e-6)).all()
    codes = np.rint(weight / scales[:, None, None, None])
    assert np.abs(codes).max() <= 127
    assert largest_sums(codes).max() <= INT16
    if shape[1] % 2 == 0:  # then some weight, or some pair, of each channel is as large as it may be
        sums = largest_sums(weight / scales[:, None, None, None])
        assert (np.maximum(sums / 255, steps / scales * 127) > 127 * (1 - 1e-6)).all()


def test_the_way_that_weights_are_rounded_is_allowed_for():
    """Each of a pair is moved by a whole step."""
    weight = np.full((1, 2, 1, 1), 63.0, np.float32)
    assert weight_scales(weight, moved=1) == 1
    assert weight_scales(weight) < 1


def test_channels_without_weights_have_a_scale():
    assert (weight_scales(np.zeros((2, 4, 3, 3), np.float32)) > 0).all()

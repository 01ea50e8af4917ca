"""Image batching against torchvision's transform."""

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from retina_fast.transform import RetinaNetTransform, batch_images, resized_sizes

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize("kwargs", [{}, {"size_divisible": 64}, {"fixed_size": (97, 70)}, {"_skip_resize": True}])
@pytest.mark.parametrize("training", [True, False])
def test_matches_torchvision(training, kwargs):
    theirs = GeneralizedRCNNTransform(120, 200, MEAN, STD, **kwargs).train(training)
    generator = torch.Generator().manual_seed(0)
    for trial in range(10):
        sizes = torch.randint(1, 300, (3, 2), generator=generator).clamp(min=4).tolist()
        images = [torch.rand(3, h, w, generator=generator) for h, w in sizes]
        images[2] = images[2][:1]  # a grey image is repeated over the channels
        expected, _ = theirs(images[:2] if trial % 2 else images)
        resized = resized_sizes(theirs, images[:2] if trial % 2 else images)
        assert resized == [tuple(size) for size in expected.image_sizes]
        batch = batch_images(theirs, images[: len(resized)], resized)
        torch.testing.assert_close(batch, expected.tensors, rtol=0, atol=1e-5)


def test_images_may_keep_their_size():
    transform = RetinaNetTransform(None, 1333, MEAN, STD)
    for training in (True, False):
        transform.train(training)
        images = [torch.rand(3, 50, 70), torch.rand(3, 33, 90)]
        sizes = resized_sizes(transform, images)
        assert sizes == [(50, 70), (33, 90)]
        batch = batch_images(transform, images, sizes)
        assert batch.shape == (2, 3, 64, 96)
        assert transform([torch.rand(3, 50, 70)])[0].image_sizes == [(50, 70)]


def test_images_may_all_be_scaled_alike():
    transform = RetinaNetTransform(None, 1333, MEAN, STD, image_scale=1.5, _skip_resize=True)
    images = [torch.rand(3, 50, 70), torch.rand(3, 33, 90)]
    for training, sizes in ((False, [(75, 105), (50, 135)]), (True, [(50, 70), (33, 90)])):
        transform.train(training)
        found = resized_sizes(transform, images)
        batch = batch_images(transform, images, found)
        expected, targets = transform(images, [{"boxes": torch.tensor([[2.0, 4.0, 6.0, 8.0]])}] * 2)
        assert found == expected.image_sizes == sizes
        torch.testing.assert_close(batch, expected.tensors, rtol=0, atol=1e-5)
        assert torch.equal(targets[0]["boxes"][0], torch.tensor([2.0, 4, 6, 8]) * (1 if training else 1.5))


def test_vanishing_side_is_named():
    transform = GeneralizedRCNNTransform(800, 1333, MEAN, STD)
    with pytest.raises(RuntimeError, match=r"images\[1\] of \(1, 5000\) pixels"):
        resized_sizes(transform, [torch.rand(3, 50, 70), torch.rand(3, 1, 5000)])

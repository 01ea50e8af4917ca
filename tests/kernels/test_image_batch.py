"""Image batching, the reference and the kernel, against torchvision's transform."""

import functools

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from retina_fast.kernels import image_batch as module
from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.image_batch import batch_shape, image_batch, image_batch_reference
from retina_fast.transform import RetinaNetTransform, batch_images, resized_sizes
from tests.instruments.fake_gpu import gpu_work_of
from tests.ptx.cases import OTHER_ORDERS, check, names

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def kernel_batch(images, sizes, mean=MEAN, std=STD, size_divisible=32, dtype=torch.float32):
    """The batch by the kernel, whatever the device, in memory that was NaN."""
    shape = batch_shape(images, sizes, max(len(mean), len(std)), size_divisible)
    out = torch.full(shape, torch.nan, dtype=dtype, device=images[0].device).to(memory_format=torch.channels_last)
    module._image_batch_op(list(images), [side for size in sizes for side in size], list(mean), list(std), out)
    return out


def random_image(generator, height, width, dtype, device, channels=3):
    image = torch.rand(channels, height, width, generator=generator)
    return ((image * 256).to(dtype) if dtype == torch.uint8 else image.to(dtype)).to(device)


@triton.jit
def _fma_kernel(x_ptr):
    x = tl.load(x_ptr + tl.arange(0, 4))
    tl.store(x_ptr + tl.arange(0, 4), tl.fma(x, x, -1.0))


@functools.cache
def tolerance(device):
    """1e-5, but where positions are rounded twice: the interpreter of Triton 3.6 has no true fma."""
    x = torch.full((4,), 1 + 2**-12, device=device)
    _fma_kernel[(1,)](x)
    return 1e-5 if x[0] == 2**-11 + 2**-24 else 1e-4


def as_float(image):
    return image.float() / 255 if image.dtype == torch.uint8 else image


# Matches torchvision


@pytest.fixture
def large_tiles(monkeypatch):
    """Few programs: each costs the interpreter 10 ms and more."""
    monkeypatch.setattr(module, "_BLOCK", 1024)
    monkeypatch.setattr(module, "_ROWS", 32)


def test_fifty_random_sizes(device, large_tiles):
    transform = GeneralizedRCNNTransform(20, 32, MEAN, STD).eval()
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(1, 100, (50, 2), generator=generator)
    sides[::10, 0], sides[5::10, 1] = 1, 1  # one pixel high, one pixel wide
    sides[sides[:, 0] * 32 < sides[:, 1], 1] = 32  # the short side must keep a pixel
    sides[sides[:, 1] * 32 < sides[:, 0], 0] = 32
    for start in range(0, 50, 10):
        dtype = torch.uint8 if start < 30 else torch.float32
        images = [random_image(generator, h, w, dtype, device) for h, w in sides[start : start + 10].tolist()]
        expected, _ = transform([as_float(image) for image in images])
        batch = kernel_batch(images, expected.image_sizes)
        torch.testing.assert_close(batch, expected.tensors, rtol=0, atol=tolerance(device))
        by_reference = image_batch(images, expected.image_sizes, MEAN, STD)
        torch.testing.assert_close(by_reference, expected.tensors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_panorama(dtype, device, large_tiles):
    transform = GeneralizedRCNNTransform(800, 1333, MEAN, STD).eval()
    image = random_image(torch.Generator().manual_seed(0), 60, 10_000, dtype, device)
    expected, _ = transform([as_float(image)])
    batch = kernel_batch([image], expected.image_sizes)
    assert batch.shape == (1, 3, 32, 1344)
    torch.testing.assert_close(batch, expected.tensors, rtol=0, atol=tolerance(device))


def test_the_real_tile_sizes(device):
    image = random_image(torch.Generator().manual_seed(0), 9, 71, torch.uint8, device)
    sizes = [(13, 200)]
    expected = image_batch_reference([image], sizes, MEAN, STD, torch.empty(1, 3, 32, 224, device=device))
    torch.testing.assert_close(kernel_batch([image], sizes), expected, rtol=0, atol=tolerance(device))


def test_images_are_read_as_they_lie(device, large_tiles):
    """Photographs decoded to (H, W, C), crops, mirrored and grey ones, in one batch."""
    photo = random_image(torch.Generator().manual_seed(0), 40, 30, torch.uint8, device)
    images = [photo.permute(1, 2, 0).contiguous().permute(2, 0, 1), photo[:, 5:25, 3:20], photo[1:2], photo[:, ::2]]
    sizes = [(20, 15), (40, 34), (7, 9), (20, 30)]
    expected = image_batch([image.contiguous() for image in images], sizes, MEAN, STD)
    torch.testing.assert_close(kernel_batch(images, sizes), expected, rtol=0, atol=tolerance(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_out_and_in(dtype, device, large_tiles):
    generator = torch.Generator().manual_seed(0)
    bound = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    image = random_image(generator, 20, 30, torch.uint8, device)
    exact = image_batch([image], [(31, 40)], MEAN, STD)
    torch.testing.assert_close(kernel_batch([image], [(31, 40)], dtype=dtype).float(), exact, rtol=bound, atol=bound)
    out = torch.empty(exact.shape, dtype=dtype, device=device)
    assert image_batch([image], [(31, 40)], MEAN, STD, out=out) is out
    torch.testing.assert_close(out.float(), exact, rtol=bound, atol=bound)
    half = random_image(generator, 20, 30, dtype, device)
    expected = image_batch([half.float()], [(31, 40)], MEAN, STD)
    torch.testing.assert_close(kernel_batch([half], [(31, 40)]), expected, rtol=0, atol=tolerance(device))


# Edges


def test_one_constant_for_all_channels_and_other_channel_counts(device, large_tiles):
    for channels, mean, std in ((1, [0.5], [0.2]), (5, [0.5], [0.2]), (2, [0.5, 0.4], [0.2])):
        image = random_image(torch.Generator().manual_seed(0), 9, 7, torch.float32, device, channels)
        expected = image_batch_reference(
            [image], [(18, 14)], mean, std, torch.empty(1, channels, 32, 32, device=device)
        )
        torch.testing.assert_close(
            kernel_batch([image], [(18, 14)], mean, std), expected, rtol=0, atol=tolerance(device)
        )


def test_a_batch_that_is_no_multiple_of_anything(device, large_tiles):
    image = random_image(torch.Generator().manual_seed(0), 9, 7, torch.uint8, device)
    expected = image_batch([image], [(11, 13)], MEAN, STD, size_divisible=1)
    assert expected.shape == (1, 3, 11, 13)
    batch = kernel_batch([image], [(11, 13)], size_divisible=1)
    torch.testing.assert_close(batch, expected, rtol=0, atol=tolerance(device))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "mean", "std"), [(3, MEAN, STD), (1, MEAN, STD), (3, [0.5], STD), (1, [0.5], STD)]
)
def test_bytes_that_keep_their_size_are_those_of_their_floats(layout, dtype, channels, mean, std):
    """Whatever the batch's memory and dtype; also of one channel, which is repeated."""
    images = [
        random_image(torch.Generator().manual_seed(0), *size, torch.uint8, "cpu", channels) for size in ((9, 7), (5, 8))
    ]
    out = torch.full((2, 3, 12, 8), torch.nan, dtype=dtype).contiguous(memory_format=layout)
    image_batch(images, [(9, 7), (5, 8)], mean, std, 4, out)
    centre, spread = (torch.tensor(values)[:, None, None] for values in (mean, std))
    for image, batched in zip(images, out, strict=True):
        expected, (height, width) = (image.float() / 255 - centre) / spread, image.shape[1:]
        assert torch.equal(batched[:, :height, :width], expected.to(dtype))
        assert not batched[:, height:].any()
        assert not batched[:, :, width:].any()


def test_what_the_kernel_leaves_to_the_reference():
    image = torch.rand(3, 4, 4)
    assert module.kernel_serves([image, image[:1]], 3)
    assert not module.kernel_serves([image, image.half()], 3)
    assert not module.kernel_serves([image.double()], 3)
    assert not module.kernel_serves([image[:2]], 3)
    assert not module.kernel_serves([image.clone().requires_grad_()], 3)
    mixed = image_batch([image, (image * 255).to(torch.uint8)], [(4, 4)] * 2, MEAN, STD, 4)
    torch.testing.assert_close(mixed[1], mixed[0], rtol=0, atol=0.02)


def test_gradients_reach_the_images():
    image = torch.rand(3, 5, 6, requires_grad=True)
    image_batch([image], [(10, 12)], MEAN, STD).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


def test_an_out_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"out must be \(1, 3, 32, 32\), got \(1, 3, 32, 64\)"):
        image_batch([torch.rand(3, 5, 6)], [(10, 12)], MEAN, STD, out=torch.empty(1, 3, 32, 64))


# Registration


def test_opcheck(device):
    images = [torch.rand(3, 3, 4, device=device), torch.rand(1, 2, 2, device=device)]
    out = torch.empty(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last)
    torch.library.opcheck(module._image_batch_op, (images, [4, 4, 2, 3], MEAN, STD, out))


def test_compiles_in_one_graph(device):
    images = [torch.rand(3, 3, 4, device=device)]

    def batch(images):
        out = torch.empty((1, 3, 4, 4), device=device, memory_format=torch.channels_last)
        module._image_batch_op(images, [4, 4], MEAN, STD, out)
        return out * 2

    compiled = torch.compile(batch, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), batch(images))


@pytest.mark.parametrize("capturing", [False, True])
def test_a_graph_of_the_users_own_holds_no_upload(capturing, monkeypatch):
    """A replay would repeat it from a pinned buffer that is long in use for something else."""
    monkeypatch.setattr(module, "_is_capturing", lambda: capturing)

    def call():
        images = [torch.empty(3, 20, 30, device="cuda") for _ in range(2)]
        image_batch(images, [(31, 40)] * 2, MEAN, STD)

    names_of_work = [getattr(step, "name", "our kernel") for step in gpu_work_of(call)]
    assert names_of_work[-1] == "our kernel"
    assert names_of_work[:-1] == (["fill_"] * 16 if capturing else ["to"])


def test_the_table_filled_number_by_number_is_the_one_that_is_uploaded(monkeypatch):
    images, sizes = [torch.rand(3, 20, 30), torch.rand(1, 5, 7).mT], [(31, 40), (3, 2)]
    uploaded = module._table_on_device(images, sizes, torch.device("cpu"))
    monkeypatch.setattr(module, "_is_capturing", lambda: True)
    assert torch.equal(module._table_on_device(images, sizes, torch.device("cpu")), uploaded)


# Sizes, as the model's transform asks for them


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


# As compiled code


@pytest.mark.parametrize("name", names("image_batch"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("image_batch"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])


@pytest.mark.parametrize("place", [0, 1])
def test_vmap_over_one_of_the_images(place):
    generator = torch.Generator().manual_seed(0)
    fixed, *several = (torch.rand(3, 20, 30, generator=generator) for _ in range(4))
    sizes = [(24, 36), (20, 30)]

    def batch(image):
        return image_batch([fixed, image] if place else [image, fixed], sizes, MEAN, STD)

    assert torch.equal(torch.func.vmap(batch)(torch.stack(several)), torch.stack(list(map(batch, several))))

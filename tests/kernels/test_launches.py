"""Every op's launcher on fake CUDA tensors: no host read, no copy between devices, no kernel forgotten."""

from unittest import mock

import pytest
import torch

from retina_fast import retinanet_resnet18_fpn_v2
from retina_fast.deploy import plan as plans
from retina_fast.deploy.plan import EngineSettings, Plan
from retina_fast.forward import run_convs
from tests.instruments.fake_gpu import kernels, launches_of
from tests.instruments.kernel_calls import KERNEL_CALLS


@pytest.mark.parametrize("name", KERNEL_CALLS)
def test_launcher_never_waits_for_the_device(name):
    assert launches_of(KERNEL_CALLS[name].run)


def test_every_kernel_is_listed():
    listed = {launch.kernel.__name__ for case in KERNEL_CALLS.values() for launch in launches_of(case.run)}
    assert listed == set(kernels())


@pytest.mark.parametrize("name", KERNEL_CALLS)
def test_no_size_within_a_tuple_makes_triton_compile_again(name):
    """do_not_specialize does not reach into tuples: sizes there must be neither 1 nor a multiple of 16."""
    for launch in launches_of(KERNEL_CALLS[name].run):
        sizes = [size for arg in launch.args if isinstance(arg, tuple) for size in arg if isinstance(size, int)]
        assert not [size for size in sizes if size == 1 or size % 16 == 0]


def on_gpu(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="cuda")


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="raises because there is no GPU")


@pytest.mark.parametrize(
    "waits",
    [
        pytest.param(lambda: torch.tensor([1, 2], device="cuda"), marks=without_gpu),
        pytest.param(lambda: torch.tensor(1.0, device="cuda"), marks=without_gpu),
        lambda: on_gpu(3).cpu(),
        lambda: on_gpu(3).sum().item(),
        lambda: on_gpu(3).tolist(),
        lambda: bool(on_gpu() > 0),
        lambda: on_gpu(3).nonzero(),
        lambda: on_gpu(3)[on_gpu(3) > 0],
        lambda: on_gpu(3)[torch.tensor([1, 2])],
        lambda: on_gpu(3).copy_(torch.zeros(3)),
        pytest.param(lambda: torch.cuda.synchronize(), marks=without_gpu),
    ],
)
def test_the_instrument_catches(waits):
    with pytest.raises(Exception, match=r"."):
        launches_of(waits)


def test_the_instrument_lets_pass():
    assert launches_of(lambda: on_gpu(3).to("cpu", non_blocking=True) + 1) == []
    assert launches_of(lambda: on_gpu(3).copy_(torch.zeros(3), non_blocking=True)) == []
    assert launches_of(lambda: (on_gpu(3) + torch.tensor(3.0)) * torch.full((3,), 2.0, device="cuda")) == []


def test_the_engine_never_waits_for_the_device():
    """From images to detections: what one CUDA graph then holds, and the upload before it."""
    model = retinanet_resnet18_fpn_v2(num_classes=7).eval().bfloat16()
    settings = EngineSettings(torch.bfloat16, graphs=True, max_shapes=1)

    def run():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    tensors[name] = None if value is None else on_gpu(value.shape, dtype=value.dtype)
        cells = model.anchor_generator.cell_anchors
        model.anchor_generator.cell_anchors = [on_gpu(cell.shape) for cell in cells]
        images = [on_gpu(3, 80, 100), on_gpu(3, 90, 70)]
        plan = Plan(model, run_convs, (2, 3, 96, 128), torch.float32, settings)
        plan.make(images, [(80, 100), (90, 70)], None)
        detections = plan(images, [(80, 100), (90, 70)])
        assert detections.boxes.shape == (2, 300, 4)

    with mock.patch.object(plans, "captured", lambda run, stream: run), torch.no_grad():
        launched = {launch.kernel.__name__ for launch in launches_of(run)}
    assert {"_image_batch_kernel", "_group_norm_relu_kernel"} < launched

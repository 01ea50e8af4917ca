"""The engine and the chooser of ways: what is offered, chosen, remembered and reported."""

import json
from typing import Any

import pytest
import torch

from retina_fast import compile_inference
from retina_fast.deploy.fusion import layers
from retina_fast.deploy.fusion.fuse import count_convs, fuse_convs
from retina_fast.deploy.fusion.layers import FusedConv
from retina_fast.deploy.tuned import Chooser, choose_ways
from tests.deploy.engine_soak import small_model
from tests.deploy.pictures import images
from tests.instruments.fake_gpu import TorchOp, gpu_work_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "choices.json"


def test_the_engine_chooses_remembers_and_says(path, monkeypatch):
    model, pictures = small_model(), images((40, 50))
    expected = compile_inference(model, dtype=torch.float32)(pictures)
    engine = compile_inference(model, dtype=torch.float32, choices=path)
    found = engine(pictures)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    ((shape, counts),) = engine.report.ways.items()
    convs = [module for module in engine.model.modules() if isinstance(module, FusedConv)]
    assert sum(counts.values()) == sum(len(conv.ways) for conv in convs) >= count_convs(engine.model)
    assert f"fastest ways of the convs at {'x'.join(map(str, shape))}: " in str(engine)
    assert not any(conv._forward_pre_hooks for conv in convs)

    monkeypatch.setattr(Chooser, "_time", None)  # nothing is timed again
    again = compile_inference(model, dtype=torch.float32, choices=str(path))
    again(pictures)
    assert again.report.ways == engine.report.ways


def test_winograds_algorithm_is_among_the_ways(path, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 1)).requires_grad_(False)
    x, offered, calls = torch.randn(1, 8, 9, 9), [], []
    fuse_convs(model, lambda: model(x))

    def last(_, layer, ways, definitions=None):
        offered.append([*ways])
        return offered[-1][-1]

    def recorded(self, x, z, overwrite_z):
        calls.append(1)
        return self.run_eager(x, z)

    monkeypatch.setattr(Chooser, "choose", last)
    counts = choose_ways(model, lambda: model(x), Chooser(path, CPU))
    assert offered == [["eager", "fused", "winograd"], ["eager", "fused"]]
    assert counts == {"winograd": 1, "fused": 1}
    monkeypatch.setattr(FusedConv, "run_winograd", recorded)
    model(x)
    assert calls == [1]


def test_no_way_reads_a_sum_that_another_has_overwritten(path, monkeypatch):
    model: Any = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1)).requires_grad_(False)
    x, z = (torch.randn(1, 8, 9, 9).contiguous(memory_format=torch.channels_last) for _ in range(2))
    expected, found = model(x) + z, {}
    fuse_convs(model, lambda: model(x))

    def try_all(_, layer, ways, definitions=None):
        found.update({name: way().clone() for name, way in ways.items()})
        return "eager"

    monkeypatch.setattr(Chooser, "choose", try_all)
    choose_ways(model, lambda: model[0](x, z, overwrite_z=True), Chooser(path, CPU))
    assert [*found] == ["eager", "fused", "winograd"]
    for result in found.values():
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_ways_are_chosen_anew_in_another_dtype(path, monkeypatch):
    monkeypatch.setattr(Chooser, "choose", lambda _, layer, ways, definitions=None: [*ways][-1])
    pictures = images((40, 50))
    engine = compile_inference(small_model().cpu(), dtype=torch.float32, choices=path)
    expected = engine(pictures)
    (before,) = engine.report.ways.values()
    torch.testing.assert_close(engine.double()(pictures), expected, rtol=0, atol=1e-3)
    (after,) = engine.report.ways.values()
    assert before["winograd"] > 0 == after["winograd"]


def test_a_way_steps_aside_where_it_does_not_serve(monkeypatch):
    """In lower precision, and where somebody asks for gradients."""
    monkeypatch.setattr(layers, "_SMALL_WORK", 0)  # below which PyTorch's own conv serves
    model: Any = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(1, 8, 9, 9)
    fuse_convs(model, lambda: model(x))
    model[0].ways = {tuple(x.shape): "winograd"}
    assert model(x).requires_grad
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.no_grad():
            torch.testing.assert_close(model(x), model[0].run_fused(x, None), rtol=0, atol=0)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("way", ["eager", "fused"])
def test_a_remembered_way_is_taken(path, way, monkeypatch):
    model, pictures, calls = small_model().cpu(), images((40, 50)), []  # the replay of a graph calls nothing
    compile_inference(model, dtype=torch.float32, choices=path)(pictures)
    content = json.loads(path.read_text())
    ((name, choices),) = content["choices"].items()
    content["choices"][name] = dict.fromkeys(choices, way)
    path.write_text(json.dumps(content))
    for name in ("eager", "fused"):

        def recorded(*args, run=getattr(FusedConv, f"run_{name}"), name=name):  # noqa: B008
            calls.append(name)
            return run(*args)

        monkeypatch.setattr(FusedConv, f"run_{name}", recorded)
    engine = compile_inference(model, dtype=torch.float32, choices=path)
    for _ in range(2):  # the first call looks the ways up
        calls.clear()
        engine(pictures)
        assert set(calls) == {way}


def test_without_a_file_a_cpu_times_nothing(monkeypatch):
    monkeypatch.setattr(Chooser, "choose", None)
    engine = compile_inference(small_model().cpu(), dtype=torch.float32)
    engine(images((40, 50)))
    assert not engine.report.ways


def layers_of_a_product_and_others() -> Any:
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(8, 16, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU()),
        torch.nn.Conv2d(16, 8, 1),
    )
    x = torch.ones(2, 8, 5, 7).contiguous(memory_format=torch.channels_last)
    fuse_convs(model, lambda: model(x))
    return [model[0], model[2], model[4]], x


def test_a_product_is_right_and_for_gpus():
    conv, x = layers_of_a_product_and_others()[0][0], torch.randn(2, 8, 5, 7)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = torch.nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double()).relu()
        torch.testing.assert_close(conv.run("product", x, None).double(), exact, rtol=1e-5, atol=1e-5)
        conv.ways = {tuple(x.shape): "product"}  # from a file of a GPU
        assert conv.possible_ways(x, None) == ["eager", "fused"]
        torch.testing.assert_close(conv(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_pointwise_conv_with_relu_may_be_a_product():
    """On fake CUDA tensors, where it is one kernel; a 3x3 conv and one without ReLU are not offered it."""
    ways = []

    def prepare():
        with torch.device("cuda"):
            return layers_of_a_product_and_others()

    @torch.no_grad()
    def call(prepared):
        layers, x = prepared
        for layer in layers:
            ways.append(layer.possible_ways(x, None))
            x = layer.run(ways[-1][-1], x, None)
            assert x.is_contiguous(memory_format=torch.channels_last)

    work = gpu_work_of(call, prepare)
    assert ways == [["eager", "epilogue", "product"], *[["eager", "epilogue"]] * 2]
    names = [step.name if isinstance(step, TorchOp) else "epilogue" for step in work]
    assert names == ["_addmm_activation", *["convolution", "epilogue"] * 2]


@pytest.mark.parametrize(
    ("channels", "activation", "dtype", "served"),
    [
        (36, "none", torch.bfloat16, True),
        (819, "none", torch.float16, True),
        (40, "none", torch.bfloat16, False),
        (36, "relu", torch.bfloat16, False),
        (36, "none", torch.float32, False),
    ],
)
def test_a_conv_whose_channels_no_tensor_core_takes_may_be_padded(channels, activation, dtype, served):
    """On fake CUDA tensors: one conv of a multiple of 8 channels, then one pass of ours."""
    ways, shapes = [], []

    def prepare():
        with torch.device("cuda"):
            model: Any = torch.nn.Sequential(torch.nn.Conv2d(8, channels, 3, padding=1, dtype=dtype))
            x = torch.ones(2, 8, 5, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
            fuse_convs(model, lambda: model(x))
            return model[0], x

    @torch.no_grad()
    def call(prepared):
        conv, x = prepared
        conv.activation = activation
        ways.extend(conv.possible_ways(x, None))
        shapes.append(conv.run(ways[-1], x, None).shape)

    *_, before, last = gpu_work_of(call, prepare)
    assert ("padded" in ways) == served
    assert shapes == [(2, channels, 5, 7)]
    assert isinstance(before, TorchOp)
    assert before.name == "convolution"
    assert before.shape == (2, channels + -channels % 8 if served else channels, 5, 7)
    assert not isinstance(last, TorchOp)
    assert last.kernel.__name__ == ("_first_channels_kernel" if served else "_conv_epilogue_kernel")


def test_a_padded_conv_is_right():
    conv: Any = torch.nn.Sequential(torch.nn.Conv2d(8, 9, 3, padding=1)).requires_grad_(False)
    x = torch.randn(2, 8, 5, 7)
    fuse_convs(conv, lambda: conv(x))
    found = conv[0].run("padded", x, None)
    torch.testing.assert_close(found, conv[0].run("eager", x, None))
    conv[0].weight.mul_(2)  # the padded weights are made anew
    torch.testing.assert_close(conv[0].run("padded", x, None), conv[0].run("eager", x, None))

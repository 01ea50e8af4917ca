"""Mobile SpineNet against the published figures, its rules by their effect, and through engine and export."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import retina_fast
from retina_fast.backbones.specification import MOBILE_KINDS, MOBILE_SPINENET, added_raw, checked
from retina_fast.backbones.spinenet_mobile import MOBILE_SIZES, InvertedBottleneck, MobileSpineNet
from retina_fast.builders import MODELS
from retina_fast.heads import SeparableConv2d, run_head
from retina_fast.search.cost import cost
from tests.instruments.exported import apart

# The published rows once more, as (level, parents), blocks 2 to 17; P3..P7 are blocks 14, 13, 15, 17, 16.
TABLE = """2 0 1; 2 1 2; 4 1 2; 3 3 4; 4 3 5; 6 4 6; 4 4 6; 5 7 8; 7 7 9; 5 9 10; 5 9 11; 4 6 11; 3 5 11; 5 8 13;
7 6 15; 6 13 15"""
OUTPUTS = {"p3": 14, "p4": 13, "p5": 15, "p6": 17, "p7": 16}

PUBLISHED = {  # parameters with 91 classes, of the backbone, and billions of multiply-adds at the published size
    "49": (2_337_579, 2_268_708, 0.981),
    "49s": (1_030_653, 975_678, 0.496),
    "49xs": (872_711, 842_456, 0.166),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def tiny(**kwargs: Any) -> Any:
    kwargs = {"width": 0.2, "out_channels": 8, **kwargs}
    return MobileSpineNet(**kwargs)


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", ["49xs", *(pytest.param(x, marks=pytest.mark.slow) for x in ("49", "49s"))])
def test_published_parameters_and_multiply_adds(size):
    with torch.device("meta"):
        model = MODELS[f"retinanet_spinenet{size}_mobile"]().eval()
        side = model.transform.max_size
        assert (trainable(model), trainable(model.backbone)) == PUBLISHED[size][:2]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            levels = model.backbone(torch.empty(1, 3, side, side))
            run_head(model.head, list(levels.values()))
    assert [level.shape[2] for level in levels.values()] == [side // stride for stride in (8, 16, 32, 64, 128)]
    assert counter.get_total_flops() / 2e9 == pytest.approx(PUBLISHED[size][2], abs=0.0005)


def test_published_counts_once_more_from_the_rows():
    for size, (parameters, _, macs) in PUBLISHED.items():
        counted = cost(MOBILE_SPINENET, MOBILE_SIZES[size])
        assert counted.parameters == parameters
        assert counted.macs / 1e9 == pytest.approx(macs, abs=0.0005)


def test_the_published_specification():
    for block, row in zip(MOBILE_SPINENET, TABLE.split(";"), strict=True):
        level, *parents = map(int, row.split())
        assert block[:3] == (level, "mbconv", tuple(parents))
    assert {f"p{block.level}": row + 2 for row, block in enumerate(MOBILE_SPINENET) if block.is_output} == OUTPUTS
    assert checked(MOBILE_SPINENET, MOBILE_KINDS) == MOBILE_SPINENET
    assert [(row + 2, numbers) for row, numbers in enumerate(added_raw(MOBILE_SPINENET)) if numbers] == [(15, (12,))]
    with pytest.raises(ValueError, match=r"row 0 .*kind must be mbconv, got 'bottleneck'"):
        tiny(specification=[(3, "bottleneck", (0, 1), True)])


def test_every_block_sees_its_parents_and_the_block_that_nobody_uses():
    """Recomputed from the outputs of the blocks, by the table above."""
    net = tiny().double().eval()
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}

    def note(number: int):
        def hook(module, arguments, output):
            inputs[number], outputs[number] = arguments[0], output

        return hook

    for number, block in enumerate(net.blocks):
        block.register_forward_hook(note(number))
    levels = net(torch.rand(1, 3, 256, 128, dtype=torch.float64))
    assert (outputs[0].shape[2:], outputs[1].shape[2:]) == ((128, 64), (64, 32))
    torch.testing.assert_close(inputs[1], outputs[0])
    for number, row in enumerate(TABLE.split(";"), start=2):
        parents = [int(parent) for parent in row.split()[1:]]
        merged: Any = sum(link(outputs[parent]) for link, parent in zip(net.links[number - 2], parents, strict=True))
        if number == 15:
            merged = merged + outputs[12]
        torch.testing.assert_close(inputs[number], F.silu(merged))
    for name, number in OUTPUTS.items():
        torch.testing.assert_close(levels[name], net.outputs[name[1]](outputs[number]))


@pytest.mark.parametrize(("activation", "gate"), [("silu", torch.sigmoid), ("hardswish", F.hardsigmoid)])
def test_an_inverted_bottleneck_step_by_step(activation, gate):
    conv = MobileSpineNet.conv_layer(activation, lambda channels: nn.Identity())
    block: Any = InvertedBottleneck(conv, 10, 10, 1, 0.0)
    act = {"silu": F.silu, "hardswish": F.hardswish}[activation]
    (expand, *_), (depthwise, *_), squeeze, (project, *_), _ = block.branch
    assert (squeeze.fc1.out_channels, depthwise.groups, expand.out_channels) == (2, 60, 60)
    x = torch.randn(2, 10, 6, 5)
    inside = act(F.conv2d(act(F.conv2d(x, expand.weight)), depthwise.weight, padding=1, groups=60))
    scale = gate(squeeze.fc2(act(squeeze.fc1(inside.mean((2, 3), keepdim=True)))))
    torch.testing.assert_close(block(x), F.conv2d(inside * scale, project.weight) + x)
    assert not InvertedBottleneck(conv, 10, 12, 1, 0.0).has_shortcut
    assert not InvertedBottleneck(conv, 10, 10, 2, 0.0).has_shortcut


def test_a_link_halves_once_a_level_or_repeats_pixels():
    net = tiny().eval()
    strides = [[[step[0].stride[0] for step in link] for link in row] for row in (net.links[0], net.links[2])]
    assert strides == [[[2, 1], [1]], [[2, 2, 1], [2, 2, 1]]]  # levels 1 and 2 to 2, and 2 and 2 to 4
    upsample = net.links[3][1][0]  # block 4, of level 4, to block 5, of level 3
    torch.testing.assert_close(upsample(torch.tensor([[[[1.0, 2.0]]]])), torch.tensor([[[[1.0, 1, 2, 2]] * 2]]))


def test_separable_heads():
    model: Any = retina_fast.retinanet_spinenet49xs_mobile(num_classes=2, min_size=128)
    head = model.head.classification_head
    assert {type(conv) for conv in (*head.conv.convs, head.cls_logits, model.head.regression_head.bbox_reg)} == {
        SeparableConv2d
    }
    assert head.cls_logits.bias.tolist() == pytest.approx([-4.595] * 18, abs=1e-3)
    scores = model.eval()([torch.rand(3, 128, 128)])[0]["scores"]
    assert scores.numel() == 0  # 0.01, as torchvision's heads begin
    model.set_num_classes(5)
    assert type(head.cls_logits) is SeparableConv2d
    outputs = run_head(model.head, [torch.rand(1, 24, 4, 4)] * 5)
    assert [level.shape[1] for level in outputs["cls_logits"]] == [45] * 5


def test_stochastic_depth_and_bad_arguments():
    net = tiny(stochastic_depth=0.3)
    rates = [block.branch[-1].p for block in net.blocks]
    assert rates == pytest.approx([0, 0, *(0.3 * (row + 1) / 16 for row in range(16))])
    with pytest.raises(ValueError, match="activation must be one of silu, hardswish, got 'relu'"):
        tiny(activation="relu")
    with pytest.raises(ValueError, match="size must be one of 49, 49s, 49xs, got '96'"):
        MobileSpineNet.of_size("96")


def confident(**kwargs) -> Any:
    """A small detector that finds something."""
    model: Any = retina_fast.retinanet_spinenet49xs_mobile(num_classes=3, min_size=128, max_size=128, **kwargs).eval()
    for part in (model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg):
        nn.init.normal_(part.weight, std=3.0)
        nn.init.zeros_(part.bias)
    return model


@pytest.mark.parametrize("activation", ["silu", pytest.param("hardswish", marks=pytest.mark.slow)])
def test_the_engine_finds_the_same(activation):
    model, picture = confident(activation=activation), torch.rand(3, 128, 128)
    engine = retina_fast.compile_inference(model, [picture], dtype=torch.float32)
    assert engine.report.folded == engine.report.norms - 40  # the heads have their own for each level
    expected, found = model([picture])[0], engine([picture])[0]
    assert len(expected["boxes"]) == len(found["boxes"]) > 20
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=0, atol=1e-2)


@pytest.mark.slow
def test_an_exported_file_finds_the_same(tmp_path):
    pytest.importorskip("onnxscript")
    model = confident()
    file = tmp_path / "mobile.onnx"
    retina_fast.export(model, file, "onnx", (128, 128))
    pictures = (torch.rand(1, 3, 128, 128) * 255).to(torch.uint8)
    expected = model.detect(pictures / 255)
    boxes, scores, lost = apart(retina_fast.load_exported(file)(pictures), expected)
    assert int(expected.counts) > 20
    assert lost == 0, (boxes, scores)

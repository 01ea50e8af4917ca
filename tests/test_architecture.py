"""The tables of docs/architecture.md agree with the real networks.

The networks run on the meta device, which computes shapes alone. Every cell of the tables is compared, so that a number
that is changed in the page, or in a network, fails here.
"""

import re
from collections import Counter
from functools import cache
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

import retina_fast
from retina_fast.backbones.specification import STEM, added_raw
from retina_fast.model import RetinaNet

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
LEVELS = range(3, 8)
RATIOS = ("0.5", "1", "2")


def page_table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the page, without its two header lines."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


class Trace:
    """A network on the meta device, and the shapes that went in and out of each of its modules for one image."""

    def __init__(self, name: str, height: int, width: int, classes: int = 80, **kwargs: object) -> None:
        if "resnet" in name:
            kwargs["weights_backbone"] = None
        with torch.device("meta"):
            self.model: RetinaNet = getattr(retina_fast, name)(num_classes=classes, **kwargs).eval()
        self.calls: dict[str, list[tuple[str, str]]] = {}
        self.macs: Counter[str] = Counter()
        for path, module in self.model.named_modules():
            module.register_forward_hook(self._hook(path))
        with torch.no_grad():
            levels = list(self.model.backbone(torch.empty(1, 3, height, width, device="meta")).values())
            self.model.head(levels)
        self.levels = [size(level) for level in levels]

    def _hook(self, path: str):
        def record(module, inputs, output):
            if not isinstance(inputs[0], torch.Tensor) or not isinstance(output, torch.Tensor):
                return
            self.calls.setdefault(path, []).append((size(inputs[0]), size(output)))
            if isinstance(module, nn.Conv2d):
                self.macs[path] += output[0].numel() * module.weight[0].numel()

        return record

    def convs(self, root: str = "") -> dict[str, nn.Conv2d]:
        return {
            path: module
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d) and path.startswith(root)
        }

    def macs_under(self, *roots: str) -> int:
        return sum(count for path, count in self.macs.items() if path.startswith(roots))

    def parameters(self, *roots: str) -> int:
        return sum(p.numel() for path, p in self.model.named_parameters() if path.startswith(roots))


@cache
def trace(name: str, side: int) -> Trace:
    return Trace(name, side, side)


def size(x: torch.Tensor) -> str:
    """Height, width and channels of a (B, C, H, W) tensor."""
    return "x".join(map(str, (*x.shape[2:], x.shape[1])))


def conv_words(conv: nn.Module) -> str:
    if isinstance(conv, nn.MaxPool2d):
        return f"max pool {conv.kernel_size}x{conv.kernel_size}, stride {conv.stride}, padding {conv.padding}"
    assert isinstance(conv, nn.Conv2d)
    return f"{conv.kernel_size[0]}x{conv.kernel_size[1]}, stride {conv.stride[0]}, padding {conv.padding[0]}"


def parameter_count(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"


def expanded(pattern: str) -> list[str]:
    """The module names that a row stands for: `layer1.1-2.conv1` is layer1.1.conv1 and layer1.2.conv1."""
    span = re.search(r"\.(\d+)-(\d+)\.", pattern)
    if not span:
        return [pattern]
    names = [f"{pattern[: span.start()]}.{i}.{pattern[span.end() :]}" for i in range(int(span[1]), int(span[2]) + 1)]
    return [name for part in names for name in expanded(part)]


def conv_row(traced: Trace, part: str, pattern: str) -> list[str]:
    """What the page must say of equal convs; for the heads, which see five levels, it names channels, not sizes."""
    rows = set()
    for name in expanded(pattern):
        path = f"{part}.{name}"
        conv = traced.model.get_submodule(path)
        calls = traced.calls[path]
        sizes = [*calls[0]] if len(calls) == 1 else [" to ".join(shape.split("x")[2] for shape in calls[0])]
        rows.add((conv_words(conv), *sizes, parameter_count(conv), f"{traced.macs[path] / 1e6:.1f}"))
    (row,) = rows
    return [pattern, *row]


def test_every_conv_of_the_backbone():
    traced = trace("retinanet_resnet50_fpn", 512)
    rows = page_table("The backbone: ResNet-50 with a feature pyramid")
    assert rows == [conv_row(traced, "backbone", row[0]) for row in rows]
    named = [f"backbone.{name}" for row in rows for name in expanded(row[0])]
    assert Counter(named) == Counter(["backbone.body.maxpool", *traced.convs("backbone.")])


def test_the_shapes_of_the_picture():
    traced = trace("retinanet_resnet50_fpn", 512)
    picture = PAGE.split("```text", 1)[1].split("```", 1)[0]
    stages = {f"C{i + 1}": traced.calls[f"backbone.body.layer{i}"][0][1] for i in range(1, 5)}
    levels = {f"P{level}": shape for level, shape in zip(LEVELS, traced.levels, strict=True)}
    assert dict(re.findall(r"\b([CP]\d) +(\d+x\d+x\d+)", picture)) == stages | levels
    assert re.findall(r"--> +(\d+x\d+x\d+)", picture) == [
        traced.calls[f"head.{module}"][0][1]
        for module in ("classification_head.cls_logits", "regression_head.bbox_reg")
    ]


def test_every_conv_of_the_heads():
    traced = trace("retinanet_resnet50_fpn", 512)
    rows = page_table("The heads")
    activations = {"conv": "ReLU", "cls_logits": "sigmoid", "bbox_reg": "none"}
    expected = [conv_row(traced, "head", row[0]) for row in rows]
    for row in expected:
        row.append(activations[row[0].split(".")[1]])
    assert rows == expected
    assert Counter(f"head.{name}" for row in rows for name in expanded(row[0])) == Counter(list(traced.convs("head.")))
    for head in (traced.model.head.classification_head, traced.model.head.regression_head):
        assert all(len(block) == 2 and isinstance(block[1], nn.ReLU) for block in head.conv)


def level_rows(traced: Trace, side: int, tower: str) -> list[list[str]]:
    """What the page must say of the five levels of a square image."""
    rows, total = [], 0
    for i, level in enumerate(LEVELS):
        feature = traced.levels[i]
        convs = [traced.calls[f"head.{head}_head.{tower}"][i] for head in ("classification", "regression")]
        assert set(convs[0] + convs[1]) == {feature}
        classes = traced.calls["head.classification_head.cls_logits"][i][1]
        boxes = traced.calls["head.regression_head.bbox_reg"][i][1]
        anchors = int(boxes.split("x")[0]) * int(boxes.split("x")[1]) * 9
        total += anchors
        stride = str(side // int(feature.split("x")[0]))
        rows.append([f"P{level}", stride, feature, feature, classes, boxes, f"{anchors:,}"])
    return [*rows, ["all", "", "", "", "", "", f"{total:,}"]]


def test_the_five_levels():
    expected = level_rows(trace("retinanet_resnet50_fpn", 512), 512, "conv.3.0")
    assert page_table("What each level gives") == expected
    expected = level_rows(trace("retinanet_spinenet49", 640), 640, "conv.convs.3")
    assert page_table("What each level of SpineNet-49 gives") == expected


def part_rows(parts: dict[str, tuple[str, ...]], *traces: Trace) -> list[list[str]]:
    """Parameters, then multiply-adds in thousand millions, of the parts of some networks; at last of all parts."""
    rows = []
    for name, roots in {**parts, "all": ("",)}.items():
        parameters = [f"{traced.parameters(*roots):,}" for traced in traces]
        rows.append([name, *parameters, *(f"{traced.macs_under(*roots) / 1e9:.2f}" for traced in traces)])
    for traced in traces:
        assert sum(traced.parameters(*roots) for roots in parts.values()) == traced.parameters("")
        assert sum(traced.macs_under(*roots) for roots in parts.values()) == traced.macs_under("")
    return rows


def test_what_the_parts_cost():
    body, fpn = "backbone.body.", "backbone.fpn."
    parts: dict[str, tuple[str, ...]] = {
        "stem": (f"{body}conv1", f"{body}bn1"),
        **{f"stage {i}, C{i + 1}": (f"{body}layer{i}.",) for i in range(1, 5)},
        "laterals": (f"{fpn}inner_blocks.",),
        "outputs P3 to P5": (f"{fpn}layer_blocks.",),
        "P6 and P7": (f"{fpn}extra_blocks.",),
        "class head": ("head.classification_head.",),
        "box head": ("head.regression_head.",),
    }
    traces = [trace(name, 512) for name in ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")]
    assert page_table("What the parts cost") == part_rows(parts, *traces)


def test_what_differs_in_v2():
    columns = []
    for traced in (trace(name, 512) for name in ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")):
        model, p6 = traced.model, traced.model.backbone.fpn.extra_blocks.p6
        block = model.head.classification_head.conv[0]
        (norm,) = [f"GroupNorm, {part.num_groups} groups" for part in block if isinstance(part, nn.GroupNorm)] or ["no"]
        columns.append(
            {
                "input of P6": traced.calls["backbone.fpn.extra_blocks.p6"][0][0],
                "parameters of P6": parameter_count(p6),
                "norm after each tower conv": norm,
                "bias of the tower convs": "no" if block[0].bias is None else "yes",
                "parameters of a tower": parameter_count(model.head.classification_head.conv),
                "box loss": {"l1": "L1 of the deltas", "giou": "GIoU of the boxes"}[
                    model.head.regression_head._loss_type
                ],
                "parameters": parameter_count(model),
            }
        )
    v1, v2 = columns
    assert page_table("What differs in v2") == [[name, v1[name], v2[name]] for name in v1]


def test_the_anchors():
    generator = trace("retinanet_resnet50_fpn", 512).model.anchor_generator
    rows = []
    for level, sizes, ratios, cells in zip(
        LEVELS,
        generator.sizes,
        generator.aspect_ratios,
        AnchorGenerator(generator.sizes, generator.aspect_ratios).cell_anchors,
        strict=True,
    ):
        assert [f"{ratio:g}" for ratio in ratios] == list(RATIOS)
        shapes = [f"{int(x2 - x1)}x{int(y2 - y1)}" for x1, y1, x2, y2 in cells.tolist()]
        rows.append([f"P{level}", ", ".join(map(str, sizes)), *(", ".join(shapes[i : i + 3]) for i in (0, 3, 6))])
    assert page_table("The anchors") == rows


@pytest.mark.parametrize(
    ("height", "width", "anchors", "classes"), [(512, 512, 9, 80), (800, 1344, 9, 91), (544, 608, 3, 2)]
)
def test_the_formulas(height, width, anchors, classes):
    sizes = tuple((32 * 2**i,) if anchors == 3 else tuple(32 * 2**i + j for j in range(3)) for i in range(5))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    traced = Trace("retinanet_resnet50_fpn", height, width, classes, anchor_generator=generator)
    values = {row[0]: row[1] for row in page_table("In formulas")}
    names = {"H": height, "W": width, "A": anchors, "K": classes, "ceil": ceil, "sum": sum, "range": range}

    def value(what: str, **more: int):
        return eval(values[what], names | more)

    names["S"] = value("cells of an image, S")
    shapes = {"stem, after its conv": "conv1", "stem, after its max pool": "maxpool"}
    for what, module in shapes.items():
        assert "x".join(map(str, value(what))) == traced.calls[f"backbone.body.{module}"][0][1]
    for stage in range(1, 5):
        shape = value("output of stage s, 1 to 4", s=stage)
        assert "x".join(map(str, shape)) == traced.calls[f"backbone.body.layer{stage}"][0][1]
    outputs = {"class": "classification_head.cls_logits", "box": "regression_head.bbox_reg"}
    for i, level in enumerate(LEVELS):
        assert "x".join(map(str, value("feature map of level l", l=level))) == traced.levels[i]
        for what, module in outputs.items():
            seen = traced.calls[f"head.{module}"][i][1]
            assert "x".join(map(str, value(f"{what} output of level l", l=level))) == seen
    boxes = [traced.calls["head.regression_head.bbox_reg"][i][1].split("x") for i in range(5)]
    assert value("anchors of an image") == sum(int(h) * int(w) * int(c) // 4 for h, w, c in boxes)
    for what, head in (("class", "classification"), ("box", "regression")):
        assert value(f"parameters of the {what} head") == traced.parameters(f"head.{head}_head.")
        assert value(f"multiply-adds of the {what} head") == traced.macs_under(f"head.{head}_head.")
    assert set(values) == {
        *shapes,
        "output of stage s, 1 to 4",
        "feature map of level l",
        "cells of an image, S",
        *(f"{what} output of level l" for what in outputs),
        "anchors of an image",
        *(f"{figure} of the {what} head" for figure in ("parameters", "multiply-adds") for what in outputs),
    }


def resampling(source: int, target: int) -> str:
    if source == target:
        return "same size"
    return f"down {2 ** (target - source)}" if target > source else f"up {2 ** (source - target)}"


def test_the_blocks_of_spinenet():
    traced = trace("retinanet_spinenet49", 640)
    backbone = traced.model.backbone
    blocks = [*STEM, *backbone.specification]
    rows = []
    for number, block in enumerate(blocks):
        group = backbone.blocks[number]
        parents = [f"{p} {resampling(blocks[p].level, block.level)}" for p in block.parents]
        if number < len(STEM):
            parents = ["stem"] if number == 0 else ["0 as it is"]
        else:
            parents += [f"{p} as it is" for p in added_raw(backbone.specification)[number - len(STEM)]]
        ((_, output),) = traced.calls[f"backbone.blocks.{number}"]
        macs = f"{traced.macs_under(f'backbone.blocks.{number}.') / 1e6:.1f}"
        output_name = f"P{block.level}" if block.is_output else ""
        rows.append(
            [
                *(str(number), str(block.level), block.kind, ", ".join(parents)),
                *(str(group.width), output, parameter_count(group), macs, output_name),
            ]
        )
    assert page_table("The 17 blocks of SpineNet-49") == rows


def step_words(step: nn.Module) -> str:
    if isinstance(step, nn.MaxPool2d):
        return f"max pool {step.kernel_size}x{step.kernel_size} of stride {step.stride}"
    if isinstance(step, nn.Upsample):
        assert step.mode == "nearest"
        return f"nearest neighbour x{step.scale_factor:g}"
    assert isinstance(step, nn.Sequential)
    conv = step[0]
    assert isinstance(conv, nn.Conv2d)
    stride = f" of stride {conv.stride[0]}" if conv.stride[0] > 1 else ""
    return f"{conv.kernel_size[0]}x{conv.kernel_size[1]} conv{stride}{'' if len(step) == 3 else ' without activation'}"


def test_the_links_of_spinenet():
    backbone = trace("retinanet_spinenet49", 640).model.backbone
    blocks = [*STEM, *backbone.specification]
    kinds: Counter[tuple[int, str, str]] = Counter()
    for block, links in zip(backbone.specification, backbone.links, strict=True):
        for parent, link in zip(block.parents, links, strict=True):
            rise = block.level - blocks[parent].level
            kinds[rise, resampling(blocks[parent].level, block.level), ", ".join(map(step_words, link))] += 1
            assert link[0][0].out_channels == backbone.blocks[parent].width // 2
    assert page_table("Its links") == [[name, steps, str(count)] for (_, name, steps), count in sorted(kinds.items())]


def test_what_the_parts_of_spinenet_cost():
    traced, backbone = trace("retinanet_spinenet49", 640), "backbone."
    parts = {
        "stem, with blocks 0 and 1": (f"{backbone}stem.", f"{backbone}blocks.0.", f"{backbone}blocks.1."),
        "blocks 2 to 16": tuple(f"{backbone}blocks.{i}." for i in range(2, 17)),
        "30 links": (f"{backbone}links.",),
        "5 outputs": (f"{backbone}outputs.",),
        "class head": ("head.classification_head.",),
        "box head": ("head.regression_head.",),
    }
    assert page_table("What the parts of SpineNet-49 cost") == part_rows(parts, traced)
    tower = traced.model.head.classification_head.conv
    assert len(tower.convs) == 4
    assert [len(norms) for norms in tower.norms] == [4] * 5

"""retina_fast.ops in torchvision.ops' own place: what is taken, returned and raised, and inside of compilers."""

from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.tv_tensors import BoundingBoxes

from retina_fast import ops
from retina_fast.kernels import batched_nms

EMPTY = torch.empty(0)
BOXES = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [0, 0, 9, 9]])
SCORES = torch.tensor([0.5, 0.9, 0.1])
IDXS = torch.tensor([0, 0, 1])

ODD: dict[str, tuple[Any, ...]] = {
    "boxes (4,)": ("nms", BOXES[0], SCORES, 0.5),
    "boxes (3, 5)": ("nms", torch.rand(3, 5), SCORES, 0.5),
    "scores (3, 2)": ("nms", BOXES, torch.rand(3, 2), 0.5),
    "4 scores for 3 boxes": ("nms", BOXES, torch.rand(4), 0.5),
    "integer boxes": ("nms", BOXES.long(), SCORES, 0.5),
    "integer boxes and scores": ("nms", BOXES.long(), SCORES.long(), 0.5),
    "half scores": ("nms", BOXES, SCORES.half(), 0.5),
    "double scores": ("nms", BOXES, SCORES.double(), 0.5),
    "a threshold that is a tensor": ("nms", BOXES, SCORES, torch.tensor(0.5)),
    "an integer threshold": ("nms", BOXES, SCORES, 1),
    "no threshold": ("nms", BOXES, SCORES, None),
    "empty": ("nms", torch.rand(0, 4), torch.rand(0), 0.5),
    "torch.tensor([])": ("batched_nms", EMPTY, EMPTY, EMPTY, 0.5),
    "empty boxes and nothing else": ("batched_nms", EMPTY, None, None, None),
    "empty (0, 4)": ("batched_nms", torch.rand(0, 4), torch.rand(0), torch.rand(0).long(), 0.5),
    "float idxs": ("batched_nms", BOXES, SCORES, IDXS.float(), 0.5),
    "fractions as idxs": ("batched_nms", BOXES, SCORES, IDXS / 3, 0.5),
    "bool idxs": ("batched_nms", BOXES, SCORES, IDXS.bool(), 0.5),
    "negative idxs": ("batched_nms", BOXES, SCORES, -IDXS, 0.5),
    "int8 idxs": ("batched_nms", BOXES, SCORES, IDXS.to(torch.int8), 0.5),
    "idxs (3, 1)": ("batched_nms", BOXES, SCORES, IDXS[:, None], 0.5),
    "2 idxs": ("batched_nms", BOXES, SCORES, IDXS[:2], 0.5),
    "sparse idxs": ("batched_nms", BOXES, SCORES, IDXS.to_sparse(), 0.5),
    "idxs without values": ("batched_nms", BOXES, SCORES, IDXS.to("meta"), 0.5),
    "uint16 idxs": ("batched_nms", BOXES, SCORES, IDXS.to(torch.uint16), 0.5),
    "idxs that are no numbers": ("batched_nms", BOXES, SCORES, torch.tensor([float("nan")] * 3), 0.5),
    "scores that are a list": ("nms", BOXES, SCORES.tolist(), 0.5),
    "no scores": ("nms", BOXES, None, 0.5),
    "sparse boxes": ("nms", BOXES.to_sparse(), SCORES, 0.5),
    "views of negatives": (
        "batched_nms",
        torch._neg_view(-BOXES),
        torch._neg_view(-SCORES),
        torch._neg_view(-IDXS),
        0.5,
    ),
    "every second number": ("batched_nms", BOXES.repeat_interleave(2, 1)[:, ::2], SCORES, IDXS, 0.5),
    "one number for all": ("batched_nms", BOXES[:1].expand(3, 4), SCORES[:1].expand(3), IDXS[:1].expand(3), 0.5),
    "inputs with gradients": (
        "batched_nms",
        BOXES.clone().requires_grad_(),
        SCORES.clone().requires_grad_(),
        IDXS,
        0.5,
    ),
    "boxes of torchvision's own kind": (
        "batched_nms",
        BoundingBoxes(BOXES, format="XYXY", canvas_size=(9, 9)),
        SCORES,
        IDXS,
        0.5,
    ),
    "a threshold that is NaN": ("batched_nms", BOXES, SCORES, IDXS, float("nan")),
    "a threshold of NumPy's": ("nms", BOXES, SCORES, np.float32(0.5)),
    "a threshold below 0": ("nms", BOXES, SCORES, -0.1),
    "batched boxes (3, 5)": ("batched_nms", torch.rand(3, 5), SCORES, IDXS, 0.5),
}


@pytest.mark.parametrize("few", [ops.FEW, 0])
@pytest.mark.parametrize("name", ODD)
def test_odd_input_gets_what_torchvision_gives(name, few, monkeypatch):
    """Also where torchvision's own function does not serve a few boxes."""
    function, *arguments = ODD[name]
    for module in (ops, batched_nms):
        monkeypatch.setattr(module, "FEW", few)

    def outcome(module):
        try:
            kept = getattr(module, function)(*arguments)
            return type(kept), kept.tolist(), kept.dtype, kept.requires_grad
        except Exception as error:
            return type(error)

    assert outcome(ops) == outcome(torchvision.ops)


@pytest.mark.parametrize("module", [ops, torchvision.ops])
def test_a_list_is_refused(module):
    """By an error that depends on torchvision's version."""
    with pytest.raises((AttributeError, RuntimeError), match="list"):
        module.nms(BOXES.tolist(), SCORES, 0.5)


def test_in_torchvisions_own_place(monkeypatch):
    expected = torchvision.ops.nms(BOXES, SCORES, 0.5), torchvision.ops.batched_nms(BOXES, SCORES, IDXS, 0.5)
    for name in ("nms", "batched_nms"):
        monkeypatch.setattr(torchvision.ops, name, getattr(ops, name))
        monkeypatch.setattr(torchvision.ops.boxes, name, getattr(ops, name))
    assert torch.equal(torchvision.ops.nms(BOXES, SCORES, 0.5), expected[0])
    assert torch.equal(torchvision.ops.batched_nms(BOXES, SCORES, IDXS, 0.5), expected[1])
    assert torch.equal(torchvision.ops.boxes._batched_nms_vanilla(BOXES, SCORES, IDXS, 0.5), expected[1])


class Suppress(nn.Module):
    def forward(self, boxes, scores, idxs):
        return ops.nms(boxes, scores, 0.5), ops.batched_nms(boxes, scores, idxs, 0.5)


def many(count):
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator) * 50 - 20
    boxes = torch.cat((corner, corner + 10 + 10 * torch.rand(count, 2, generator=generator)), dim=1)
    scores = torch.rand(count, generator=generator)
    return boxes, scores, torch.randint(0, 3, (count,), generator=generator)


def test_in_a_whole_compiled_graph():
    compiled = torch.compile(Suppress(), fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (40, 7, 300):
        for found, expected in zip(compiled(*many(count)), Suppress()(*many(count)), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("idxs", [None, IDXS, IDXS.float()])
def test_opcheck(idxs):
    torch.library.opcheck(torch.ops.retina_fast.nms.default, (BOXES, SCORES, idxs, 0.5))


def test_exported_with_any_number_of_boxes():
    count = torch.export.Dim("count")
    program = torch.export.export(Suppress(), many(40), dynamic_shapes=[{0: count}] * 3).module()
    for number in (40, 7, 0):
        for found, expected in zip(program(*many(number)), Suppress()(*many(number)), strict=True):
            assert torch.equal(found, expected)


def test_written_as_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file, names = tmp_path / "ops.onnx", ["boxes", "scores", "idxs"]
    torch.onnx.export(Suppress(), many(40), file, input_names=names, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    found = session.run(None, {name: value.numpy() for name, value in zip(names, many(40), strict=True)})
    for kept, expected in zip(found, Suppress()(*many(40)), strict=True):
        assert kept.tolist() == expected.tolist()


def test_scripted():
    scripted = torch.jit.script(ops.nms), torch.jit.script(ops.batched_nms)
    for count in (40, 0):
        boxes, scores, idxs = many(count)
        assert torch.equal(scripted[0](boxes, scores, 0.5), ops.nms(boxes, scores, 0.5))
        assert torch.equal(scripted[1](boxes, scores, idxs, 0.5), ops.batched_nms(boxes, scores, idxs, 0.5))
    x, targets = torch.randn(7, 3), torch.rand(7, 3).round()
    focal = torch.jit.script(ops.sigmoid_focal_loss)
    assert torch.equal(focal(x, targets, reduction="mean"), ops.sigmoid_focal_loss(x, targets, reduction="mean"))

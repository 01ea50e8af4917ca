"""The last part of an exported file, given the same outputs of the heads as the model's own."""

import pytest
import torch

from retina_fast.deploy.export.onnx_file import OnnxPostprocess, translate
from retina_fast.deploy.export.postprocess import Postprocess, best_by_key, suppress
from retina_fast.detections import Thresholds, detect
from retina_fast.forward import HeadOutputs
from retina_fast.kernels.batched_nms import nms_image
from tests.instruments import agreement


@pytest.fixture(scope="module")
def head_outputs():
    """Of eight images of clustered boxes: by level (8, N, K) and (8, N, 4)."""
    by_image = [agreement.random_outputs(seed) for seed in range(8)]
    logits, deltas = (
        [torch.cat(levels) for levels in zip(*(image[key] for image in by_image), strict=True)]
        for key in ("cls_logits", "bbox_regression")
    )
    for level in (*logits, *deltas):
        level[4:] = level[4:].bfloat16().float()  # ties
    for level in deltas:
        level[2] = 0  # boxes of whole numbers
        level[3, ::7] = torch.nan
    for level in logits:
        level[3, 1::7, ::2] = torch.nan
        level[5, ::3, ::2], level[5, 1::3, ::2] = 0.0, -0.0  # ties of more than are chosen
    return {"cls_logits": logits, "bbox_regression": deltas}


@pytest.mark.parametrize("kind", [pytest.param(Postprocess, marks=pytest.mark.slow), OnnxPostprocess])
def test_postprocess_is_the_models_given_the_same_head_outputs(kind, head_outputs):
    """What an exported file's detections differ by comes from the convolutions' rounding alone."""
    model = agreement.models()[1]
    anchors = torch.cat(agreement.anchors(model)[0])
    sizes = torch.tensor([agreement.IMAGE] * 8)
    outputs = HeadOutputs(head_outputs, anchors, agreement.K, {})
    expected = detect(outputs, sizes, 2 * sizes, Thresholds.of(model))
    assert len(expected.counts.unique()) > 1

    graph = kind(model, anchors, agreement.K, tuple(2 * side for side in agreement.IMAGE), agreement.IMAGE).eval()
    batch = torch.export.Dim("batch", min=1)
    shapes = {key: [{0: batch}] * len(levels) for key, levels in head_outputs.items()}
    with torch.no_grad():
        program = torch.export.export(graph, tuple(head_outputs.values()), dynamic_shapes=shapes)
    if kind is Postprocess:
        found = program.module()(*head_outputs.values())
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(translate(program, shapes).SerializeToString())
        levels = [level.numpy() for levels in head_outputs.values() for level in levels]
        inputs = dict(zip([node.name for node in session.get_inputs()], levels, strict=True))
        found = [torch.from_numpy(output) for output in session.run(None, inputs)]
    tolerance = 0 if kind is Postprocess else 1e-4  # ONNX Runtime's exp is not torch's
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)


def test_best_by_key():
    values = torch.tensor([[0.0, 3.0, -0.0, -torch.inf, 3.0, torch.inf, -1e-45, -2.5], [-torch.inf] * 7 + [-3e38]])
    best, index = best_by_key(values, 8)
    expected = values.sort(dim=1, descending=True, stable=True)
    assert index.equal(expected.indices)
    assert best.equal(expected.values)


@pytest.mark.parametrize("iou_thresh", [0.5, 0.25])
def test_suppress(iou_thresh):
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 12, (3, 300, 2), generator=generator)
    sides = torch.randint(0, 9, (3, 300, 2), generator=generator)  # whole numbers: many IoUs of exactly 1/2 and 1/4
    boxes = torch.cat((corners, corners + sides), dim=2).float()
    boxes[0, ::50, 2] = torch.nan
    labels = torch.randint(0, 2, (3, 300), generator=generator)
    valid = torch.arange(300) < torch.tensor([[300], [137], [0]])
    for most in (300, 70, 5):
        kept = suppress(boxes, labels, valid, iou_thresh, most)
        for b, count in enumerate((300, 137, 0)):
            expected = nms_image(boxes[b, :count], None, labels[b, :count], iou_thresh)[:most]
            assert kept[b].nonzero().squeeze(1)[:most].tolist() == sorted(expected.tolist())

"""The last convs where a detection can be: exact there, and no cell above the threshold is missed."""

import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retina_fast.deploy.eight_bits.sieve import FEW_LOGITS, MARGIN, Codes, LastConv, Sieve
from retina_fast.deploy.eight_bits.sieved_graph import sieved
from tests.deploy.eight_bits.test_quantize import noise


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


INPUTS = (Codes(0.02, 0), Codes(0.015, 40))


def last_conv(outputs, kernel=(3, 3)):
    weight = torch.randn(outputs, 5, *kernel).contiguous(memory_format=torch.channels_last)
    above, left = (side // 2 for side in kernel)
    return LastConv(weight, torch.randn(outputs), (above, left, above, left), INPUTS)


def features_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (3, 5), (2, 4)])
@pytest.mark.parametrize("level", [0, 1])
def test_a_conv_at_some_cells_and_at_all(kernel, level):
    above, left = ((side - 1) // 2 for side in kernel)
    pads = above, left, kernel[0] - 1 - above, kernel[1] - 1 - left
    conv, features = replace(last_conv(7, kernel), pads=pads), features_of(2, 6, 9, 5)
    values = F.pad(
        INPUTS[level].scale * (features.double() - INPUTS[level].zero), (0, 0, pads[1], pads[3], pads[0], pads[2])
    )
    expected = F.conv2d(values.permute(0, 3, 1, 2), conv.weight.double(), conv.bias.double()).permute(0, 2, 3, 1)
    torch.testing.assert_close(conv.everywhere(features, level).double(), expected, rtol=1e-5, atol=1e-5)
    given, right = features.clone(), expected.flatten(0, 2)
    for cells in (torch.arange(2 * 6 * 9), (torch.rand(2 * 6 * 9) < 0.5).nonzero()[:, 0], torch.tensor([54, 0])):
        patches = conv.patches(features, level, cells)
        made = conv.at_patches(patches, level).T
        torch.testing.assert_close(made.double(), right[cells], rtol=1e-5, atol=1e-5)
        some = torch.tensor([5, 0])
        made = conv.at_patches(patches, level, some).T
        torch.testing.assert_close(made.double(), right[cells][:, some], rtol=1e-5, atol=1e-5)
    assert torch.equal(features, given)


def outputs_of(codes):
    """One level of codes (H, W) as a graph gives them: the second of three logits has the code, the others 0."""
    codes = torch.tensor(codes, dtype=torch.uint8)[None, :, :, None]
    return [F.pad(codes, (1, 1)), *(features_of(1, *codes.shape[1:3], 5) for _ in range(2))]


def test_logits_are_chosen_by_code_margin_and_threshold():
    sieve = Sieve(last_conv(3), last_conv(4), (Codes(0.5, 10),), (1.0,), (0.0,))  # logit -5 has code 0, 0 has 10
    outputs = outputs_of([[0, 7, 8, 255], [3, 4, 9, 0]])

    def cells(threshold, sieve=sieve):
        (logits,), (deltas,) = sieve(outputs, threshold, 99)
        assert logits.shape == (1, 3, 2, 4)
        assert deltas.shape == (1, 4, 2, 4)
        chosen = logits[0] > -math.inf
        right = sieve.logits.everywhere(outputs[1], 0)[0].permute(2, 0, 1)
        torch.testing.assert_close(logits[0][chosen], right[chosen], rtol=1e-5, atol=1e-5)
        above = chosen.any(dim=0) & (logits[0].sigmoid() >= threshold).any(dim=0)
        right = sieve.deltas.everywhere(outputs[2], 0)[0].permute(2, 0, 1)
        torch.testing.assert_close(deltas[0][:, above], right[:, above], rtol=1e-5, atol=1e-5)
        assert above.all() or not deltas[0][:, ~above].any()
        assert torch.equal(chosen[0], chosen[1])  # all logits of a cell
        assert torch.equal(chosen[0], chosen[2])
        return chosen[1].int().tolist()

    assert cells(0.5) == [[0, 0, 1, 1], [0, 0, 1, 0]]  # logit 0, less the margin: -1, which has code 8
    assert cells(0.5, replace(sieve, margins=(0.0,))) == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert cells(torch.tensor(0.2).logit().neg().sigmoid().item()) == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert cells(1.0) == [[0, 0, 0, 1], [0, 0, 0, 0]]  # 255 stands for any greater logit
    everywhere = [[1] * 4] * 2
    assert cells(0.0) == cells(-1.0) == cells(0.001) == everywhere  # code 0 stands for any lower logit
    assert cells(0.1) == everywhere  # more than half of the cells: dense


def test_of_many_logits_those_that_are_candidates_are_computed(monkeypatch):
    monkeypatch.setattr("retina_fast.deploy.eight_bits.sieve.GROUP", 4)
    outputs = FEW_LOGITS + 9
    codes_of = Codes(0.1, 100), Codes(0.2, 95)
    sieve = Sieve(last_conv(outputs), last_conv(4), codes_of, (0.3, 0.0), (0.0, 0.0))
    codes = [torch.randint(0, 90, (2, side, 7, outputs), dtype=torch.uint8) for side in (5, 3)]
    for level in codes:
        level[torch.rand(level.shape) < 0.002] = 255
    features = [features_of(2, side, 7, 5) for _ in range(2) for side in (5, 3)]
    products: list[tuple[LastConv, int, int]] = []
    at_patches = LastConv.at_patches

    def counted(conv, patches, level, wanted=None):
        made = at_patches(conv, patches, level, wanted)
        products.append((conv, *made.T.shape))
        return made

    monkeypatch.setattr(LastConv, "at_patches", counted)
    logits, deltas = sieve([*codes, *features], 0.5, 10**9)
    for i, least in enumerate((97, 95)):
        chosen = (codes[i] >= least).permute(0, 3, 1, 2)
        exact = [
            conv.everywhere(x, i).permute(0, 3, 1, 2)
            for conv, x in ((sieve.logits, features[i]), (sieve.deltas, features[2 + i]))
        ]
        assert chosen.any()
        torch.testing.assert_close(logits[i][chosen], exact[0][chosen], rtol=1e-4, atol=1e-4)
        others = logits[i] > -math.inf  # wanted by another cell of the group
        torch.testing.assert_close(logits[i][others], exact[0][others], rtol=1e-4, atol=1e-4)
        above = (logits[i] >= 0).any(dim=1)
        assert above.any()
        torch.testing.assert_close(
            deltas[i].permute(0, 2, 3, 1)[above], exact[1].permute(0, 2, 3, 1)[above], rtol=1e-4, atol=1e-4
        )
        assert not deltas[i].permute(0, 2, 3, 1)[~above].any()
    groups = [(count, wanted) for conv, count, wanted in products if conv is sieve.logits]
    assert len(groups) > 2
    assert all(count <= 4 for count, _ in groups)
    assert sum(count * wanted for count, wanted in groups) < 0.2 * sum(level.numel() for level in logits)


@pytest.mark.parametrize("logits", [6, FEW_LOGITS + 6])
@pytest.mark.parametrize("topk", [0, 1, 5, 10**9])
def test_the_highest_logits_of_each_image_are_computed(logits, topk):
    """Where codes are as far off as margin and excess say, and saturate; the second image has lower logits."""
    held, margin, excess = Codes(0.5, 128), 2.0, 3.0
    conv, features = last_conv(logits), features_of(2, 15, 9, 5)
    features[1] //= 2
    conv = replace(conv, bias=conv.bias - conv.everywhere(features, 0).quantile(0.9))
    exact = conv.everywhere(features, 0)
    off = exact - margin + held.scale + torch.rand(exact.shape) * (margin + excess - 2 * held.scale)
    codes = (off / held.scale + held.zero).round().clamp(0, 255).to(torch.uint8)
    sieve = Sieve(conv, last_conv(4), (held,), (margin,), (excess,))
    (ours,), (deltas,) = (level[0].permute(0, 2, 3, 1)[None] for level in sieve([codes, features, features], 0.5, topk))
    chosen = ours > -math.inf
    torch.testing.assert_close(ours[chosen], exact[chosen], rtol=1e-4, atol=1e-3)
    right_deltas = sieve.deltas.everywhere(features, 0)
    for image in range(2):
        above = exact[image][exact[image] > 0.01]
        assert len(above) > 20
        best = exact[image] > max(
            0.01, float(above.topk(min(topk, len(above))).values[-1]) - 0.01 if topk else math.inf
        )
        assert int(best.sum()) >= min(topk, len(above))
        assert chosen[image][best].all()
        cells = best.any(dim=2)
        torch.testing.assert_close(deltas[image][cells], right_deltas[image][cells], rtol=1e-4, atol=1e-3)
    if topk < 10**9:
        (all_of_them,), _ = sieve([codes, features, features], 0.5, 10**9)
        assert chosen.sum() < 0.8 * (all_of_them > -math.inf).sum()


def test_images_without_candidates_change_nothing_for_the_others():
    sieve = Sieve(last_conv(6), last_conv(4), (Codes(0.1, 100),), (0.1,), (0.1,))
    codes = torch.randint(0, 256, (1, 40, 40, 6), dtype=torch.uint8)
    features = features_of(1, 40, 40, 5)
    (alone,), _ = sieve([codes, features, features], 0.5, 9)
    expected = alone.clone()
    assert 9 <= (expected > -math.inf).sum() < 0.1 * expected.numel()
    blank = torch.zeros_like(codes)
    for place, batch in enumerate(([codes, blank], [blank, codes, blank], [blank, blank, codes])):
        many = features.expand(len(batch), -1, -1, -1).contiguous()
        (logits,), _ = sieve([torch.cat(batch), many, many], 0.5, 9)
        torch.testing.assert_close(logits[place : place + 1], expected)
        assert (logits > -math.inf).sum() == (expected > -math.inf).sum()
    none = codes[:0], features[:0], features[:0]
    assert [level[0].shape for level in sieve(none, 0.5, 9)] == [(0, 6, 40, 40), (0, 4, 40, 40)]


@pytest.mark.parametrize("logits", [6, FEW_LOGITS + 6])
def test_nothing_of_an_earlier_call_is_left(logits):
    sieve = Sieve(last_conv(logits), last_conv(4), (Codes(0.1, 100),), (0.1,), (0.1,))

    def outputs(height):
        codes = torch.randint(0, 90, (1, height, 7, logits), dtype=torch.uint8)
        codes[torch.rand(codes.shape) < 0.01] = 255
        return [codes, features_of(1, height, 7, 5), features_of(1, height, 7, 5)]

    for height in (5, 5, 3, 5, 5):
        given = outputs(height)
        fresh = pickle.loads(pickle.dumps(sieve))
        for ours, right in zip(sieve(given, 0.5, 9), fresh(given, 0.5, 9), strict=True):
            assert torch.equal(ours[0], right[0])
    assert len(pickle.dumps(sieve)) == len(pickle.dumps(fresh))  # what is kept between calls stays here


def graph(last="Conv"):
    """Two levels, of 16x16 and 8x8 cells, whose logits and box offsets are convs of one tower each."""
    onnx = pytest.importorskip("onnx")
    make, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [make("MaxPool", ["x"], ["x1"], "pool", kernel_shape=[2, 2], strides=[2, 2])]
    for i, level in enumerate(("x", "x1")):
        nodes += [
            make("Conv", [level, "w", "b"], [f"c{i}"], f"tower{i}", **pads),
            make("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}"),
            make("Conv", [f"r{i}", "w_logits", "b_logits"], [f"l{i}"], f"logits{i}", **pads),
            make("Conv", [f"r{i}", "w_deltas"], [f"d{i}"], f"deltas{i}", **pads),
        ]
    for i, name in enumerate(("l0", "l1", "d0", "d1")):
        nodes.append(make("Transpose", [name], [f"output{i}"], f"turn{i}", perm=[0, 2, 3, 1]))
    if last != "Conv":
        nodes[-1] = make("Tanh", ["d1"], ["output3"], "tanh")
    values = {
        "w": noise(4, 3, 3, 3), "b": noise(4), "w_logits": noise(6, 4, 3, 3, seed=1) / 3,
        "b_logits": noise(6) - 4, "w_deltas": noise(8, 4, 3, 3, seed=2),
    }  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        nodes,
        "graph",
        [value("x", 1, ["batch", 3, "height", "width"])],
        [value(f"output{i}", 1, [None] * 4) for i in range(4)],
        [array(np.asarray(number), name) for name, number in values.items()],
    )
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def test_errors_of_rounded_weights_cancel_where_the_input_is_smooth():
    onnx = pytest.importorskip("onnx")
    proto = graph()
    ranges = {name: SimpleNamespace(range_value=np.array([-2.0, 2.0])) for name in ("r0", "r1", "l0", "l1")}
    made = sieved(proto, ranges)
    assert made
    held = {weight.name: onnx.numpy_helper.to_array(weight).astype(np.float64) for weight in made[0].graph.initializer}
    exact = made[1].logits.weight.double().numpy()
    step = held["sieve0_weight_scale"][:, None, None, None]
    error = held["sieve0_weight"] * step - exact
    assert np.abs(error / step).max() <= 1.0 + 1e-6
    assert np.abs((error / step).sum(axis=(2, 3))).max() <= 0.5 + 1e-6  # of single roundings up to 4.5


def test_a_channel_without_weights_has_its_bias():
    onnx = pytest.importorskip("onnx")
    proto = graph()
    for weight in proto.graph.initializer:
        value = onnx.numpy_helper.to_array(weight).copy()
        if weight.name in ("w_logits", "b_logits"):
            value[2] = 0.0 if weight.name == "w_logits" else -4.6
            weight.CopyFrom(onnx.numpy_helper.from_array(value, weight.name))
    ranges = {name: SimpleNamespace(range_value=np.array([-2.0, 2.0])) for name in ("r0", "r1", "l0", "l1")}
    made = sieved(proto, ranges)
    assert made
    held = {weight.name: onnx.numpy_helper.to_array(weight).astype(np.float64) for weight in made[0].graph.initializer}
    np.testing.assert_allclose((held["sieve0_bias"] * held["sieve0_bias_scale"])[2], -4.6, rtol=1e-5)
    assert not held["sieve0_weight"][2].any()


def test_no_cell_above_the_threshold_is_missed():
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    from retina_fast.deploy.eight_bits.quantize import Quantizer

    def run(proto, x):
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        return [torch.from_numpy(output) for output in session.run(None, {"x": x})]

    quantizer = Quantizer(graph(), (noise(1, 3, 16, 16, seed=i) for i in range(4)))
    quantized = quantizer.quantized()
    made = sieved(quantized, quantizer.ranges)
    assert made
    proto, sieve = made
    onnx.checker.check_model(proto, full_check=True)
    weights = {weight.name for weight in proto.graph.initializer}
    assert not {"w_logits", "b_logits", "w_deltas"} & weights  # the sieve has them
    samples = [run(proto, noise(1, 3, 16, 16, seed=i)) for i in range(4)]
    sieve = sieve.measured(samples)
    for i, codes in enumerate(sieve.codes):
        errors = [sieve.logits.everywhere(outputs[2 + i], i) - codes.values(outputs[i]) for outputs in samples]
        too_low = max(float(error[outputs[i] < 255].max()) for error, outputs in zip(errors, samples, strict=True))
        too_high = max(float(-error[outputs[i] > 0].min()) for error, outputs in zip(errors, samples, strict=True))
        assert 0 < sieve.margins[i] < 1
        assert 0 < sieve.excesses[i] < 1
        assert (sieve.margins[i], sieve.excesses[i]) == pytest.approx((MARGIN * too_low, MARGIN * too_high))
    x = noise(2, 3, 24, 16, seed=9)
    exact = run(quantized, x)  # whose last convs are in float32
    sifted = 0
    for threshold in (0.02, 0.05, 0.3, 0.9):
        logits, deltas = sieve(run(proto, x), threshold, 10**9)
        for i in range(2):
            chosen, above = logits[i].permute(0, 2, 3, 1) > -math.inf, exact[i].sigmoid() > threshold
            assert not (above & ~chosen).any()
            boxes = above.any(dim=3)
            for ours, theirs, at in ((logits[i], exact[i], chosen), (deltas[i], exact[2 + i], boxes)):
                torch.testing.assert_close(ours.permute(0, 2, 3, 1)[at], theirs[at], rtol=1e-4, atol=1e-4)
            sifted += int((~chosen).sum())
    assert sifted > 500


def test_other_outputs_than_those_of_two_convs_are_left_alone():
    pytest.importorskip("onnxruntime")
    assert sieved(graph("Tanh"), {}) is None
    apart = graph()
    apart.graph.node[-5].input[1] = "w_other"  # the box offsets of the second level by another weight
    other = apart.graph.initializer[-1]
    apart.graph.initializer.add().CopyFrom(other)
    apart.graph.initializer[-1].name = "w_other"
    assert sieved(apart, {}) is None

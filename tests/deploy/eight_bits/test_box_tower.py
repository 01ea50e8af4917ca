"""The tower of a box head at the cells that matter: the same there as at all cells, in a stand-in and in runtimes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retina_fast.deploy.eight_bits.box_tower import BoxTower
from retina_fast.deploy.eight_bits.sieved_graph import sieved
from retina_fast.deploy.onnx_network import TOWERS
from tests.deploy.eight_bits.everywhere import model_of, same_as_everywhere
from tests.deploy.eight_bits.test_quantize import noise

CHANNELS = 4


def chosen_cells(batch, sides):
    """Corners, some cells, none and all: a mask (batch, H, W) for each level, in turn."""
    masks = [torch.zeros(batch, *side, dtype=torch.bool) for side in sides]
    masks[0][0, 0, 0] = masks[0][-1, -1, -1] = True
    masks[1][:] = torch.rand(masks[1].shape) < 0.1
    masks[-1][-1] = True
    return masks


@pytest.mark.parametrize("batch", [1, 3])
def test_the_tower_gives_what_the_last_conv_reads_at_chosen_cells(batch):
    """Of three convs on codes: whole numbers, of which none is below 0 or above 255."""
    torch.manual_seed(0)
    sides = (9, 14), (6, 5), (3, 4), (1, 1)
    weights = [torch.randint(-3, 4, (CHANNELS, CHANNELS, 3, 3)).double() for _ in range(3)]
    sizes: list[int] = []

    def run(arrays):
        outputs = []
        for i in range(0, len(arrays), 4):
            table, *rows = arrays[i : i + 4]
            for weight, index in zip(weights, rows, strict=True):
                sizes.append(len(index))
                assert index.dtype == np.int32
                matrix = weight.permute(2, 3, 1, 0).reshape(9 * CHANNELS, CHANNELS).numpy()
                product = table[index].reshape(len(index), -1).astype(float) @ matrix
                made = np.clip(product // 8, 0, 255).astype(np.uint8)
                table = np.concatenate((made, np.zeros((1, CHANNELS), np.uint8)))
            outputs.append(made)
        return outputs

    inputs = [torch.randint(0, 9, (batch, *side, CHANNELS), dtype=torch.uint8) for side in sides]
    with_border = [F.pad(level, (0, 0, 1, 1, 1, 1)) for level in inputs]
    chosen = chosen_cells(batch, sides)
    features = BoxTower(b"", 3, CHANNELS).features(run, with_border, chosen)
    for level, mask, found in zip(inputs, chosen, features, strict=True):
        values = level.permute(0, 3, 1, 2).double()
        for weight in weights:
            values = (F.conv2d(values, weight, padding=1) / 8).floor().clamp(0, 255)
        right = F.pad(values, (1, 1, 1, 1))
        read = F.max_pool2d(F.pad(mask[:, None].double(), (1, 1, 1, 1)), 3, 1, 1).bool()
        ours = found.permute(0, 3, 1, 2).double()
        assert (ours.where(read, 0) == right.where(read, 0)).all()
        assert not ours.where(~F.pad(torch.ones_like(mask), (1, 1, 1, 1))[:, None], 0).any()  # the border
    assert sum(sizes) < 0.8 * 3 * batch * sum(height * width for height, width in sides)
    assert BoxTower(b"", 3, CHANNELS).features(run, [level[:0] for level in with_border], chosen)[0].shape[0] == 0


def graph(kernel=3, between=("Relu",), shared=False):
    """Two levels, of 16x16 and 8x8 cells. Logits of three classes are convs of the levels, and box offsets those of a
    tower of two convs."""
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_node
    pads = [kernel // 2] * 4
    nodes = [
        make("Conv", ["x", "w"], ["c0"], "first", pads=(1, 1, 1, 1)),
        make("MaxPool", ["c0"], ["c1"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
    ]
    for i in range(2):
        nodes += [
            make("Conv", [f"c{i}", "w0"], [f"t{i}"], f"logits_tower{i}", pads=(1, 1, 1, 1)),
            make("Relu", [f"t{i}"], [f"r{i}"], f"logits_relu{i}"),
            make("Conv", [f"r{i}", "w_logits", "b_logits"], [f"l{i}"], f"logits{i}", pads=(1, 1, 1, 1)),
            make("Transpose", [f"l{i}"], [f"output{i}"], f"turn{i}", perm=[0, 2, 3, 1]),
        ]
    for i in range(2):
        read = f"c{i}"
        for j, weight in enumerate(("w1", "w2")):
            nodes.append(make("Conv", [read, weight, f"b{j + 1}"], [f"b{i}_{j}"], f"tower{i}_{j}", pads=pads))
            read = f"b{i}_{j}"
            for kind in between:
                nodes.append(make(kind, [read], [f"{kind}{i}_{j}"], f"{kind}{i}_{j}"))
                read = f"{kind}{i}_{j}"
        nodes += [
            make("Conv", [f"r{i}" if shared else read, "w_deltas"], [f"d{i}"], f"deltas{i}", pads=(1, 1, 1, 1)),
            make("Transpose", [f"d{i}"], [f"output{i + 2}"], f"turn{i + 2}", perm=[0, 2, 3, 1]),
        ]
    values = {
        "w": noise(4, 3, 3, 3), "w0": noise(4, 4, 3, 3), "w1": noise(4, 4, kernel, kernel, seed=1), "b1": noise(4),
        "w2": noise(4, 4, kernel, kernel, seed=2), "b2": noise(4, seed=3), "w_logits": noise(6, 4, 3, 3, seed=1) / 3,
        "b_logits": noise(6) - 4, "w_deltas": noise(8, 4, 3, 3, seed=2),
    }  # fmt: skip
    return model_of(nodes, values)


def quantized(**kinds):
    pytest.importorskip("onnxruntime")
    from retina_fast.deploy.eight_bits.quantize import Quantizer

    quantizer = Quantizer(graph(**kinds), (noise(1, 3, 16, 16, seed=i) for i in range(4)))
    return quantizer.quantized(), quantizer.ranges


def outputs_of(proto, array):
    from retina_fast.deploy.export.onnx_file import onnx_session

    return [torch.from_numpy(output) for output in onnx_session(proto.SerializeToString()).run(None, {"x": array})]


@pytest.mark.parametrize("runtime", TOWERS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_runtime_computes_the_box_head_at_few_cells(runtime, batch):
    pytest.importorskip({"OpenVINO": "openvino"}.get(runtime, "onnxruntime"))
    proto, ranges = quantized()
    dense, by_cells = sieved(proto, ranges), sieved(proto, ranges, by_cells=True)
    assert dense
    assert by_cells
    (graph, sieve), x = by_cells, noise(batch, 3, 24, 16, seed=9)
    assert sieve.tower
    assert (sieve.tower.depth, sieve.tower.outputs) == (2, 4)
    held = {weight.name for weight in graph.graph.initializer}
    assert not [name for name in held if name.startswith(("w1", "w2", "b1", "b2"))]  # the sieve has them
    assert not [node.name for node in graph.graph.node if node.name.startswith("tower")]
    pytest.importorskip("onnx").checker.check_model(graph, full_check=True)
    run = TOWERS[runtime](sieve.tower.content)
    samples = [outputs_of(graph, noise(1, 3, 16, 16, seed=i)) for i in range(4)]
    sieve = sieve.measured(samples)
    outputs, right = outputs_of(graph, x), dense[1].everywhere(outputs_of(dense[0], x))[1]
    for ours, exact in zip(sieve.everywhere(outputs, run)[1], right, strict=True):
        assert (ours != exact).double().mean() < 0.01  # a code may be rounded the other way
        torch.testing.assert_close(ours, exact, rtol=0, atol=float(exact.std() / 20))
    for threshold in (0.02, 0.05, 0.3, 0.9, 0.9999):
        same_as_everywhere(sieve, outputs, 3, threshold, 10**9, run)


@pytest.mark.parametrize("kinds", [{"shared": True}, {"kernel": 5}, {"between": ("LeakyRelu",)}, {"between": ()}])
def test_another_tower_stays_in_the_graph(kinds):
    """One that the logits read, too; of 5x5 cells; of values below 0, for which 0 is not the lowest code."""
    proto, ranges = quantized(**kinds)
    assert sieved(proto, ranges)
    assert sieved(proto, ranges, by_cells=True) is None

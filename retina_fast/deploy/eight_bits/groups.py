"""The groups of channels before a GroupNorm, brought to one middle and like ranges: each gets most of the 256 steps.

GroupNorm takes out what is added to all values of a group, and, up to its epsilon, what they are multiplied with. So
the conv before it may give (x - m_g) / c_g in place of x, by its weights and its bias. With [a_lg, b_lg] for the range
of group g in level l, and h_lg for the largest distance of a value there from m_g,

    m_g = mean over l of (a_lg + b_lg) / 2        c_g = max over l of  h_lg / max over j of h_lj,

the smallest c_g with which no group reaches farther than the one of its level that reaches farthest, but no less than
1/16, since what is small in these images may be large in others. Groups whose values are so small that the norm's
epsilon matters are not scaled. (Scales as in Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019, section 4.1; here no later layer has to undo them, since the norm does.)
"""

import copy
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from retina_fast.deploy.eight_bits.group_norm import group_norms
from retina_fast.deploy.eight_bits.parts import Graph, channel_ranges, like_ranges

FAR = 2500
"""A group whose squared reach is less than so many times the norm's epsilon keeps its size, since epsilon counts there.
Of the variance of others it is at most 1%, if they reach five deviations far."""


def with_even_groups(proto: Any, feeds: Sequence[Any], but: Collection[str] = ()) -> Any:
    """The graph with like ranges of all groups of what its convs give to a GroupNorm, a new ModelProto.

    A conv stays as it is if something else reads its output, or if its weights serve a conv that is before no norm or
    one of other groups.

    Args:
        proto: an ONNX ModelProto in float32 with one input, and GroupNorms as PyTorch's exporter writes them.
        feeds: arrays for the input, on which the ranges are taken.
        but: outputs of convs that need no like ranges.

    Example::

        >>> even = with_even_groups(onnx.load("model.onnx"), [pixels])  # doctest: +SKIP
    """
    proto = copy.deepcopy(proto)
    graph = Graph(proto.graph)
    levels: dict[tuple[str, int], list[Any]] = defaultdict(list)  # the nodes of each conv, by its weights and groups
    epsilons: dict[str, float] = defaultdict(float)
    for norm in group_norms(graph):
        conv = graph.made_by.get(norm.x)
        others = [node for node in graph.readers[norm.x] if node is not norm.nodes[0]]
        alone = all(node is not None and node.op_type == "Shape" for node in others)
        if conv and conv.op_type == "Conv" and alone and norm.x not in but:
            levels[conv.input[1], norm.groups].append(conv)
            epsilons[conv.input[1]] = max(epsilons[conv.input[1]], norm.epsilon)
    found = {key: convs for key, convs in levels.items() if _are_its_own(graph, convs)}
    if not found or not feeds:
        return proto
    ranges = channel_ranges(proto, [conv.output[0] for convs in found.values() for conv in convs], feeds)
    for (weight, groups), convs in found.items():
        of_channels = np.array([ranges[conv.output[0]] for conv in convs])  # (L, 2, C)
        least, greatest = (of_channels[:, i].reshape(len(convs), groups, -1) for i in (0, 1))
        least, greatest = least.min(axis=2), greatest.max(axis=2)  # (L, groups)
        middle = ((least + greatest) / 2).mean(axis=0)
        reach = np.maximum(greatest - middle, middle - least)
        c = like_ranges(reach)
        if c is None:
            continue
        c[(reach**2 < FAR * epsilons[weight]).any(axis=0)] = 1
        c, middle = (values.repeat(of_channels.shape[2] // groups) for values in (c, middle))
        for conv in convs:
            if len(conv.input) == 2:
                conv.input.append(graph.hold(f"{weight}_middle", np.zeros_like(middle)))
                graph.readers[conv.input[2]].append(conv)
        graph.scale([(conv, 1) for conv in convs], 1 / c, axis=0)
        graph.scale([(conv, 2) for conv in convs], 1 / c, axis=0, shift=-middle / c)
    return proto


def _are_its_own(graph: Graph, convs: Sequence[Any]) -> bool:
    """Whether weights and biases of these nodes are constants, of which others may read the biases alone."""
    names = [name for conv in convs for name in conv.input[1:]]
    return all(name in graph.weights for name in names) and graph.are_read_by_no_other([(conv, 1) for conv in convs])

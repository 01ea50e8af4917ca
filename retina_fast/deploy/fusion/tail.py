"""The end of a bottleneck together with the first conv of the next one; ``fuse.py`` puts it into a model."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from retina_fast.deploy.fusion.layers import FusedConv
from retina_fast.kernels.conv_chain import Before, Shortcut, conv_chain, serves_chain


class FusedTail:
    """Runs a bottleneck's second and last conv, and with them the next block's first where that was found the faster.
    The next block asks for that conv's output by :meth:`take`.

    Args:
        middle: the second conv of a bottleneck, with ReLU. The tail owns none of the convs.
        last: its last conv, which adds z or a shortcut's output, with ReLU.
        first: of the next block, with ReLU.
    """

    ways: Mapping[tuple[int, ...], str] = MappingProxyType({})
    """Of input shapes whose fastest way was chosen by timing: ``apart``, each conv in its own way; ``paired``, the last
    and the first as one kernel; or ``whole``, all three."""
    choose: Callable[..., None] | None = None
    """Is called with the tail and its arguments before each call, while ways are being chosen."""
    _made: tuple[Tensor, int, Tensor] | None = None  # the last conv's output, its version, and the first's

    def __init__(self, middle: FusedConv, last: FusedConv, first: FusedConv) -> None:
        self.convs = middle, last, first

    def __call__(self, x: Tensor, z: Tensor, overwrite_z: bool, shortcut: FusedConv | None) -> Tensor:
        """The last conv's output; see :meth:`retina_fast.deploy.fusion.layers.FusedConv.forward`."""
        middle, last, _ = self.convs
        if torch.compiler.is_compiling():  # the compiler fuses by itself
            return last(middle(x), z, overwrite_z=overwrite_z, shortcut=shortcut)
        self._made = None
        if self.choose is not None:
            self.choose(self, x, z, overwrite_z, shortcut)
        way = self.ways.get(x.shape, "apart")
        if way not in self.possible_ways(x, z, shortcut)[1:]:
            return last(middle(x), z, overwrite_z=overwrite_z, shortcut=shortcut)
        y, following = self.run(way, x, z, overwrite_z, shortcut)
        self._made = y, _version(y), following
        return y

    def take(self, y: Tensor) -> Tensor | None:
        """What the first conv gives for y, if it has run and y is unchanged. It is given once."""
        if torch.compiler.is_compiling():
            return None
        made, self._made = self._made, None
        if made is None or made[0] is not y or made[1] != _version(y):
            return None
        return made[2]

    def possible_ways(self, x: Tensor, z: Tensor, shortcut: FusedConv | None) -> list[str]:
        """The ways in which an input may run."""
        middle, last, first = self.convs
        alike = all(conv.is_pointwise() and conv.stride == (1, 1) for conv in (last, first, shortcut or last))
        alike = alike and all(conv.bias is not None for conv in self.convs) and middle.takes_epilogue(x)
        if not alike or (shortcut is not None and shortcut.bias is not None):
            return ["apart"]
        given = x, last.weight, first.weight, *_added(z, shortcut)
        plain = (
            middle.groups == 1
            and middle.kernel_size == (3, 3)
            and middle.padding == middle.stride == middle.dilation == (1, 1)
        )
        ways = {"paired": serves_chain(*given), "whole": plain and serves_chain(*given, _before(middle))}
        return ["apart", *(way for way, possible in ways.items() if possible)]

    def run(
        self, way: str, x: Tensor, z: Tensor, overwrite_z: bool, shortcut: FusedConv | None
    ) -> tuple[Tensor, Tensor]:
        """The outputs of the last and the first conv, in one of :meth:`possible_ways`, or ``eager``."""
        middle, last, first = self.convs
        if way == "eager":
            y = last.run("eager", middle.run("eager", x, None), z, shortcut=shortcut)
            return y, first.run("eager", y, None)
        if way != "whole":
            x = middle.forward(x)
        if way == "apart":
            y = last.forward(x, z, overwrite_z, shortcut)
            return y, first.forward(y)
        assert last.bias is not None
        assert first.bias is not None
        given = x, last.weight, last.bias, first.weight, first.bias, *_added(z, shortcut)
        return conv_chain(*given, _before(middle) if way == "whole" else None)

    def describe(self, x: Tensor, z: Tensor, shortcut: FusedConv | None) -> str:
        """The work of a call in words, which are equal where the same way is the fastest."""
        middle, last, first = self.convs
        narrow = x.new_empty(middle.output_shape(x), device="meta").to(memory_format=torch.channels_last)
        following = "x".join(map(str, first.weight.shape))
        return f"{middle.describe(x, None)}, {last.describe(narrow, z, shortcut)}, conv {following}"

    def __getstate__(self) -> dict[str, Any]:
        """Without what one call has left for the next block."""
        return {name: value for name, value in vars(self).items() if name != "_made"}


def _added(z: Tensor, shortcut: FusedConv | None) -> tuple[Tensor | None, Shortcut | None]:
    """What the last conv adds: z, or a conv of it."""
    return (z, None) if shortcut is None else (None, (z, shortcut.weight))


def _before(middle: FusedConv) -> Before | None:
    return None if middle.bias is None else (middle.weight, middle.bias)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version

"""A conv that runs together with what follows it; ``fuse.py`` puts it into a model."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retina_fast.kernels.conv_epilogue import conv_epilogue_, serves_epilogue
from retina_fast.kernels.conv_float8 import (
    Float8Weight,
    conv_float8,
    conv_float8_reference,
    float8_weight,
    suits_float8,
)
from retina_fast.kernels.conv_onednn import onednn_conv, pack_weight, runs_onednn
from retina_fast.kernels.conv_pointwise import conv_pointwise, serves_pointwise
from retina_fast.kernels.conv_winograd import (
    Scratch,
    gains_from_winograd,
    suits_winograd,
    transform_weight,
    winograd_conv,
)
from retina_fast.kernels.first_channels import first_channels, padded_weight, suits_padding
from retina_fast.kernels.fused_conv import output_shape
from retina_fast.kernels.max_pool_relu import max_pool_relu
from retina_fast.kernels.stem_conv import serves_stem, stem_conv

_FEW_ROWS = 16  # oneDNN 3 packs otherwise up to 9
_SMALL_INPUT = 20480  # elements, up to which PyTorch computes the conv of one image without oneDNN
_SMALL_WORK, _SMALL_WEIGHT = 5 << 19, 1 << 17  # multiplications that take as long as a call of oneDNN; weights


def _activated(x: Tensor, activation: str) -> Tensor:
    """The activation of a tensor that nobody else holds."""
    if activation == "swish":
        return F.silu(x, inplace=not torch.is_grad_enabled())
    return x.relu_() if activation == "relu" else x


class FusedConv(nn.Conv2d):
    """A conv followed by an activation: ``activation(conv(x) + z)``, where z may be left out, and may be the output of
    another conv, the shortcut of a residual block.

    On a CPU its weights are packed into oneDNN's own memory format, or transformed for Winograd's algorithm, at the
    first call that reads them so, and again after they change.
    """

    activation = "none"
    """``none``, ``relu`` or ``swish``."""
    ways: Mapping[tuple[int, ...], str] = MappingProxyType({})
    """Of input shapes whose fastest way was chosen by timing: ``eager``, ``fused``,
    ``epilogue``, ``float8``, ``padded``, ``pointwise``, ``product`` or ``winograd``."""
    float8_factor: float | None = None
    """The power of two by which inputs are multiplied before they are rounded to FP8; None allows no FP8."""
    always: str | None = None
    """``float8`` or ``simulated`` takes FP8 wherever it is allowed, whatever was found the fastest."""
    scratch: Scratch
    """What the convs of a model share for Winograd's algorithm; ``fuse_convs`` gives it."""
    _prepared: tuple[object, dict[str, Any]] | None = None  # what the weights were, and what was made of them

    def forward(
        self, input: Tensor, z: Tensor | None = None, overwrite_z: bool = False, shortcut: "FusedConv | None" = None
    ) -> Tensor:
        """Run in the way that was found the fastest.

        Args:
            input: ``(B, C_in, H, W)``.
            z: ``(B, C_out, H_z, W_z)``. Where its height and width are not the output's, it is resized by nearest
                neighbours.
            overwrite_z: whether the output may take the memory of z, since nobody reads z afterwards.
            shortcut: a conv, whose output for z is added in z's place.
        """
        if torch.compiler.is_compiling():  # the compiler fuses by itself
            return self.run("eager", input, z, overwrite_z, shortcut)
        if self.always and self.takes_float8(input):
            return self.run(self.always, input, z, overwrite_z, shortcut)
        way = self.ways.get(input.shape)
        if way is not None and way not in self.possible_ways(input, z, shortcut):
            way = None  # chosen in another dtype or precision
        if way is None and self._is_small(input):
            way = "eager"
        elif way is None:
            gains = self.takes_winograd(input, z) and gains_from_winograd(input, self.weight)
            way = "winograd" if gains else "fused"
        return self.run(way, input, z, overwrite_z, shortcut)

    def run(
        self,
        way: str,
        x: Tensor,
        z: Tensor | None,
        overwrite_z: bool = False,
        shortcut: "FusedConv | None" = None,
    ) -> Tensor:
        """Run in one of :meth:`possible_ways`, or ``simulated``: as ``float8``, with the product in float32."""
        if way == "pointwise":
            return self.run_pointwise(x, z, shortcut)
        in_float8 = way in ("float8", "simulated")
        if z is not None and shortcut is not None:
            follows = in_float8 and shortcut.takes_float8(z)
            z, overwrite_z = shortcut.run(way, z, None) if follows else shortcut.forward(z), True
        elif z is not None and z.shape[2:] != (sides := self.output_shape(x)[2:]):
            z, overwrite_z = F.interpolate(z, size=sides, mode="nearest"), True
        if in_float8:
            return self.run_float8(x, z, simulated=way == "simulated")
        if way == "winograd":
            return self.run_winograd(x, z, overwrite_z)
        if way == "epilogue":
            return self.run_with_epilogue(x, z)
        if way == "padded":
            return self.run_padded(x)
        if way == "product":
            return self.run_product(x)
        return self.run_eager(x, z) if way == "eager" else self.run_fused(x, z, overwrite_z)

    def possible_ways(self, x: Tensor, z: Tensor | None, shortcut: "FusedConv | None" = None) -> list[str]:
        """The ways in which an input may run, the one that is right by definition first."""
        others = {
            "fused": self.takes_onednn(x, z),
            "epilogue": self.takes_epilogue(x),
            "float8": self.takes_float8(x),
            "padded": self.takes_padding(x, z),
            "pointwise": self.takes_pointwise(x, z, shortcut),
            "product": self.takes_product(x, z),
            "winograd": self.takes_winograd(x, z),
        }
        return ["eager", *(way for way, possible in others.items() if possible)]

    def takes_pointwise(self, x: Tensor, z: Tensor | None, shortcut: "FusedConv | None") -> bool:
        """Whether a kernel of ours runs the conv and what follows it."""
        served = self.is_pointwise() and serves_pointwise(x, self.weight, self.bias, z)
        if shortcut is None or z is None or not served:
            return served
        return shortcut.is_pointwise() and shortcut.bias is None and serves_pointwise(z, shortcut.weight)

    def is_pointwise(self) -> bool:
        """Whether each pixel of the output comes from one pixel of the input."""
        return self.kernel_size == (1, 1) and self.padding == (0, 0) and self.groups == 1 and len({*self.stride}) == 1

    def run_pointwise(self, x: Tensor, z: Tensor | None, shortcut: "FusedConv | None") -> Tensor:
        """As one product of matrices, or two in one sum."""
        if z is None or shortcut is None:
            return conv_pointwise(x, self.weight, self.bias, z, self.activation, self.stride[0])
        other = z, shortcut.weight, shortcut.stride[0]
        return conv_pointwise(x, self.weight, self.bias, None, self.activation, self.stride[0], other)

    def takes_epilogue(self, x: Tensor) -> bool:
        """Whether a kernel of ours runs what follows the conv."""
        return serves_epilogue(x) and self.weight.dtype == x.dtype and not torch.is_grad_enabled()

    def run_with_epilogue(self, x: Tensor, z: Tensor | None) -> Tensor:
        """The conv alone, then bias, sum and activation in one pass, if there are any."""
        y = F.conv2d(x, self.weight, None, *self._geometry()).contiguous(memory_format=torch.channels_last)
        followed = self.bias is not None or z is not None or self.activation != "none"
        return conv_epilogue_(y, self.bias, z, self.activation) if followed else y

    def takes_padding(self, x: Tensor, z: Tensor | None) -> bool:
        """Whether nothing but a bias follows, and cuDNN would pad the output's channels."""
        alone = z is None and self.activation == "none" and self.takes_epilogue(x)
        return alone and suits_padding(self.weight, self.bias, self.groups)

    def run_padded(self, x: Tensor) -> Tensor:
        """The conv with more channels than asked for, then the first of them and the bias in one pass."""
        assert self.bias is not None
        weight = self._prepared_weight("padded", lambda: padded_weight(self.weight))
        return first_channels(F.conv2d(x, weight, None, *self._geometry()), self.bias)

    def takes_product(self, x: Tensor, z: Tensor | None) -> bool:
        """Whether this is a product of matrices with a bias and ReLU, which cuBLAS computes in one kernel."""
        is_product = (
            self.is_pointwise()
            and self.stride == (1, 1)
            and z is None
            and self.bias is not None
            and self.activation == "relu"
        )
        return is_product and self.takes_epilogue(x)

    def run_product(self, x: Tensor) -> Tensor:
        """Pixels by channels times the weights, then bias and ReLU as cuBLAS writes."""
        assert self.bias is not None
        pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C_in)
        y = torch._addmm_activation(self.bias, pixels.flatten(0, 2), self.weight.flatten(1).t())
        return y.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)

    def takes_float8(self, x: Tensor) -> bool:
        """Whether the conv may compute in FP8."""
        allowed = self.float8_factor is not None and x.dtype == self.weight.dtype and not torch.is_grad_enabled()
        return allowed and self.is_pointwise() and suits_float8(self.weight)

    def run_float8(self, x: Tensor, z: Tensor | None, simulated: bool = False) -> Tensor:
        """As a scaled product of matrices in FP8, then sum and activation in one pass, if there are any."""
        weight: Float8Weight = self._prepared_weight(
            f"float8 of {self.float8_factor}", lambda: float8_weight(self.weight, self.float8_factor or 1.0)
        )
        conv = conv_float8_reference if simulated else conv_float8
        y = conv(x, weight, self.bias, self.stride[0])
        return conv_epilogue_(y, None, z, self.activation)

    def takes_winograd(self, x: Tensor, z: Tensor | None) -> bool:
        """Whether Winograd's algorithm computes this conv."""
        return suits_winograd(x, self.weight, *self._geometry()) and runs_onednn(x, self.weight, self.bias, z)

    def takes_onednn(self, x: Tensor, z: Tensor | None) -> bool:
        """Whether oneDNN takes along what follows the conv."""
        return runs_onednn(x, self.weight, self.bias, z) and x.dtype == self.weight.dtype

    def run_winograd(self, x: Tensor, z: Tensor | None, overwrite_z: bool = False) -> Tensor:
        """By Winograd's algorithm."""
        weight = self._prepared_weight("winograd", lambda: transform_weight(self.weight))
        return winograd_conv(x, weight, self.bias, z, self.activation, self.scratch, overwrite_z=overwrite_z)

    def run_fused(self, x: Tensor, z: Tensor | None, overwrite_z: bool = False) -> Tensor:
        """By oneDNN on a CPU; on a GPU with a pass of ours behind the conv; where neither serves, eagerly."""
        if self.takes_epilogue(x):
            return self.run_with_epilogue(x, z)
        if not self.takes_onednn(x, z):
            return self.run_eager(x, z)
        fused = self.activation if z is None or self.activation == "relu" else "none"  # a sum takes no swish
        x = x.contiguous(memory_format=torch.channels_last)
        form = self._packed_form(x)
        weight = self._prepared_weight(form, lambda: pack_weight(self.weight, x.shape, *self._geometry()))
        y = onednn_conv(x, weight, self.bias, z, fused, *self._geometry(), overwrite_z=overwrite_z)
        return y if fused == self.activation else _activated(y, self.activation)

    def _is_small(self, x: Tensor) -> bool:
        """Whether PyTorch's own conv is the faster on a CPU: the work takes no longer than a call of oneDNN."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or len(x) != 1 or x.numel() > _SMALL_INPUT:
            return False
        if self.groups > 1 or max(self.kernel_size) > 3 or self.weight.numel() > _SMALL_WEIGHT:
            return False
        return math.prod(self.output_shape(x)[2:]) * self.weight.numel() <= _SMALL_WORK

    def _packed_form(self, x: Tensor) -> str:
        """The name of packed weights that serve x. In groups of 48 channels, which oneDNN prefers where they need the
        least padding, it packs a larger kernel otherwise for outputs of few rows, and given the other packing it
        repacks at each call, in milliseconds."""
        rows = self.output_shape(x)[2]
        depends = -(-self.out_channels // 16) % 3 == 0 and self.kernel_size != (1, 1) and rows <= _FEW_ROWS
        return f"packed for {rows} rows" if depends else "packed"

    def run_eager(self, x: Tensor, z: Tensor | None) -> Tensor:
        """One operation of PyTorch after the other."""
        y = super().forward(x)
        return _activated(y if z is None else y.add_(z), self.activation)

    def describe(self, x: Tensor, z: Tensor | None, shortcut: "FusedConv | None" = None) -> str:
        """The work of a call in words, which are equal where the same way is the fastest."""
        kernel, summand = "x".join(map(str, self.weight.shape)), "sum + "
        if z is None:
            summand = ""
        elif shortcut is not None:
            more = "x".join(map(str, shortcut.weight.shape))
            summand = f"sum with conv {more} stride {shortcut.stride} of {'x'.join(map(str, z.shape))} + "
        elif z.shape[2:] != self.output_shape(x)[2:]:
            summand = f"sum of {'x'.join(map(str, z.shape[2:]))} resized + "
        layout = "channels_last" if x.is_contiguous(memory_format=torch.channels_last) else "NCHW"
        sizes = "stride {} padding {} dilation {} groups {}".format(*self._geometry())
        shape = "x".join(map(str, x.shape))
        or_float8 = f" or float8 of {self.float8_factor}" if self.takes_float8(x) else ""
        return f"conv {kernel} {sizes}, {summand}{self.activation}, of {shape} {x.dtype}{or_float8} {layout}"

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """(B, C_out, H_out, W_out) for an input of x's shape."""
        return output_shape(x, self.weight, *self._geometry()[:3])

    def _geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def _prepared_weight(self, form: str, prepare: Callable[[], Any]) -> Any:
        weight = self.weight
        state = weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version
        if self._prepared is None or self._prepared[0] != state:
            self._prepared = state, {}
        forms = self._prepared[1]
        if form not in forms:
            forms[form] = prepare()
        return forms[form]

    def __getstate__(self) -> dict[str, Any]:
        """A copy prepares its own: packed weights can be neither copied nor pickled."""
        return {name: value for name, value in vars(self).items() if name != "_prepared"}


class FusedStem(FusedConv):
    """A conv followed by ReLU and max pooling over windows of 3x3 with stride 2 and padding 1: how a ResNet begins.

    On a GPU the pooling adds the bias and applies ReLU, after PyTorch's conv (``pooled``) or our own (``stem``).
    """

    def run(
        self, way: str, x: Tensor, z: Tensor | None, overwrite_z: bool = False, shortcut: FusedConv | None = None
    ) -> Tensor:
        """Run in one of :meth:`possible_ways`."""
        if way == "fused":
            possible = self.possible_ways(x, z, shortcut)
            way = next((own for own in ("stem", "pooled") if own in possible), way)
        if way == "stem":
            return max_pool_relu(stem_conv(x, self.weight), self.bias)
        if way == "pooled":
            return max_pool_relu(F.conv2d(x, self.weight, None, *self._geometry()), self.bias)
        return F.max_pool2d(super().run(way, x, z, overwrite_z, shortcut), 3, 2, 1)

    def possible_ways(self, x: Tensor, z: Tensor | None, shortcut: FusedConv | None = None) -> list[str]:
        """The ways in which an input may run, the one that is right by definition first."""
        pooled = self.takes_epilogue(x) and z is None
        geometry = tuple(self.weight.shape[2:]), *self._geometry()
        is_stem = pooled and geometry == ((7, 7), (2, 2), (3, 3), (1, 1), 1) and serves_stem(x, self.weight)
        return [*super().possible_ways(x, z, shortcut), *["pooled"] * pooled, *["stem"] * is_stem]

    def describe(self, x: Tensor, z: Tensor | None, shortcut: FusedConv | None = None) -> str:
        """The work of a call in words, which are equal where the same way is the fastest."""
        return f"{super().describe(x, z, shortcut)}, max pooling"

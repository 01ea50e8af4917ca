"""GroupNorm followed by ReLU on the levels of a head (Wu and He 2018, https://arxiv.org/abs/1803.08494, equation 7).

With mean m and variance v of a group of channels over an image's level, r = 1 / sqrt(v + eps), h = (x - m) r:

    z = h w + b      y = max(z, 0)      dz = dy where z > 0, else 0
    dw = sum dz h    db = sum dz        dx = r (w dz - mean(w dz) - h mean(w dz h)),  means over the group

PyTorch's GroupNorm on CUDA returns NCHW memory, which undoes channels_last at every conv of torchvision's v2 heads. It
runs level by level, and the ReLU is one more pass. Here each launch handles all levels, and they stay channels_last.
Forward reads x twice and writes y once (3 passes; eager makes 5 and the layout changes), backward reads x and dy twice
and writes dx once. Sums are taken in float32 in a fixed order, without atomics: the same input gives the same bits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retina_fast.kernels.arguments import check_devices
from retina_fast.kernels.dispatch import needs_reference, runs_triton, tl, triton
from retina_fast.kernels.levels import check_levels, decode_size, encode_sizes, pick, pick_size
from retina_fast.kernels.one_pass import grads_by_reference


def group_norm_relu_reference(
    levels: Sequence[Tensor], weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5
) -> list[Tensor]:
    """The definition, differentiable by autograd; see :func:`group_norm_relu`."""
    return [F.relu(F.group_norm(level, num_groups, weight, bias, eps)) for level in levels]


# Triton. A tile is a run of pixels of one image and level, with all their channels: (R, C) in channels_last memory.
# Forward and backward take three launches each: the first sums every tile by channel, the second combines these sums to
# means of the groups, and the third writes the tiles.

_TILE = 8192  # elements, 32 for each thread: 16-byte accesses, no register spills
_WARPS = 8
_SUMS = 1024  # partial sums that a program combines at once; more of them spill


@triton.jit
def _tile_of_level(tiles, pixels, tile):
    """The level that holds a tile counted through the levels, the level's pixels, and the tile's number within it."""
    level, count, first = 0, decode_size(pixels[0]), 0
    for i in tl.static_range(1, len(pixels)):
        if tile >= decode_size(tiles[i]):
            level, count, first = i, decode_size(pixels[i]), decode_size(tiles[i])
    return level, count, tile - first


@triton.jit
def _normalised(x, weight_ptr, bias_ptr, stats_ptr, c, channels, PER_GROUP: tl.constexpr):
    """h and z (R, C), and r and w (1, C), from the group statistics (m, r) of one image and level."""
    inside = c < channels
    group = c // PER_GROUP
    m = tl.load(stats_ptr + 2 * group, mask=inside, other=0.0)[None, :]
    r = tl.load(stats_ptr + 2 * group + 1, mask=inside, other=0.0)[None, :]
    w = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    h = (x - m) * r
    return h, h * w + b, r, w


@triton.jit
def _tile_sums_kernel(
    levels, grads, weight_ptr, bias_ptr, stats_ptr, sums_ptr, tiles, pixels, channels, PER_GROUP: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes two sums by channel of tile t of image b, (B, T, 2, C). In forward they are the sum of x,
    and the sum of squares of x minus the tile's own mean; in backward the sums of dz and of dz h."""
    tile, image = tl.program_id(0), tl.program_id(1)
    level, count, position = _tile_of_level(tiles, pixels, tile)
    x_ptr, grad_ptr = pick(levels, level), pick(grads, level)
    row, c = tl.arange(0, R), tl.arange(0, C)
    rows = count - position * R
    mask = (row < rows)[:, None] & (c < channels)[None, :]
    offset = (image.to(tl.int64) * count + position * R) * channels
    i = row[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + offset + i, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        stats_ptr += (image * len(levels) + level) * (channels // PER_GROUP) * 2
        h, z, _, _ = _normalised(x, weight_ptr, bias_ptr, stats_ptr, c, channels, PER_GROUP)
        dz = tl.load(grad_ptr + offset + i, mask=mask, other=0.0).to(tl.float32)
        dz = tl.where(z > 0, dz, 0.0)
        first, second = tl.sum(dz, axis=0), tl.sum(dz * h, axis=0)
    else:
        first = tl.sum(x, axis=0)
        centred = tl.where(mask, x - (first / tl.minimum(rows, R).to(tl.float32))[None, :], 0.0)
        second = tl.sum(centred * centred, axis=0)
    sums_ptr += (image * tl.num_programs(0) + tile) * 2 * channels
    tl.store(sums_ptr + c, first, mask=c < channels)
    tl.store(sums_ptr + channels + c, second, mask=c < channels)


@triton.jit
def _group_stats_kernel(
    sums_ptr, stats_ptr, tiles, pixels, channels, eps, LEVELS: tl.constexpr, PER_GROUP: tl.constexpr, R: tl.constexpr,
    GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (g, l, b) computes (m, r) of group g in level l of image b from the sums of its tiles, by the formula of
    Chan et al. (1983) for combining variances."""
    group, level, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last, count = pick_size(tiles, level), pick_size(tiles[1:], level), pick_size(pixels, level)
    c = tl.arange(0, GROUP)
    sums_ptr += image * decode_size(tiles[LEVELS]) * 2 * channels + group * PER_GROUP
    n = (count * PER_GROUP).to(tl.float32)

    totals = tl.zeros([TILES, GROUP], tl.float32)
    begin = first
    while begin < last:
        t = begin + tl.arange(0, TILES)
        mask = (t < last)[:, None] & (c < PER_GROUP)[None, :]
        totals += tl.load(sums_ptr + t[:, None] * 2 * channels + c[None, :], mask=mask, other=0.0)
        begin += TILES
    mean = tl.sum(tl.sum(totals, axis=0), axis=0) / n

    # The sums about this mean are small, so that they also tell by how much rounding moved it.
    excesses, squares = tl.zeros([TILES, GROUP], tl.float32), tl.zeros([TILES, GROUP], tl.float32)
    begin = first
    while begin < last:
        t = begin + tl.arange(0, TILES)
        mask = (t < last)[:, None] & (c < PER_GROUP)[None, :]
        i = t[:, None] * 2 * channels + c[None, :]
        rows = tl.maximum(tl.minimum(count - (t - first) * R, R), 1).to(tl.float32)[:, None]
        excess = tl.where(mask, tl.load(sums_ptr + i, mask=mask, other=0.0) - rows * mean, 0.0)
        within = tl.load(sums_ptr + channels + i, mask=mask, other=0.0)
        excesses += excess
        squares += within + excess * excess / rows
        begin += TILES
    variance = tl.sum(tl.sum(squares, axis=0), axis=0) / n
    stats_ptr += ((image * LEVELS + level) * tl.num_programs(0) + group) * 2
    tl.store(stats_ptr, mean + tl.sum(tl.sum(excesses, axis=0), axis=0) / n)
    tl.store(stats_ptr + 1, 1 / tl.sqrt_rn(variance + eps))


@triton.jit
def _group_means_kernel(
    sums_ptr, weight_ptr, means_ptr, channel_sums_ptr, tiles, pixels, channels, LEVELS: tl.constexpr,
    PER_GROUP: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (g, l, b) computes the means of w dz and w dz h over group g in level l of image b, and for each channel
    the sums of dz and dz h, (B, L, 2, C)."""
    group, level, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last, count = pick_size(tiles, level), pick_size(tiles[1:], level), pick_size(pixels, level)
    c = tl.arange(0, GROUP)
    sums_ptr += image * decode_size(tiles[LEVELS]) * 2 * channels + group * PER_GROUP
    dz, dz_h = tl.zeros([TILES, GROUP], tl.float32), tl.zeros([TILES, GROUP], tl.float32)
    begin = first
    while begin < last:
        t = begin + tl.arange(0, TILES)
        mask = (t < last)[:, None] & (c < PER_GROUP)[None, :]
        i = t[:, None] * 2 * channels + c[None, :]
        dz += tl.load(sums_ptr + i, mask=mask, other=0.0)
        dz_h += tl.load(sums_ptr + channels + i, mask=mask, other=0.0)
        begin += TILES
    by_channel, by_channel_h = tl.sum(dz, axis=0), tl.sum(dz_h, axis=0)
    inside = c < PER_GROUP
    w = tl.load(weight_ptr + group * PER_GROUP + c, mask=inside, other=0.0).to(tl.float32)
    n = (count * PER_GROUP).to(tl.float32)
    where = image * LEVELS + level
    means_ptr += (where * tl.num_programs(0) + group) * 2
    tl.store(means_ptr, tl.sum(w * by_channel, axis=0) / n)
    tl.store(means_ptr + 1, tl.sum(w * by_channel_h, axis=0) / n)
    channel_sums_ptr += where * 2 * channels + group * PER_GROUP + c
    tl.store(channel_sums_ptr, by_channel, mask=inside)
    tl.store(channel_sums_ptr + channels, by_channel_h, mask=inside)


@triton.jit
def _group_norm_relu_kernel(
    levels, grads, outputs, weight_ptr, bias_ptr, stats_ptr, means_ptr, tiles, pixels, channels,
    PER_GROUP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Program (t, b) writes tile t of image b: y, or with BACKWARD dx."""
    tile, image = tl.program_id(0), tl.program_id(1)
    level, count, position = _tile_of_level(tiles, pixels, tile)
    x_ptr, grad_ptr = pick(levels, level), pick(grads, level)
    row, c = tl.arange(0, R), tl.arange(0, C)
    mask = (row < count - position * R)[:, None] & (c < channels)[None, :]
    offset = (image.to(tl.int64) * count + position * R) * channels
    i = row[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + offset + i, mask=mask, other=0.0).to(tl.float32)
    group_offset = (image * len(levels) + level) * (channels // PER_GROUP) * 2
    h, z, r, w = _normalised(x, weight_ptr, bias_ptr, stats_ptr + group_offset, c, channels, PER_GROUP)
    if BACKWARD:
        means_ptr += group_offset + 2 * (c // PER_GROUP)
        mean = tl.load(means_ptr, mask=c < channels, other=0.0)[None, :]
        mean_h = tl.load(means_ptr + 1, mask=c < channels, other=0.0)[None, :]
        dz = tl.load(grad_ptr + offset + i, mask=mask, other=0.0).to(tl.float32)
        out = r * (w * tl.where(z > 0, dz, 0.0) - mean - h * mean_h)
    else:
        out = tl.where(z <= 0, 0.0, z)  # NaN stays NaN
    out_ptr = pick(outputs, level)
    tl.store(out_ptr + offset + i, out.to(out_ptr.dtype.element_ty), mask=mask)


class _Tiles:
    """How the levels are cut into tiles, and the launches that read or write them."""

    def __init__(self, levels: Sequence[Tensor], num_groups: int) -> None:
        self.batch, self.channels = levels[0].shape[:2]
        self.C = triton.next_power_of_2(self.channels)
        self.R = max(1, _TILE // self.C)
        pixels = [level.shape[2] * level.shape[3] for level in levels]
        firsts = [0]
        for count in pixels:
            firsts.append(firsts[-1] + triton.cdiv(count, self.R))
        self.count, self.groups, self.per_group = firsts[-1], num_groups, self.channels // num_groups
        self.GROUP = triton.next_power_of_2(self.per_group)
        self.cut = encode_sizes(firsts), encode_sizes(pixels), self.channels

    def sums(self, levels: Sequence[Tensor], grads: Sequence[Tensor], *tensors: Tensor | None) -> Tensor:
        sums = levels[0].new_empty((self.batch, self.count, 2, self.channels), dtype=torch.float32)
        _tile_sums_kernel[(self.count, self.batch)](
            tuple(levels), tuple(grads), *tensors, sums, *self.cut, PER_GROUP=self.per_group, R=self.R, C=self.C,
            BACKWARD=tensors[0] is not None, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        return sums

    def write(self, levels: Sequence[Tensor], grads: Sequence[Tensor], *tensors: Tensor | None) -> list[Tensor]:
        outputs = [torch.empty_like(level) for level in levels]
        _group_norm_relu_kernel[(self.count, self.batch)](
            tuple(levels), tuple(grads), tuple(outputs), *tensors, *self.cut, PER_GROUP=self.per_group, R=self.R,
            C=self.C, BACKWARD=tensors[-1] is not None, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        return outputs


@torch.library.custom_op("retina_fast::group_norm_relu", mutates_args=())
def _forward_op(levels: list[Tensor], weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> list[Tensor]:
    """The outputs for channels_last levels, and last (m, r) of each group, (B, L, num_groups, 2)."""
    tiles = _Tiles(levels, num_groups)
    stats = weight.new_empty((tiles.batch, len(levels), num_groups, 2), dtype=torch.float32)
    with torch.cuda.device_of(weight):
        sums = tiles.sums(levels, levels, None, None, None)
        _group_stats_kernel[(num_groups, len(levels), tiles.batch)](
            sums, stats, *tiles.cut, eps, LEVELS=len(levels), PER_GROUP=tiles.per_group, R=tiles.R,
            GROUP=tiles.GROUP, TILES=max(1, _SUMS // tiles.GROUP), enable_fp_fusion=True,
        )  # fmt: skip
        return [*tiles.write(levels, levels, weight, bias, stats, None), stats]


@_forward_op.register_fake
def _(levels, weight, bias, num_groups, eps):
    stats = weight.new_empty((len(levels[0]), len(levels), num_groups, 2), dtype=torch.float32)
    return [*map(torch.empty_like, levels), stats]


@torch.library.custom_op("retina_fast::group_norm_relu_backward", mutates_args=())
def _backward_op(
    grads: list[Tensor], levels: list[Tensor], weight: Tensor, bias: Tensor, stats: Tensor
) -> list[Tensor]:
    """The levels' gradients, and last the sums of dz and dz h by channel, (B, L, 2, C)."""
    tiles = _Tiles(levels, stats.shape[2])
    means = torch.empty_like(stats)
    channel_sums = stats.new_empty((tiles.batch, len(levels), 2, tiles.channels))
    with torch.cuda.device_of(weight):
        sums = tiles.sums(levels, grads, weight, bias, stats)
        _group_means_kernel[(tiles.groups, len(levels), tiles.batch)](
            sums, weight, means, channel_sums, *tiles.cut, LEVELS=len(levels), PER_GROUP=tiles.per_group,
            GROUP=tiles.GROUP, TILES=max(1, _SUMS // tiles.GROUP), enable_fp_fusion=True,
        )  # fmt: skip
        return [*tiles.write(levels, grads, weight, bias, stats, means), channel_sums]


@_backward_op.register_fake
def _(grads, levels, weight, bias, stats):
    channel_sums = stats.new_empty((len(stats), len(levels), 2, levels[0].shape[1]))
    return [*map(torch.empty_like, levels), channel_sums]


def _setup_context(ctx, inputs, output):
    levels, weight, bias, *ctx.constants = inputs
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(*levels, weight, bias, output[-1])


def _backward(ctx, grad_outputs):
    *levels, weight, bias, stats = ctx.saved_tensors
    grads = [
        torch.zeros_like(level) if grad is None else grad.to(level.dtype).contiguous(memory_format=torch.channels_last)
        for grad, level in zip(grad_outputs[:-1], levels, strict=True)
    ]
    if needs_reference(*grads):
        num_groups, eps = ctx.constants

        def reference(*inputs):
            return group_norm_relu_reference(inputs[:-2], inputs[-2], inputs[-1], num_groups, eps)

        *grads, dw, db = grads_by_reference("group_norm_relu", reference, (*levels, weight, bias), grads)
        return grads, dw, db, None, None
    *grads, channel_sums = _backward_op(grads, levels, weight, bias, stats)
    db, dw = channel_sums.sum(dim=(0, 1))
    return grads, dw.to(weight.dtype), db.to(bias.dtype), None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _group_norm_relu_triton(
    levels: Sequence[Tensor], weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5
) -> list[Tensor]:
    levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
    return _forward_op(levels, weight, bias, num_groups, eps)[:-1]


def group_norm_relu(
    levels: Sequence[Tensor], weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5
) -> list[Tensor]:
    """ReLU of the GroupNorm of each level: levels of the same shapes and dtype, channels_last on a GPU.

    Args:
        levels: ``(B, C, H_l, W_l)``; any float dtype, any memory format. Each image's level is normalised by itself.
        weight, bias: ``(C,)``.
        num_groups: it must divide C.
        eps: added to the variance.

    Raises:
        ValueError: if C differs between the arguments, num_groups does not divide it, the levels differ in batch size
            or dtype, or the tensors lie on different devices.

    Backward with create_graph=True on a GPU computes the gradients by the slow reference, and warns of it.

    Example::

        >>> levels = [torch.randn(2, 64, 8, 8), torch.randn(2, 64, 4, 4)]
        >>> [level.shape[2] for level in group_norm_relu(levels, torch.ones(64), torch.zeros(64), num_groups=32)]
        [8, 4]
    """
    channels = levels[0].shape[1]
    if channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}")
    if {tuple(weight.shape), tuple(bias.shape)} | {level.shape[1:2] for level in levels} != {(channels,)}:
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit levels "
            f"{[tuple(level.shape) for level in levels]}"
        )
    check_levels(levels, channels)
    check_devices(levels[0].device, weight=weight, bias=bias)
    if runs_triton(levels[0], weight, bias):
        return _group_norm_relu_triton(levels, weight, bias, num_groups, eps)
    return group_norm_relu_reference(levels, weight, bias, num_groups, eps)

"""Focal loss, forward and backward: torchvision eager, torch.compile of the same formula, an apex-style kernel, ours.

One factor is varied at a time from a base case of 8 images of 800x800 with 91 classes. torchvision is given its one-hot
targets ready-made, and no anchor is ignored, so that its loss is one call, without what the head adds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.dispatch import PTX, tl, triton
from retina_fast.kernels.fast_math import reciprocal
from retina_fast.kernels.focal_loss import focal_loss, focal_loss_reference
from retina_fast.kernels.focal_terms import loss_and_slope
from retina_fast.kernels.levels import flatten_all

ANCHORS_PER_CELL = 9
ALPHA, GAMMA = 0.25, 2.0
FOREGROUND = 432.0  # anchors an image


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    height: int = 800
    width: int = 800
    num_classes: int = 91
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"focal loss, batch {self.batch}, {self.height}x{self.width}, {self.num_classes} classes"


BASES = [Setting(dtype=dtype) for dtype in ("float32", "bfloat16")]
SETTINGS = [
    *BASES,
    Setting(dtype="float16"),
    *[dataclasses.replace(base, batch=batch) for base in BASES for batch in (1, 2, 4, 16, 32)],
    *[dataclasses.replace(base, width=1344) for base in BASES],
    *[dataclasses.replace(base, num_classes=classes) for base in BASES for classes in (1, 80, 264)],
]
CPU_SETTINGS = [Setting(batch=2, height=256, width=256, num_classes=classes) for classes in (1, 91)]


def inputs(setting: Setting, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
    """Returns levels of logits as of an untrained head (channels_last), labels of 16 objects an image, normalizers."""
    generator = torch.Generator().manual_seed(0)
    cells = [(math.ceil(setting.height / s), math.ceil(setting.width / s)) for s in (8, 16, 32, 64, 128)]
    channels = ANCHORS_PER_CELL * setting.num_classes
    dtype = getattr(torch, setting.dtype)
    levels = [
        torch.empty(setting.batch, channels, h, w, dtype=dtype, device=device, memory_format=torch.channels_last)
        .normal_(-4, 1)
        .requires_grad_()
        for h, w in cells
    ]
    labels = torch.full((setting.batch, sum(h * w for h, w in cells) * ANCHORS_PER_CELL), -1, dtype=torch.int32)
    h, w = cells[0]
    for row in labels:
        for _ in range(16):  # each object covers 3x3 cells of P3, three anchors a cell
            y, x = (int(torch.randint(0, n - 3, (), generator=generator)) for n in (h, w))
            label = int(torch.randint(0, setting.num_classes, (), generator=generator))
            grid = row[: h * w * ANCHORS_PER_CELL].view(h, w, ANCHORS_PER_CELL)
            grid[y : y + 3, x : x + 3, 3:6] = label
    normalizers = torch.full((setting.batch,), FOREGROUND * setting.batch, device=device)
    return levels, labels.to(device), normalizers


def build(setting: Setting, device: torch.device, with_compile: bool) -> Built:
    levels, labels, normalizers = inputs(setting, device)
    k = setting.num_classes
    flat = torch.cat([level.detach() for level in flatten_all(levels, k)], dim=1).requires_grad_()  # (B, N, K)
    targets = (labels[..., None] == torch.arange(k, device=device)).to(flat.dtype)

    scaler = 65536.0 if setting.dtype == "float16" else 1.0  # GradScaler's; float16 gradients would become 0

    def step(loss: Any, leaves: Any) -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value if scaler == 1 else value * scaler, leaves)

    ours = functools.partial(step, lambda: focal_loss(levels, labels, normalizers, k, ALPHA, GAMMA), levels)
    baselines: dict[str, Callable[[], Any]] = {
        "torchvision eager": functools.partial(
            step, lambda: sigmoid_focal_loss(flat, targets, ALPHA, GAMMA, "sum") / normalizers[0], flat
        )
    }
    if with_compile:
        compiled = torch.compile(focal_loss_reference, dynamic=False)
        baselines["torch.compile"] = functools.partial(
            step, lambda: compiled([flat], labels, normalizers, k, ALPHA, GAMMA), flat
        )
    if device.type == "cuda":
        baselines["apex-style"] = functools.partial(
            step, lambda: ApexStyle.apply(flat, labels, FOREGROUND * setting.batch), flat
        )

    def check() -> None:
        tolerance = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-9}[setting.dtype]
        loss, *grads = ours()
        gradients = torch.cat(flatten_all(grads, k), dim=1)
        for b in range(setting.batch):  # one image at a time, since float64 takes room
            exact = flat[b : b + 1].detach().double().requires_grad_()
            value = focal_loss_reference([exact], labels[b : b + 1], normalizers[b : b + 1].double(), k, ALPHA, GAMMA)
            (grad,) = torch.autograd.grad(value * scaler, exact)
            assert (gradients[b] - grad[0]).norm() <= tolerance * grad.norm(), f"{setting}: gradient of image {b}"
            loss = loss - value.detach()
        assert loss.abs() <= 1e-5 * ours()[0], f"{setting}: loss"
        for name, baseline in baselines.items():  # they compute the same function, eager bfloat16 roughly
            _, grad = baseline()
            wide = max(tolerance, 0.05 if setting.dtype != "float32" else 1e-4)
            assert (grad.double() - gradients.double()).norm() <= wide * gradients.double().norm(), f"{setting}: {name}"

    return Built(ours, baselines, check, min_bytes=2 * flat.nbytes + labels.nbytes)


def _case(setting: Setting, goal: str | None = None) -> Case:
    # compiling takes half a minute a shape, so only the goals are compiled
    return Case(setting.name, setting.dtype, functools.partial(build, setting, with_compile=goal is not None), goal)


_GOALS = {BASES[0]: "K1-fp32", BASES[1]: "K1-bf16"}
CASES = [_case(setting, _GOALS.get(setting)) for setting in SETTINGS]
_SMALL = Setting(batch=2, height=128, width=96, num_classes=11)
SMALL = [
    _case(_SMALL, "K1-fp32"),
    _case(dataclasses.replace(_SMALL, dtype="bfloat16"), "K1-bf16"),
    _case(dataclasses.replace(_SMALL, dtype="float16")),
    _case(dataclasses.replace(_SMALL, batch=1)),
]


# This works as apex.contrib.focal_loss does, for any K and dtype: forward computes the loss and an unnormalised
# gradient, which backward multiplies by the incoming one. That makes four passes over concatenated logits.

_BLOCK = 2048


@triton.jit
def _apex_forward_tile(x_ptr, labels_ptr, grad_ptr, first, left, alpha, K: tl.constexpr, BLOCK: tl.constexpr,
                       MASKED: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    i = tl.arange(0, BLOCK)
    mask = i < left if MASKED else None
    element = first + i
    label = tl.load(labels_ptr + element // K, mask=mask)
    is_class = label == element % K
    x = tl.load(x_ptr + i, mask=mask).to(tl.float32)
    loss, slope = loss_and_slope(tl.where(is_class, -x, x), 2.0, PTX)
    weight = tl.where(is_class, alpha, 1 - alpha)
    tl.store(grad_ptr + i, (tl.where(is_class, -weight, weight) * slope).to(grad_ptr.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(i < left, weight * loss, 0.0))


@triton.jit
def _apex_forward(x_ptr, labels_ptr, grad_ptr, partials_ptr, size, alpha, K: tl.constexpr, BLOCK: tl.constexpr,
                  PTX: tl.constexpr):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * BLOCK
    anchor = offset // K
    first = (offset - anchor * K).to(tl.int32)
    x_ptr, labels_ptr, grad_ptr = x_ptr + offset, labels_ptr + anchor, grad_ptr + offset
    if offset + BLOCK <= size:
        loss = _apex_forward_tile(x_ptr, labels_ptr, grad_ptr, first, BLOCK, alpha, K, BLOCK, False, PTX)
    else:
        loss = _apex_forward_tile(x_ptr, labels_ptr, grad_ptr, first, size - offset, alpha, K, BLOCK, True, PTX)
    tl.store(partials_ptr + tl.program_id(0), loss)


@triton.jit
def _apex_backward(saved_ptr, grad_ptr, incoming_ptr, normalizer, size, BLOCK: tl.constexpr, PTX: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    factor = tl.load(incoming_ptr) * reciprocal(normalizer, PTX)
    if offset + BLOCK <= size:
        grad = tl.load(saved_ptr + offset + i).to(tl.float32) * factor
        tl.store(grad_ptr + offset + i, grad.to(grad_ptr.dtype.element_ty))
    else:
        mask = i < size - offset
        grad = tl.load(saved_ptr + offset + i, mask=mask).to(tl.float32) * factor
        tl.store(grad_ptr + offset + i, grad.to(grad_ptr.dtype.element_ty), mask=mask)


class ApexStyle(torch.autograd.Function):
    """`ApexStyle.apply(x, labels, normalizer)` is the loss of logits (B, N, K) and labels (B, N)."""

    @staticmethod
    def forward(ctx, x: Tensor, labels: Tensor, normalizer: float) -> Tensor:
        saved = torch.empty_like(x)
        blocks = triton.cdiv(x.numel(), _BLOCK)
        partials = x.new_empty(blocks, dtype=torch.float32)
        _apex_forward[(blocks,)](x, labels, saved, partials, x.numel(), ALPHA, K=x.shape[2], BLOCK=_BLOCK, PTX=PTX)
        ctx.save_for_backward(saved)
        ctx.normalizer = normalizer
        return partials.sum() / normalizer

    @staticmethod
    def backward(ctx, incoming: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (saved,) = ctx.saved_tensors
        grad = torch.empty_like(saved)
        _apex_backward[(triton.cdiv(saved.numel(), _BLOCK),)](
            saved, grad, incoming, ctx.normalizer, saved.numel(), BLOCK=_BLOCK, PTX=PTX
        )
        return grad, None, None


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else CPU_SETTINGS, ids=str)
@pytest.mark.parametrize("implementation", ["torchvision eager", "torch.compile", "apex-style", "ours"])
def test_focal_loss(implementation: str, setting: Setting, benchmark: Any) -> None:
    if implementation == "apex-style" and not torch.cuda.is_available():
        pytest.skip("a Triton kernel")
    with_compile = implementation == "torch.compile"
    run_benchmark(
        functools.partial(build, with_compile=with_compile), setting, setting.dtype, implementation, benchmark
    )

"""Small arguments that fit each public operation, and calls of it by either path."""

from unittest import mock

import torch

from retina_fast.kernels import (
    anchor_matching,
    atss_matching,
    batched_nms,
    box_decode,
    box_loss,
    box_quality,
    candidate_selection,
    distribution_loss,
    focal_loss,
    group_norm_relu,
    soft_focal_loss,
    take_kept,
    task_aligned_matching,
)


def arguments(device="cpu"):
    """Keyword arguments that fit every operation: 2 images, 8 anchors in two levels, 3 classes, 3 ground truths. On
    another device they have no values."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(8, 2, generator=generator) * 20
    anchors = torch.cat((corner, corner + 8), dim=1)
    logits = [torch.randn(2, 2 * 3, n, 1, generator=generator) for n in (3, 1)]
    deltas = [torch.randn(2, 2 * 4, n, 1, generator=generator) * 0.3 for n in (3, 1)]
    indices = torch.tensor([[0, -1, -2, 1, -1, -1, 1, 0], [-1, 0, -1, -1, -2, -1, -1, -1]])
    boxes, offsets = anchors[:3] + 1, torch.tensor([0, 2, 3])
    sizes = torch.tensor([[20, 30], [25, 18]])
    found = {
        "boxes": torch.stack((anchors, anchors + 2)),
        "scores": torch.rand(2, 8, generator=generator),
        "labels": torch.randint(0, 3, (2, 8), generator=generator),
        "counts": torch.tensor([8, 5]),
    }
    normalizers = torch.tensor([3.0, 300.0])
    made = {
        "anchor_matching": {"anchors": anchors, "boxes": boxes, "labels": torch.tensor([2, 0, 1]), "offsets": offsets},
        "atss_matching": {
            "anchors": anchors, "boxes": boxes, "labels": torch.tensor([2, 0, 1]), "offsets": offsets,
            "level_sizes": [6, 2],
        },
        "task_aligned_matching": {
            "logits": logits, "deltas": deltas, "anchors": anchors, "boxes": boxes, "labels": torch.tensor([2, 0, 1]),
            "offsets": offsets, "num_classes": 3,
        },
        "focal_loss": {"logits": logits, "labels": indices, "normalizers": normalizers, "num_classes": 3},
        "box_loss": {
            "deltas": deltas, "anchors": anchors, "indices": indices, "boxes": boxes, "offsets": offsets,
            "normalizers": normalizers, "weights": torch.rand(2, 8, generator=generator),
        },
        "distribution_loss": {
            "distributions": [torch.randn(2, 2 * 4 * 3, n, 1, generator=generator) for n in (3, 1)], "anchors": anchors,
            "indices": indices, "boxes": boxes, "offsets": offsets, "normalizers": normalizers, "reg_max": 2,
            "weights": torch.rand(2, 8, generator=generator),
        },
        "soft_focal_loss": {
            "logits": logits, "labels": indices, "quality": torch.rand(2, 8, generator=generator),
            "normalizers": normalizers, "num_classes": 3,
        },
        "box_quality": {
            "deltas": deltas, "anchors": anchors, "indices": indices, "boxes": boxes, "offsets": offsets,
        },
        "candidate_selection": {"logits": logits, "num_classes": 3},
        "box_decode": {
            "deltas": deltas, "anchors": anchors, "index": torch.tensor([[7, 0, 3], [1, 1, 2]]), "image_sizes": sizes,
        },
        "batched_nms": found,
        "take_kept": {
            **found, "positions": torch.tensor([[1, 0], [4, 2]]), "counts": torch.tensor([2, 1]), "image_sizes": sizes,
            "original_sizes": 2 * sizes,
        },
        "group_norm_relu": {
            "levels": [torch.randn(2, 6, n, n, generator=generator) for n in (3, 2)], "weight": torch.ones(6),
            "bias": torch.zeros(6), "num_groups": 2,
        },
    }  # fmt: skip
    if device == "cpu":
        return made
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: torch.empty_like(x, device=device), made)


MODULES = {
    "anchor_matching": anchor_matching, "atss_matching": atss_matching, "focal_loss": focal_loss,
    "soft_focal_loss": soft_focal_loss, "box_loss": box_loss, "box_quality": box_quality, "box_decode": box_decode,
    "candidate_selection": candidate_selection, "batched_nms": batched_nms, "take_kept": take_kept,
    "group_norm_relu": group_norm_relu, "distribution_loss": distribution_loss,
    "task_aligned_matching": task_aligned_matching,
}  # fmt: skip


def call(name, keywords):
    return getattr(MODULES[name], name)(**keywords)


def by_kernels(name, keywords, device):
    """What the kernels return for tensors moved to the device, on the CPU."""
    moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), keywords)
    with mock.patch.object(MODULES[name], "runs_triton", return_value=True):
        result = call(name, moved)
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.cpu(), result)


def leaves(result):
    return [x.detach() for x in torch.utils._pytree.tree_leaves(result)]

"""A detector of one's own, built from the operations of retina_fast.ops.

    python -m examples.own_detector

The network has three convs, one level of stride 8 and one square anchor a cell. It learns to find bright and dark
squares in noise, in seconds on a CPU. Nothing in it is a RetinaNet but the operations.
"""

import torch
from torch import Tensor, nn

from retina_fast import ops

SIDE, STRIDE, CLASSES = 64, 8, ("bright", "dark")


class TinyDetector(nn.Module):
    """Maps images (B, 1, 64, 64) to losses or to detections."""

    anchors: Tensor
    """(N, 4) xyxy in pixels."""

    def __init__(self) -> None:
        super().__init__()
        convs = [nn.Conv2d(inputs, 32, 5, stride=2, padding=2) for inputs in (1, 32, 32)]
        self.trunk = nn.Sequential(*(layer for conv in convs for layer in (conv, nn.ReLU())))
        self.classify = nn.Conv2d(32, len(CLASSES), 3, padding=1)
        self.regress = nn.Conv2d(32, 4, 3, padding=1)
        # Nearly all anchors are background.
        nn.init.constant_(self.classify.bias, -4.0)  # pyrefly: ignore[bad-argument-type]
        centres = torch.arange(SIDE // STRIDE) * STRIDE + STRIDE / 2
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        self.register_buffer("anchors", torch.stack((x - 8, y - 8, x + 8, y + 8), dim=-1).reshape(-1, 4))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The logits (B, K, 8, 8) and the deltas (B, 4, 8, 8) of each level; there is one."""
        features = self.trunk(images)
        return [self.classify(features)], [self.regress(features)]

    def losses(self, images: Tensor, boxes: list[Tensor], labels: list[Tensor]) -> Tensor:
        """The sum of focal loss and box loss; `boxes` (G, 4) and `labels` (G,) of each image."""
        logits, deltas = self(images)
        offsets = torch.tensor([0, *(len(image) for image in boxes)]).cumsum(0).to(images.device)
        truths = torch.cat(boxes)
        matches = ops.anchor_matching(self.anchors, truths, torch.cat(labels), offsets)
        normalizers = matches.num_foreground.clamp(min=1) * float(len(images))
        focal = ops.focal_loss(logits, matches.labels, normalizers, len(CLASSES))
        return focal + ops.box_loss(deltas, self.anchors, matches.indices, truths, offsets, normalizers)

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        logits, deltas = self(images)
        sizes = torch.tensor([[SIDE, SIDE]] * len(images), device=images.device)
        best = ops.candidate_selection(logits, len(CLASSES), score_thresh=0.3)
        boxes = ops.box_decode(deltas, self.anchors, best.anchors, sizes)  # (B, M, 4)
        kept = ops.padded_batched_nms(boxes, best.scores, best.labels, best.counts, max_detections=20)
        rows = [positions[:count] for positions, count in zip(kept.positions, kept.counts.tolist(), strict=True)]
        return [
            {"boxes": boxes[b, row], "scores": best.scores[b, row], "labels": best.labels[b, row]}
            for b, row in enumerate(rows)
        ]


def squares(count: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Noise images (B, 1, 64, 64), each with a bright and a dark square, and the squares' boxes and labels."""
    images = 0.1 * torch.randn(count, 1, SIDE, SIDE)
    boxes, labels = [], []
    for image in images:
        corners = []
        for value, left in ((1.0, 0), (-1.0, SIDE // 2)):
            side, top = (int(torch.randint(12, 20, ())) for _ in range(2))
            image[0, top : top + side, left + 4 : left + 4 + side] += value
            corners.append([left + 4, top, left + 4 + side, top + side])
        boxes.append(torch.tensor(corners, dtype=torch.float32))
        labels.append(torch.tensor([0, 1]))
    return images, boxes, labels


def main(steps: int = 100) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TinyDetector().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        images, boxes, labels = squares(16)
        loss = model.losses(images.to(device), [x.to(device) for x in boxes], [x.to(device) for x in labels])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    images, boxes, _ = squares(1)
    (found,) = model.detect(images.to(device))
    print("true boxes:", boxes[0].int().tolist())
    for box, score, label in zip(*(found[key].tolist() for key in ("boxes", "scores", "labels")), strict=True):
        print(f"found: {[round(x) for x in box]}, {CLASSES[label]}, score {score:.2f}")


if __name__ == "__main__":
    main()

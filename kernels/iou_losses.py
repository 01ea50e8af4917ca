"""The IoU losses of decoded boxes, with their slopes, which the losses over deltas and over distributions share.

    giou         Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630
    diou, ciou   Zheng et al. 2020, https://arxiv.org/abs/1911.08287

Per axis, with the overlap o of two intervals and the predicted size p = 2 h around the centre c:

    enclosure e = p + (size of the ground truth) - o
    do/dc = [p2 < b2] - [p1 > b1]     do/dh = [p2 < b2] + [p1 > b1]     de/dc = -do/dc     de/dh = 2 - do/dh

where [.] is 1/2 on a tie, as autograd has it, and every gradient follows by the chain rule. The kernels work relative
to the anchor's centre, where float32 keeps more digits of a small box.
"""

from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from retina_fast.kernels.dispatch import HAS_TRITON, tl, triton
from retina_fast.kernels.fast_math import atan

IOU_LOSSES = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}
"""torchvision's functions, which are the references, by the names that losses take."""

_EPS = tl.constexpr(1e-7)  # torchvision's, in every quotient
_NAN = tl.constexpr(tl.PropagateNan.ALL if HAS_TRITON else None)  # otherwise a minimum would hide a NaN


@triton.jit
def _less(a, b):
    """[a < b], 1/2 on a tie."""
    return tl.where(a < b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _overlap(c, h, b1, b2):
    """The overlap of the intervals [c - h, c + h] and [b1, b2], negative where they are apart, and its slopes in c and
    h."""
    above, below = _less(c + h, b2), _less(b1, c - h)
    overlap = tl.minimum(c + h, b2, _NAN) - tl.maximum(c - h, b1, _NAN)
    return overlap, above - below, above + below


@triton.jit
def iou_loss_and_slopes(cx, cy, hx, hy, bx1, by1, bx2, by2, LOSS: tl.constexpr):
    """The loss of boxes with centre (cx, cy) and half sizes (hx, hy), and its slopes in these four numbers."""
    bw, bh = bx2 - bx1, by2 - by1
    ox, ox_c, ox_h = _overlap(cx, hx, bx1, bx2)
    oy, oy_c, oy_h = _overlap(cy, hy, by1, by2)
    ex, ey = 2 * hx + bw - ox, 2 * hy + bh - oy
    meet = (ox > 0) & (oy > 0)
    inter = tl.where(meet, ox * oy, 0.0)
    area = 4 * hx * hy
    union = area + bw * bh - inter + _EPS
    loss = 1 - inter / union
    by_inter = -(union + inter) / (union * union)
    by_area = inter / (union * union)
    if LOSS == "giou":
        hull = ex * ey + _EPS
        loss += (hull - union) / hull
        by_inter += 1 / hull
        by_area -= 1 / hull
        by_ex = union / (hull * hull) * ey
        by_ey = union / (hull * hull) * ex
    else:
        diagonal = ex * ex + ey * ey + _EPS
        dx, dy = cx - 0.5 * (bx1 + bx2), cy - 0.5 * (by1 + by2)
        distance = (dx * dx + dy * dy) / diagonal
        loss += distance
        by_ex = -2 * distance * ex / diagonal
        by_ey = -2 * distance * ey / diagonal
    by_ox = tl.where(meet, by_inter * oy, 0.0) - by_ex
    by_oy = tl.where(meet, by_inter * ox, 0.0) - by_ey
    grad_cx, grad_hx = by_ox * ox_c, by_ox * ox_h + 4 * by_area * hy + 2 * by_ex
    grad_cy, grad_hy = by_oy * oy_c, by_oy * oy_h + 4 * by_area * hx + 2 * by_ey
    if LOSS != "giou":
        grad_cx += 2 * dx / diagonal
        grad_cy += 2 * dy / diagonal
    if LOSS == "ciou":  # its weight alpha counts as a constant
        difference = atan(bw / bh) - atan(hx / hy)
        v = 0.4052847345693511 * difference * difference  # 4 / pi^2
        alpha = v / (1 - inter / union + v + _EPS)
        loss += alpha * v
        by_angle = -0.8105694691387022 * alpha * difference / (hx * hx + hy * hy)
        grad_hx += by_angle * hy
        grad_hy -= by_angle * hx
    return loss, grad_cx, grad_cy, grad_hx, grad_hy

"""The goals of the cases of `make gpu` on one H200: what each is compared with, and how fast it must be."""

from dataclasses import dataclass, field
from typing import Any

DEVICE = "H200"  # what the goals, and the predictions, hold for
EAGER, AMP, COMPILED = "torchvision eager", "torchvision eager AMP", "torchvision compiled"


@dataclass(frozen=True)
class Goal:
    """What a case must reach.

    Args:
        what: the case in words.
        ratios: how many times as fast as each baseline.
        share: of the device's limit.
        ms: the most milliseconds that the call may take as a CUDA graph.
        images: the images of a batch, where the goal is a number of images a second.
    """

    what: str
    ratios: dict[str, float] = field(default_factory=dict)
    share: float | None = None
    ms: float | None = None
    images: int = 0


GOALS = {
    "K1-fp32": Goal("focal loss, float32", {EAGER: 30, "torch.compile": 2.5, "apex-style": 1.8}, share=0.85),
    "K1-bf16": Goal("focal loss, bfloat16", {EAGER: 25, "torch.compile": 2.5, "apex-style": 1.8}, share=0.7),
    "K2": Goal("matching and losses", {EAGER: 50}),
    "K3-g500": Goal("matching, 500 objects", {EAGER: 20}),
    "K3-b16": Goal("matching, batch 16", {EAGER: 50}),
    "K4-b1": Goal("postprocess, batch 1", {EAGER: 25}, ms=0.05),
    "K4-b8": Goal("postprocess, batch 8", {EAGER: 80}),
    "K4-b32": Goal("postprocess, batch 32", {EAGER: 120}, ms=0.28),
    "K5-b1": Goal("NMS, batch 1", {EAGER: 20}),
    "K5-b32": Goal("NMS, batch 32", {EAGER: 200}),
    "K5-all": Goal("NMS, all of 100,000 kept", {EAGER: 1}, ms=30),
    "K6": Goal("image batch", {EAGER: 10}),
    "E1": Goal("inference, batch 1", {EAGER: 5, COMPILED: 2.5}, ms=1.2),
    "E2": Goal("inference, batch 32", {AMP: 5, COMPILED: 2}, ms=32e3 / 1600, images=32),
    "E3": Goal("training step, batch 16", {AMP: 2.5, COMPILED: 1.5}, ms=16e3 / 450, images=16),
    "E3-mlperf": Goal("training step of MLPerf's model", ms=16e3 / 308, images=16),
    "E4": Goal("training step, captured"),
}

FAMILIES = {
    "K1": "focal loss",
    "K2": "matching and losses",
    "K3": "matching",
    "K4": "postprocess",
    "K5": "NMS",
    "K6": "image batch",
    "E1": "inference, batch 1",
    "E2": "inference, batch 32",
    "E3": "training step",
}  # what the goals of one number are about


def goals_for(environment: dict[str, Any]) -> dict[str, Goal]:
    """Returns the goals that a record is judged by: on another device than the goals' they only have a name."""
    if DEVICE in environment["device"]:
        return GOALS
    return {name: Goal(goal.what, images=goal.images) for name, goal in GOALS.items()}

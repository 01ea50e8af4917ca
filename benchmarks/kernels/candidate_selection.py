"""Candidate selection: torchvision's, which goes through images and levels, and ours for the batch.

Both start from the logits as each lays them out: flattened for torchvision, as the heads' convs write them for ours.
"""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from benchmarks.kernels import postprocess
from benchmarks.kernels.postprocess import THRESHOLD, TOPK
from retina_fast.kernels.candidate_selection import Candidates, candidate_selection, candidate_selection_reference
from retina_fast.kernels.levels import flatten_all


@dataclasses.dataclass(frozen=True)
class Setting(postprocess.Setting):
    what = "candidate selection"


BASE = Setting()
SETTINGS = [
    *[dataclasses.replace(BASE, batch=batch) for batch in (8, 1, 32)],
    *[dataclasses.replace(BASE, above=above) for above in (0.0, 0.1)],
    dataclasses.replace(BASE, dtype="float32"),
]
CPU_SETTING = Setting(2, 512, 512, dtype="float32")


@torch.no_grad()
def build(setting: Setting, device: torch.device) -> Built:
    k = setting.num_classes
    levels = postprocess.inputs(setting, device)[0]["cls_logits"]
    flat = [level.contiguous() for level in flatten_all(levels, k)]  # (B, N_l, K)

    def ours() -> Candidates:
        return candidate_selection(levels, k, THRESHOLD, TOPK)

    def torchvision_eager() -> list[tuple[Tensor, Tensor, Tensor]]:
        found = []
        for b in range(setting.batch):
            for level in flat:
                scores = torch.sigmoid(level[b]).flatten()
                keep = scores > THRESHOLD
                scores, index = scores[keep], torch.where(keep)[0]
                scores, order = scores.topk(min(TOPK, len(index)))
                index = index[order]
                found.append((scores, torch.div(index, k, rounding_mode="floor"), index % k))
        return found

    def check() -> None:
        selected, expected = ours(), candidate_selection_reference(levels, k, THRESHOLD, TOPK)
        for name in ("anchors", "labels", "counts"):
            assert torch.equal(getattr(selected, name), getattr(expected, name)), f"{setting}: {name}"
        torch.testing.assert_close(selected.scores, expected.scores, rtol=1e-6, atol=0)
        theirs = sum(len(scores) for scores, _, _ in torchvision_eager())
        if setting.dtype == "float32":  # in bfloat16 torchvision's scores are rounded before they are compared
            assert theirs == int(expected.counts.sum()), setting

    return Built(ours, {"torchvision eager": torchvision_eager}, check, min_bytes=sum(level.nbytes for level in levels))


def _case(setting: Setting) -> Case:
    return Case(setting.name, setting.dtype, functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
SMALL = [_case(Setting(2, 64, 64, 7, dtype, above)) for dtype, above in (("float32", 0.01), ("bfloat16", 0.1))]


@pytest.mark.parametrize("setting", SETTINGS if torch.cuda.is_available() else [CPU_SETTING], ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torchvision eager", "ours"])
def test_candidate_selection(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, setting.dtype, implementation, benchmark)

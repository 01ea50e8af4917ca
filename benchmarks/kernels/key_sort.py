"""Sorting rows of distinct 63-bit keys in falling order: torch.sort, ours in two launches."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Built, Case, run_benchmark
from retina_fast.kernels.dispatch import INTERPRETED
from retina_fast.kernels.key_sort import PADDING, sort_keys


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 8
    keys: int = 5000
    padding: int = 0  # at the end of each row

    @property
    def name(self) -> str:
        return f"key sort, batch {self.batch}, {self.keys} keys and {self.padding} of padding a row"


SETTINGS = [
    *[Setting(batch) for batch in (8, 1, 32)],
    *[Setting(keys=keys) for keys in (1000, 8192)],
    Setting(keys=1000, padding=4000),
]


def build(setting: Setting, device: torch.device) -> Built:
    generator = torch.Generator().manual_seed(0)
    shape = setting.batch, setting.keys
    high = torch.randint(0, 2**30, shape, generator=generator) << 32
    keys = torch.full((setting.batch, setting.keys + setting.padding), PADDING)
    keys[:, : setting.keys] = high + torch.arange(setting.keys)
    keys, counts = keys.to(device), torch.full((setting.batch,), setting.keys, device=device)

    def ours() -> Tensor:
        return sort_keys(keys, counts)

    def torch_sort() -> Tensor:
        return keys.sort(dim=1, descending=True).values

    def check() -> None:
        assert torch.equal(ours(), torch_sort()), setting

    return Built(ours, {"torch eager": torch_sort}, check, min_bytes=2 * keys.nbytes)


def _case(setting: Setting) -> Case:
    return Case(setting.name, "int64", functools.partial(build, setting))


CASES = [_case(setting) for setting in SETTINGS]
# there is no path for a CPU, only the kernel, which can be interpreted
SMALL = [_case(Setting(2, 300, 7))] if INTERPRETED or torch.cuda.is_available() else []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="ours is a Triton kernel")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("implementation", ["torch eager", "ours"])
def test_key_sort(implementation: str, setting: Setting, benchmark: Any) -> None:
    run_benchmark(build, setting, "int64", implementation, benchmark)

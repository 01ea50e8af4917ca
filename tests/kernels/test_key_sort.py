"""Sorting rows of keys, against Python's own sort, exactly."""

import numpy as np
import pytest
import torch

from retina_fast.kernels import key_sort as module
from retina_fast.kernels.dispatch import tl, triton
from retina_fast.kernels.key_sort import PADDING, sort_keys
from tests.instruments.fake_gpu import launches_of
from tests.ptx.cases import OTHER_ORDERS, check, names

LARGEST = 2**63 - 1


def rows(width, counts, seed=0, largest=LARGEST):
    """Rows of distinct random keys (B, width), the first counts[b] of row b; what lies behind them is padding."""
    generator = np.random.default_rng(seed)
    keys = np.full((len(counts), width), PADDING, dtype=np.int64)
    for b, count in enumerate(counts):
        drawn: set[int] = set()
        while len(drawn) < count:
            drawn |= set(generator.integers(0, largest, count, dtype=np.int64, endpoint=True).tolist())
        chosen = np.array(sorted(drawn)[:count], dtype=np.int64)
        generator.shuffle(chosen)
        keys[b, :count] = chosen
    return torch.from_numpy(keys)


def assert_sorted(keys, counts, device):
    ours = sort_keys(keys.to(device), torch.tensor(counts, device=device)).cpu()
    expected = [sorted(row[:count].tolist(), reverse=True) for row, count in zip(keys, counts, strict=True)]
    assert [row[:count].tolist() for row, count in zip(ours, counts, strict=True)] == expected
    assert all((row[count:] == PADDING).all() for row, count in zip(ours, counts, strict=True))


@pytest.fixture(autouse=True, params=["counted", "in runs"])
def _both_ways(request, monkeypatch):
    """Both ways to find a place. What a kernel leaves unwritten is the largest integer."""
    torch.use_deterministic_algorithms(True)
    if request.param != "compiled":
        monkeypatch.setattr(module, "_PAIRS", 10**8 if request.param == "counted" else 0)
    for name in () if request.param == "compiled" else ("COUNTED", "MERGED"):
        monkeypatch.setattr(module, name, 256)  # the interpreter's time is that of the programs
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("width", [1, 255, 256, 257, 700])
def test_full_rows(width, device):
    """Around the 256 keys of one run, and several runs."""
    assert_sorted(rows(width, [width, width]), [width, width], device)


@pytest.mark.parametrize("width", [8192, 8193])
def test_the_longest_rows_of_the_kernels_and_the_first_of_torch(width, device):
    assert_sorted(rows(width, [width]), [width], device)


def test_padding_and_empty_rows(device):
    counts = [0, 1, 256, 257, 600]
    assert_sorted(rows(600, counts), counts, device)


def test_what_lies_behind_the_count_is_not_read(device):
    """Up to 8192 keys a row. The callers leave PADDING there, which longer rows need."""
    keys = rows(300, [40, 270])
    keys[0, 40:], keys[1, 270:] = LARGEST, 7
    ours = sort_keys(keys.to(device), torch.tensor([40, 270], device=device)).cpu()
    assert ours[0, :40].tolist() == sorted(keys[0, :40].tolist(), reverse=True)
    assert (ours[0, 40:] == PADDING).all()
    assert (ours[1, 270:] == PADDING).all()


@pytest.mark.parametrize("order", [1, -1], ids=["falling", "rising"])
def test_rows_in_order_already_with_extreme_keys(order, device):
    ends = [LARGEST, LARGEST - 1, 2**62, 2**32, 2**32 - 1, 2**31, 2**31 - 1, 1, 0]
    keys = torch.tensor([*ends[:4], *range(2**32 + 500, 2**32, -1), *ends[4:]])
    assert_sorted(keys[None] if order == 1 else keys.flip(0)[None], [len(keys)], device)


def test_ties_go_to_the_lower_place(device):
    """Equal scores differ in the low bits, which hold the place counted down."""
    places = torch.arange(600)
    keys = ((places % 3) << 31) + (2**31 - 1 - places)
    ours = sort_keys(keys[None].to(device), torch.tensor([600], device=device))[0].cpu()
    assert (2**31 - 1 - (ours & (2**31 - 1))).tolist() == sorted(range(600), key=lambda i: (-(i % 3), i))


def test_no_row_and_no_column(device):
    for shape in ((0, 5), (2, 0)):
        keys, counts = (torch.zeros(size, dtype=torch.int64, device=device) for size in (shape, shape[:1]))
        assert sort_keys(keys, counts).shape == shape


@triton.jit
def _rising_test(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, module.rising(tl.load(x_ptr + i)))


def test_rising_orders_as_the_numbers_do(device):
    """-0 equals 0, every NaN is above infinity and equals every other, and subnormal numbers are told apart."""
    pytest.importorskip("triton")
    inf, nan = float("inf"), float("nan")
    numbers = [-inf, -3.4e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1.5, 3.4e38, inf, nan]
    x = torch.tensor([*numbers, -nan, 1.0, 2.0, -2.0], device=device)
    out = torch.empty(16, dtype=torch.int32, device=device)
    _rising_test[(1,)](x, out, N=16)
    keys = out[:12].tolist()
    assert keys == sorted(keys)
    assert len(set(keys)) == 11
    assert keys[4] == keys[5] == 0
    assert out[12] == keys[11] == 2**31 - 1


@pytest.mark.parametrize(
    ("batch", "kernels"), [(1, ["_sort_kernel"]), (4, ["_sort_kernel"]), (8, ["_sort_runs_kernel", "_sort_kernel"])]
)
@pytest.mark.parametrize("_both_ways", ["counted"], indirect=True)
def test_launches(batch, kernels):
    """In a small batch all pairs are compared."""

    def run():
        sort_keys(*(torch.empty(shape, dtype=torch.int64, device="cuda") for shape in ((batch, 5000), (batch,))))

    assert [launch.kernel.__name__ for launch in launches_of(run)] == kernels


# As compiled code, both ways


@pytest.mark.parametrize("_both_ways", ["compiled"], indirect=True)
@pytest.mark.parametrize("name", names("key_sort"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("_both_ways", ["compiled"], indirect=True)
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("key_sort"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])

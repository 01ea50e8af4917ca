"""Uploads and late reads, by stand-ins for CUDA's streams and events; and what device computes in what."""

import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retina_fast import device
from retina_fast.device import LateRead, Uploads, has_bfloat16, keep_freed_memory, one_thread


class Timeline:
    """Streams and events that write down what happens."""

    def __init__(self, monkeypatch):
        self.log, self.current = [], "main"
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream("main"))
        monkeypatch.setattr(torch.cuda, "stream", self.within)

    def stream(self, name):
        event = SimpleNamespace(synchronize=lambda: self.log.append(f"host waits for {name}"))
        return SimpleNamespace(
            name=name, record_event=lambda: event, wait_event=lambda _: self.log.append(f"{name} waits for an event")
        )

    @contextlib.contextmanager
    def within(self, stream):
        self.current, before = stream.name, self.current
        yield
        self.current = before


class Image(torch.Tensor):
    """A pinned image whose copy to a GPU is written down."""

    def is_pinned(self):  # pyrefly: ignore[bad-override]
        return True

    def to(self, device, non_blocking=False):  # pyrefly: ignore[bad-override]
        timeline.log.append(f"copied on {timeline.current}, non_blocking={non_blocking}")
        return SimpleNamespace(record_stream=lambda stream: timeline.log.append(f"kept for {stream.name}"))


timeline: Timeline


def test_pinned_images_are_copied_when_the_call_returns_and_nothing_else_is_waited_for(monkeypatch):
    global timeline
    timeline = Timeline(monkeypatch)
    Uploads(torch.device("cuda")).to_device([torch.zeros(3, 4, 4).as_subclass(Image)])
    assert timeline.log == [
        "copied on side, non_blocking=True",
        "main waits for an event",
        "kept for main",
        "host waits for side",
    ]


def test_images_of_the_device_are_not_copied():
    image = torch.zeros(3, 4, 4)
    assert Uploads(torch.device("cpu")).to_device([image])[0] is image


def test_values_of_a_cpu_are_there_at_once():
    late = LateRead(torch.tensor([3, 4]))
    assert late.arrived()
    assert late.wait().tolist() == [3, 4]


def test_values_of_a_gpu_go_to_pinned_memory_of_the_host_whatever_the_default_device(monkeypatch):
    Timeline(monkeypatch)
    made = []

    def empty(shape, **options):
        made.append(options)
        return SimpleNamespace(copy_=lambda values, non_blocking: None)

    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch, "empty", empty)
    values: Any = SimpleNamespace(device=torch.device("cuda"), shape=(2,), dtype=torch.int64)
    LateRead(values)
    assert made == [{"dtype": torch.int64, "device": "cpu", "pin_memory": True}]


@pytest.mark.parametrize("amx", [False, True])
def test_bfloat16_on_a_cpu_needs_amx(monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_bfloat16(torch.device("cpu")) == amx


@pytest.mark.parametrize("supported", [False, True])
@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_bfloat16_on_a_cpu_without_amx_is_timed(monkeypatch, supported, slow):
    asked = []

    def conv(x, weight, padding):
        asked.append(x.dtype)
        time.sleep(0.002 if x.dtype == slow else 0)

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(device.F, "conv2d", conv)
    assert device.convs_gain_by_bfloat16.__wrapped__() == (supported and slow == torch.float32)
    assert set(asked) == ({torch.float32, torch.bfloat16} if supported else set())


def test_the_stream_has_an_id_only_where_cuda_is_in_use(monkeypatch):
    assert device.stream_id(torch.device("cpu")) == 0
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    assert device.stream_id(torch.device("cuda")) == 7


@pytest.fixture
def malloc_of_its_own(monkeypatch):
    """As if nothing were set yet, by the environment or by a test before."""
    for name in os.environ:
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)
    keep_freed_memory.cache_clear()
    yield
    keep_freed_memory.cache_clear()


PAGES = """
import resource, torch
from retina_fast.device import keep_freed_memory
print(keep_freed_memory())
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
def test_large_tensors_are_made_without_fresh_pages_once_freed_memory_is_kept(malloc_of_its_own):
    """In a process of its own: one that has once been refused memory allocates elsewhere, in heaps of 64 MB."""
    kept, *pages = subprocess.run(
        [sys.executable, "-c", PAGES], capture_output=True, check=True, text=True
    ).stdout.split()
    if kept == "False":
        pytest.skip("no glibc")
    assert max(map(int, pages[-3:])) < 16  # 16,384 make up 64 MB, or 32 where they are of 2 MB


def test_malloc_is_told_to_keep_blocks_below_a_gigabyte_and_never_to_trim(malloc_of_its_own, monkeypatch):
    told = []

    def mallopt(*option):
        told.append(option)
        return 1

    libc = SimpleNamespace(gnu_get_libc_version=None, mallopt=mallopt)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: libc)
    assert keep_freed_memory()
    assert told == [(-3, 2**30), (-1, -1)]


def test_another_c_library_is_left_alone(malloc_of_its_own, monkeypatch):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory()


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.check=3")]
)
def test_settings_of_malloc_in_the_environment_stand(malloc_of_its_own, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


@pytest.mark.skipif(device._openmp() is None, reason="no OpenMP")
def test_one_thread_is_that_of_the_caller_alone():
    of_products = getattr(device._openmp(), "MKL_Get_Max_Threads", torch.get_num_threads)
    with ThreadPoolExecutor(1) as pool:
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            other = pool.submit(torch.get_num_threads).result()
            with contextlib.suppress(ZeroDivisionError), one_thread():
                assert torch.get_num_threads() == of_products() == 1
                assert pool.submit(torch.get_num_threads).result() == other
                assert ThreadPoolExecutor(1).submit(torch.get_num_threads).result() == 2  # of a thread that starts now
                raise ZeroDivisionError
            assert torch.get_num_threads() == of_products() == 2
        finally:
            torch.set_num_threads(threads)


def test_without_openmp_one_thread_changes_nothing(monkeypatch):
    monkeypatch.setattr(device, "_openmp", lambda: None)
    threads = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == threads

"""The chooser of ways under a fake clock, its file, and the engine that asks it."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from retina_fast import compile_inference
from retina_fast.deploy.fuse import count_convs, fuse_convs
from retina_fast.deploy.fused import FusedConv
from retina_fast.deploy.tuned import Chooser, choose_ways, machine, user_cache_file
from tests.deploy.engine_soak import small_model
from tests.deploy.pictures import images

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
X = torch.arange(1.0, 8.0)


class Clock:
    """Time passes only where a way says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def way(self, result, *seconds):
        """A way that takes the seconds one after the other, the last for good, and returns or raises the result."""
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            if isinstance(result, Exception):
                raise result
            return result.clone()

        return run


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "choices.json"


def chosen(path, clock, **ways):
    chooser = Chooser(path, CPU, clock)
    choice = chooser.choose("layer", ways)
    chooser.save()
    return choice


# Which is chosen


def test_the_fastest_is_chosen(path, clock):
    ways = {"first": clock.way(X, 3), "second": clock.way(X, 1), "third": clock.way(X, 2)}
    assert chosen(path, clock, **ways) == "second"


def test_the_first_stays_where_it_is_the_fastest(path, clock):
    assert chosen(path, clock, first=clock.way(X, 1), second=clock.way(X, 2)) == "first"


def test_one_slow_call_does_not_decide(path, clock):
    """The first call compiles, and another was disturbed."""
    assert chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 90, 1, 80, 1)) == "second"


@pytest.mark.parametrize(
    "wrong",
    [
        RuntimeError("no engine"),
        torch.where(X == 3, torch.nan, X),
        torch.where(X == 3, torch.inf, X),
        X * 1.001,
        X[:-1],
        X.double(),
        torch.zeros_like(X),
    ],
    ids=["raises", "nan", "inf", "subtly wrong", "shape", "dtype", "zeros"],
)
def test_what_is_wrong_is_dropped_however_fast(path, clock, wrong):
    ways = {"first": clock.way(X, 3), "wrong": clock.way(wrong, 0), "right": clock.way(X, 2)}
    assert chosen(path, clock, **ways) == "right"


def test_rounding_is_not_wrong(path, clock):
    half = X.bfloat16()
    ways = {"first": clock.way(half, 2), "second": clock.way(half * (1 + 2**-8), 1)}
    assert chosen(path, clock, **ways) == "second"


def test_a_way_that_reads_its_output_before_it_writes(path, clock):
    """As a fused conv with a factor of 0 does: the memory that it gets held NaN."""
    x = torch.randn(1 << 12)  # of a size that the allocator gives again

    def reading():
        return torch.empty_like(x).mul_(0).add_(x)

    poisoned = []
    for _ in range(20):
        held = torch.full_like(x, torch.nan)
        del held
        poisoned.append(bool(reading().isnan().any()))
    if not all(poisoned):
        pytest.skip("this allocator does not give the same memory again")
    assert chosen(path, clock, first=clock.way(x, 1), reading=reading) == "first"


def test_a_way_that_writes_over_what_another_returned(path, clock):
    buffer = X.clone()

    def first():
        clock.now += 2
        return buffer

    def second():
        clock.now += 1
        return buffer.mul_(2)

    assert chosen(path, clock, first=first, second=second) == "first"


# The file


def test_a_choice_is_remembered(path, clock):
    def never():
        raise AssertionError

    assert chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 1)) == "second"
    assert chosen(path, clock, first=never, second=never) == "second"
    assert json.loads(path.read_text())["choices"] == {machine(CPU): {"layer": "second"}}
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "7", '{"format": 1}', '{"format": 1, "choices": 3}', '{"format": 1, "choices": {"a": 3}}',
        json.dumps({"format": 2, "choices": {machine(CPU): {"layer": "first"}}}),
        json.dumps({"format": 1, "choices": {"torch 1.0 on another machine": {"layer": "first"}}}),
        json.dumps({"format": 1, "choices": {machine(CPU): {"layer": "a way of another version"}}}),
        json.dumps({"format": 1, "choices": {machine(CPU): {"layer": ["first"]}}}),
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_file_that_does_not_say_is_done_without(path, clock, content):
    path.parent.mkdir()
    path.write_text(content)
    assert chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 1)) == "second"
    assert json.loads(path.read_text())["choices"][machine(CPU)] == {"layer": "second"}


def test_choices_of_other_machines_are_kept(path, clock):
    path.parent.mkdir()
    path.write_text(json.dumps({"format": 1, "choices": {"another": {"layer": "first"}}}))
    chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 1))
    assert json.loads(path.read_text())["choices"]["another"] == {"layer": "first"}


def test_a_folder_that_cannot_be_written(path, clock, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert chosen(tmp_path / "file" / "choices.json", clock, first=clock.way(X, 2), second=clock.way(X, 1)) == "second"

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refuse)  # root, who may run the tests, can write anywhere
    assert chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 1)) == "second"
    assert not path.exists()


def test_a_disk_that_fills_up_leaves_the_old_file_whole(path, clock, monkeypatch):
    chosen(path, clock, first=clock.way(X, 2), second=clock.way(X, 1))
    before = path.read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    chooser = Chooser(path, CPU, clock)
    chooser.choose("other", {"first": clock.way(X, 1)})
    chooser.save()
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]


def _write_many(path: Path, name: str) -> None:
    for i in range(100):
        chooser = Chooser(path, CPU)
        chooser.choose(f"{name} {i}", {"first": lambda: X})
        chooser.save()


def test_two_processes_write_at_once(path):
    """The file is whole at every moment. A choice that the other process overwrote is made once more, no worse."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert json.loads(path.read_text())["format"] == 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    choices = json.loads(path.read_text())["choices"][machine(CPU)]
    assert "a 99" in choices or "b 99" in choices
    assert len(choices) > 90
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]


def test_the_default_file_is_in_the_users_folder():
    assert Path.home() in user_cache_file().parents


# In the engine


def test_the_engine_chooses_remembers_and_says(path, monkeypatch):
    model, pictures = small_model(), images((40, 50))
    expected = compile_inference(model, dtype=torch.float32)(pictures)
    engine = compile_inference(model, dtype=torch.float32, choices=path)
    found = engine(pictures)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    ((shape, counts),) = engine.report.ways.items()
    convs = [module for module in engine.model.modules() if isinstance(module, FusedConv)]
    assert sum(counts.values()) == sum(len(conv.ways) for conv in convs) >= count_convs(engine.model)
    assert f"fastest ways of the convs at {'x'.join(map(str, shape))}: " in str(engine)
    assert not any(conv._forward_pre_hooks for conv in convs)

    monkeypatch.setattr(Chooser, "_time", None)  # nothing is timed again
    again = compile_inference(model, dtype=torch.float32, choices=str(path))
    again(pictures)
    assert again.report.ways == engine.report.ways


def test_winograds_algorithm_is_among_the_ways(path, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 1)).requires_grad_(False)
    x, offered, calls = torch.randn(1, 8, 9, 9), [], []
    fuse_convs(model, lambda: model(x))

    def last(_, layer, ways):
        offered.append([*ways])
        return offered[-1][-1]

    def recorded(self, x, z, overwrite_z):
        calls.append(1)
        return self.run_eager(x, z)

    monkeypatch.setattr(Chooser, "choose", last)
    counts = choose_ways(model, lambda: model(x), Chooser(path, CPU))
    assert offered == [["eager", "fused", "winograd"], ["eager", "fused"]]
    assert counts == {"winograd": 1, "fused": 1}
    monkeypatch.setattr(FusedConv, "run_winograd", recorded)
    model(x)
    assert calls == [1]


def test_ways_are_chosen_anew_in_another_dtype(path, monkeypatch):
    monkeypatch.setattr(Chooser, "choose", lambda _, layer, ways: [*ways][-1])
    pictures = images((40, 50))
    engine = compile_inference(small_model(), dtype=torch.float32, choices=path)
    expected = engine(pictures)
    (before,) = engine.report.ways.values()
    torch.testing.assert_close(engine.double()(pictures), expected, rtol=0, atol=1e-3)
    (after,) = engine.report.ways.values()
    assert before["winograd"] > 0 == after["winograd"]


def test_a_way_steps_aside_where_it_does_not_serve():
    """In lower precision, and where somebody asks for gradients."""
    model: Any = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(1, 8, 9, 9)
    fuse_convs(model, lambda: model(x))
    model[0].ways = {tuple(x.shape): "winograd"}
    assert model(x).requires_grad
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.no_grad():
            torch.testing.assert_close(model(x), model[0].run_fused(x, None), rtol=0, atol=0)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("way", ["eager", "fused"])
def test_a_remembered_way_is_taken(path, way, monkeypatch):
    model, pictures, calls = small_model(), images((40, 50)), []
    compile_inference(model, dtype=torch.float32, choices=path)(pictures)
    content = json.loads(path.read_text())
    ((name, choices),) = content["choices"].items()
    content["choices"][name] = dict.fromkeys(choices, way)
    path.write_text(json.dumps(content))
    for name in ("eager", "fused"):

        def recorded(*args, run=getattr(FusedConv, f"run_{name}"), name=name):  # noqa: B008
            calls.append(name)
            return run(*args)

        monkeypatch.setattr(FusedConv, f"run_{name}", recorded)
    engine = compile_inference(model, dtype=torch.float32, choices=path)
    for _ in range(2):  # the first call looks the ways up
        calls.clear()
        engine(pictures)
        assert set(calls) == {way}


def test_without_a_file_a_cpu_times_nothing(monkeypatch):
    monkeypatch.setattr(Chooser, "choose", None)
    engine = compile_inference(small_model().cpu(), dtype=torch.float32)
    engine(images((40, 50)))
    assert not engine.report.ways

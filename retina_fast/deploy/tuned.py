"""Times the ways to compute a layer on the user's own machine, and remembers the fastest in a file.

A layer of a given shape and dtype may run in several ways. They take turns on the clock; what raises, returns NaN or
misses the tolerance is dropped. The file keeps the choices of each machine and version apart, and may be shipped.
"""

import contextlib
import json
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retina_fast.data.errors import UserError
from retina_fast.data.files import replacing
from retina_fast.deploy.fusion.blocks import tails_of
from retina_fast.deploy.fusion.layers import FusedConv
from retina_fast.deploy.fusion.tail import FusedTail

Way = Callable[[], Tensor | tuple[Tensor, ...]]

_ROUNDS = 5  # after one that is checked and not counted
_CALLS = 4  # that are timed together on a GPU
_IDLE_CYCLES = 4_000_000, 64_000_000  # some 2 to 32 ms, in which the host gets ahead
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Relative norms; several times what one more or one less rounding of the result changes."""
_FORMAT = 3


def user_cache_file() -> Path:
    """The file of choices in the user's cache folder, where the operating system has such folders.

    Example::

        >>> user_cache_file().name
        'choices.json'
    """
    if sys.platform == "win32":
        folder = Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path.home() / ".cache"
    return folder / "retina_fast" / "choices.json"


@contextlib.contextmanager
def timed_convs() -> Iterator[None]:
    """Lets cuDNN choose the convs of a new shape by timing them."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def machine(device: torch.device) -> str:
    """The device and the versions that a choice holds for.

    Example::

        >>> f"torch {torch.__version__}" in machine(torch.device("cpu"))
        True
    """
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, cuDNN {torch.backends.cudnn.version()}"
    else:
        name = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def _processor() -> str:
    with contextlib.suppress(OSError):  # where Linux names it
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Chooser:
    """Chooses the ways of layers on one device.

    Args:
        path: of the file; its folder is made. A file that cannot be read or written is done without.
        device: on which the layers run.
        clock: seconds.

    Example::

        >>> chooser = Chooser(Path("none/choices.json"), torch.device("cpu"))
        >>> x = torch.ones(9)
        >>> chooser.choose("twice", {"product": lambda: 2 * x, "wrong": lambda: x})
        'product'
    """

    def __init__(self, path: Path, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.path, self._device, self._clock = path, device, clock
        self._machine = machine(device)
        self._known = self._read().get(self._machine, {})
        self._new: dict[str, str] = {}
        self._idle = _IDLE_CYCLES[0]

    def choose(self, layer: str, ways: Mapping[str, Way], definitions: Mapping[str, Way] | None = None) -> str:
        """The name of the fastest right way; a choice made before holds.

        Args:
            layer: names the work, with its shapes and dtype.
            ways: by name. The first is known to be right, and the others are compared with it ...
            definitions: ... or, those named here, with these, which compute in the same precision.
        """
        if self._known.get(layer) in ways:
            return self._known[layer]
        first, *others = ways
        expected = [tensor.clone() for tensor in _tensors(ways[first]())]  # a way may write where another has
        exact = {name: lambda: (*expected,) for name in others} | dict(definitions or {})
        right = [first, *(name for name in others if self._is_right(ways[name], exact[name]))]
        seconds: dict[str, list[float]] = {name: [] for name in right}
        for _ in range(_ROUNDS if others else 0):
            for name in right:
                seconds[name].append(self._time(ways[name]))
        choice = min(right, key=lambda name: statistics.median(seconds[name] or [0.0]))
        self._known[layer] = self._new[layer] = choice
        return choice

    def save(self) -> None:
        """Write the new choices into the file beside those that other processes have written meanwhile."""
        if not self._new:
            return
        choices = self._read()
        choices[self._machine] = choices.get(self._machine, {}) | self._new
        with contextlib.suppress(OSError, UserError):  # a folder that is read-only, a disk that is full
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                partial.write_text(json.dumps({"format": _FORMAT, "choices": choices}, indent=1, sort_keys=True))
            self._new = {}

    def _is_right(self, way: Way, definition: Way) -> bool:
        """Whether the way computes what its definition does, in memory that held NaN before."""
        try:
            expected = _tensors(definition())
            poison = [torch.full_like(tensor, torch.nan) for tensor in expected]
            del poison  # the allocator is likely to give the way this memory
            found = _tensors(way())
            return len(found) == len(expected) and all(map(_agree, found, expected))
        except Exception:  # whatever it is, the first way remains
            return False

    def _time(self, way: Way) -> float:
        if self._device.type == "cuda":
            return self._time_on_gpu(way)
        start = self._clock()
        way()
        return self._clock() - start

    def _time_on_gpu(self, way: Way) -> float:
        """Seconds of a call with the host far ahead of the GPU, as it is where a graph runs the layer."""
        late = True
        while late:
            with torch.cuda.device(self._device):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(self._idle)
                begin.record()
                for _ in range(_CALLS):
                    way()
                end.record()
                late = begin.query() and self._idle < _IDLE_CYCLES[1]  # the GPU has waited for the host
                end.synchronize()
            self._idle *= 1 + late
        return begin.elapsed_time(end) / (1000 * _CALLS)

    def _read(self) -> dict[str, dict[str, str]]:
        """Choices by machine and layer; none if the file is missing, damaged, or of another version's form."""
        try:
            content: Any = json.loads(self.path.read_text())
            choices = content["choices"] if content["format"] == _FORMAT else {}
            return {
                name: {layer: str(way) for layer, way in of_machine.items()} for name, of_machine in choices.items()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    error = float((found.double() - expected.double()).norm())
    return error <= _TOLERANCES[expected.dtype] * float(expected.double().norm())  # False for NaN


def choose_ways(model: nn.Module, run: Callable[[], object], chooser: Chooser) -> Counter[str]:
    """Let every fused conv run in its fastest way at the shapes that a forward pass gives it, and count the ways.

    Args:
        model: its fused convs are changed.
        run: the forward pass; it takes as long as a dozen where no choice is remembered.
        chooser: remembers the choices; they are saved.
    """
    counts: Counter[str] = Counter()
    convs = [module for module in model.modules() if isinstance(module, FusedConv)]
    hook = partial(_choose_way, chooser, counts)
    handles = [conv.register_forward_pre_hook(hook, with_kwargs=True) for conv in convs]
    tails = tails_of(model)
    try:
        _run_choosing(tails, _set_apart, run)
    finally:
        for handle in handles:
            handle.remove()
    if tails:
        _run_choosing(tails, partial(_choose_tail, chooser, counts), run)
    chooser.save()
    return counts


def _choose_way(
    chooser: Chooser, counts: Counter[str], conv: FusedConv, args: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    x, z = (*args, None)[:2]
    overwrite, shortcut = bool(keywords.get("overwrite_z")), keywords.get("shortcut")
    scratch = torch.empty_like(z) if overwrite and z is not None else None
    begun: set[str] = set()

    def run(name: str) -> Tensor:
        if name == "eager" or z is None or scratch is None:
            return conv.run(name, x, z, overwrite, shortcut)
        if name not in begun:  # the way before may have written into it; the first call is checked and not timed
            scratch.copy_(z)
            begun.add(name)
        return conv.run(name, x, scratch, overwrite, shortcut)

    ways = {name: partial(run, name) for name in conv.possible_ways(x, z, shortcut)}
    choice = chooser.choose(conv.describe(x, z, shortcut), ways, {"float8": partial(run, "simulated")})
    conv.ways = {**conv.ways, tuple(x.shape): choice}
    counts[choice] += 1


def _run_choosing(tails: list[FusedTail], choose: Callable[..., None], run: Callable[[], object]) -> None:
    """A forward pass in which each tail's way is chosen at its call."""
    for tail in tails:
        tail.choose = choose
    try:
        run()
    finally:
        for tail in tails:
            tail.choose = None


def _set_apart(tail: FusedTail, x: Tensor, *_: object) -> None:
    """Lets each conv run by itself, whatever was chosen before, perhaps in another dtype."""
    tail.ways = {shape: way for shape, way in tail.ways.items() if shape != x.shape}


def _choose_tail(
    chooser: Chooser,
    counts: Counter[str],
    tail: FusedTail,
    x: Tensor,
    z: Tensor,
    overwrite_z: bool,
    shortcut: FusedConv | None,
) -> None:
    """Convs in a row run as one kernel where that is faster than the ways that were chosen for each."""
    scratch = z.clone() if overwrite_z else z

    def way(name: str) -> Way:
        return lambda: tail.run(name, x, scratch if name == "apart" else z, overwrite_z, shortcut)

    ways = {name: way(name) for name in tail.possible_ways(x, z, shortcut)}
    if len(ways) > 1:
        in_float8 = any(conv.float8_factor is not None for conv in tail.convs)  # then `apart` may be less exact
        exact = dict.fromkeys(ways, partial(tail.run, "eager", x, z, False, shortcut)) if in_float8 else {}
        choice = chooser.choose(tail.describe(x, z, shortcut), ways, exact)
        tail.ways = {**tail.ways, tuple(x.shape): choice}
        counts[f"tail {choice}"] += 1

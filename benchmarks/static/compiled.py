"""Compiles the calls of `tests.instruments.kernel_calls` for GPUs that are not at hand, and reads the machine code.

Figures "an element" count the instructions that one usual tile executes, divided by the elements that a thread handles.
Every compilation runs in a process of its own. It fails if that process prints 'error:', since a compilation for AMD
can do so and yet return code.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.static import sass
from tests.instruments.fake_gpu import Launch, launches_of
from tests.instruments.kernel_calls import KERNEL_CALLS

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ROOT = Path(__file__).parents[2]


@dataclass
class Row:
    """One kernel compiled for one target. Spilled bytes are a thread's, shared memory is a program's."""

    case: str
    kernel: str
    target: str
    error: str = ""
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    code: int = 0  # instructions in all
    instructions: float | None = None  # an element
    mufu: float | None = None  # an element
    warps: int = 0  # of a program
    path: int = 0  # instructions that a thread executes on the usual path, each loop once around
    path_mufu: int = 0
    path_wide: int = 0  # 16-byte accesses on the usual path
    loops: list[int] = field(default_factory=list)  # instructions of one turn of each loop
    loops_mufu: list[int] = field(default_factory=list)
    through: list[int] = field(default_factory=list)  # instructions of the shortest way that takes each loop once
    wide_bytes: float | None = None  # an element, by 16-byte accesses
    load_bits: int = 0  # of the widest global load and store
    store_bits: int = 0
    ptx: dict[str, int] = field(default_factory=dict)  # how often each opcode stands in the PTX

    def per_element(self, case: str, elements: int | None) -> "Row":
        """Returns this row for a case whose programs handle so many elements each; None leaves these figures out."""
        if elements is None or self.target.startswith("gfx"):
            return dataclasses.replace(self, case=case)
        share = 32 * self.warps / elements
        return dataclasses.replace(
            self,
            case=case,
            instructions=self.path * share,
            mufu=self.path_mufu * share,
            wide_bytes=16 * self.path_wide * share,
        )


def report(
    targets: Iterable[str] = TARGETS,
    cases: Iterable[str] | None = None,
    processes: int | None = None,
    read: Iterable[str] = (),
) -> list[Row]:
    """Compiles the cases (all of them by default) in another process, which does not interpret its kernels.

    Args:
        targets: among TARGETS.
        cases: among KERNEL_CALLS.
        processes: how many compile at once; as many as there are cores by default.
        read: the kernels whose instructions are read, which takes longer than to compile many a kernel; all by default.
            The others' rows have registers, bytes and PTX.

    Raises:
        RuntimeError: if that process fails.
    """
    command = [sys.executable, "-m", "benchmarks.static", "--json", *targets]
    for case in cases or ():
        command += ["--case", case]
    for kernel in read:
        command += ["--read", kernel]
    if processes is not None:
        command += ["--processes", str(processes)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return [Row(**row) for row in json.loads(result.stdout.splitlines()[-1])]


def compile_cases(
    names: Iterable[str], targets: Sequence[str], processes: int, read: Collection[str] | None = None
) -> list[Row]:
    """Returns a row for each launch of the cases and each target. Launches that are one binary are compiled once."""
    uses: list[tuple[str, Launch, int | None]] = []
    for name in names:
        call = KERNEL_CALLS[name]
        variants = {launch.variant: launch for launch in launches_of(call.run)}
        uses += [(name, launch, call.elements(launch)) for launch in variants.values()]
    jobs: dict[tuple[tuple[str, ...], str], tuple[Launch, Row]] = {}
    for name, launch, _ in uses:
        for target in targets:
            jobs.setdefault((launch.variant, target), (launch, Row(name, launch.kernel.__name__, target)))
    compiled = dict(zip(jobs, compile_all(list(jobs.values()), processes, read), strict=True))
    return [
        compiled[launch.variant, target].per_element(name, elements)
        for name, launch, elements in uses
        for target in targets
    ]


class _Driver:
    """Stands in for the driver of a GPU that is not there: enough of one to compile for it."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        return self.target  # a key of the kernels' caches

    def get_current_stream(self, device: Any) -> int:
        return 0


def _compile(launch: Any, target: str) -> Any:
    """Returns the launch's kernel, specialised and compiled by Triton as on that GPU."""
    import triton
    from torch import Tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import MockTensor

    def described(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(described(item) for item in arg)
        return MockTensor(arg.dtype) if isinstance(arg, Tensor) else arg

    hip = target.startswith("gfx")
    # A cached binary prints no message, and for AMD the message is the only sign of an error.
    triton.knobs.compilation.always_compile = hip
    gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target[3:]), 32)
    triton.runtime.driver.set_active(_Driver(gpu))
    kwargs = {name: described(value) for name, value in launch.kwargs.items()}
    if "PTX" in kwargs:
        kwargs["PTX"] = not hip
    return launch.kernel.warmup(*map(described, launch.args), grid=(1,), **kwargs)


def _start(launch: Any, row: Row, folder: Path, with_code: bool) -> int:
    """Compiles in a fork of this process, so that an abort or a stray message is seen and ends nothing else."""
    child = os.fork()
    if child == 0:
        try:
            output = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            _read(_compile(launch, row.target), row, with_code)
            (folder / "row").write_text(json.dumps(dataclasses.asdict(row)))
        except BaseException as error:
            os.write(2, f"error: {error!r}\n".encode())
        finally:
            os._exit(0)
    return child


def _finish(row: Row, status: int, folder: Path) -> Row:
    printed = (folder / "log").read_text(errors="replace")
    if "error:" in printed or status or not (folder / "row").exists():
        row.error = f"status {status}: {printed[-2000:]}"
        return row
    return Row(**json.loads((folder / "row").read_text()))


def compile_all(jobs: Sequence[tuple[Any, Row]], processes: int, read: Collection[str] | None = None) -> list[Row]:
    """Compiles each launch in a process of its own, so many at once, and returns the rows filled in."""
    import triton.experimental.gluon  # noqa: F401  which the first launch imports: the processes inherit it
    from triton.runtime.cache import triton_key

    triton_key()  # a hash of all of Triton, half a second long, which they inherit too
    rows: dict[int, Row] = {}
    running: dict[int, int] = {}  # process to job
    with tempfile.TemporaryDirectory() as folder:
        for i, (launch, row) in enumerate(jobs):
            place = Path(folder, str(i))
            place.mkdir()
            running[_start(launch, row, place, read is None or row.kernel in read)] = i
            while len(running) >= processes or (running and i == len(jobs) - 1):
                child, status = os.wait()
                done = running.pop(child)
                rows[done] = _finish(jobs[done][1], status, Path(folder, str(done)))
    return [rows[i] for i in range(len(jobs))]


def _read(compiled: Any, row: Row, with_code: bool) -> None:
    """Fills in the row from what Triton compiled, with its instructions or without."""
    if row.target.startswith("gfx"):
        _read_amdgcn(compiled.asm["amdgcn"], row)
        return
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage = subprocess.check_output([str(tools / "cuobjdump"), "--dump-resource-usage", cubin.name], text=True)
        disassemble = [str(tools / "nvdisasm"), "-c", "--no-dataflow", cubin.name]
        code = subprocess.check_output(disassemble, text=True) if with_code else ""
    counts = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    row.registers, row.spilled = counts["REG"], counts["STACK"] + counts["LOCAL"]
    row.shared, row.warps = compiled.metadata.shared, compiled.metadata.num_warps
    row.ptx = dict(Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.]+)", compiled.asm["ptx"], re.M)))
    if with_code:
        _read_sass(code, row)


def _read_sass(code: str, row: Row) -> None:
    """Fills in what NVIDIA's machine code says."""
    blocks = sass.basic_blocks(code)
    path = sass.usual_path(blocks)
    row.code = sum(len(block.instructions) for block in blocks)
    row.path, row.path_mufu, row.path_wide = len(path), sass.count_mufu(path), sum(map(sass.is_wide, path))
    row.load_bits, row.store_bits = sass.widest(path, "LDG"), sass.widest(path, "STG")
    for loop in sass.loops(blocks):
        around = sass.instructions_of(blocks, loop)
        row.loops.append(len(around))
        row.loops_mufu.append(sass.count_mufu(around))
        row.through.append(len(sass.through(blocks, loop)))


def _read_amdgcn(assembly: str, row: Row) -> None:
    """Fills in what AMD's assembly says. Scalars spilled to the lanes of a vector register are not counted."""

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(match[1]) if match else 0

    row.registers = number("vgpr_count")
    row.spilled = number("private_segment_fixed_size")
    row.shared = number("group_segment_fixed_size")
    row.code = len(re.findall(r"^\s+(?:[vs]_|global_|buffer_|flat_|ds_)", assembly, re.M))
    words = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "dword": 32}
    for kind in ("load", "store"):
        names = re.findall(rf"(?:global|buffer|flat)_{kind}_([a-z]+)(?:_d16\w*)?(?:x(\d))?\b", assembly)
        bits = max((words.get(word, 0) * int(times or 1) for word, times in names), default=0)
        setattr(row, f"{kind}_bits", bits)

"""What the compiler made of every kernel, for GPUs that are not at hand: ``python -m benchmarks.static [target ...]``.

Each launch of benchmarks.static.launches is compiled as it would be specialised, for sm_80, sm_90, sm_100 and gfx942,
and its machine code read: registers, spilled bytes, shared memory, instructions and MUFU an element, the widest global
accesses. Per element means over the blocks that one usual tile executes, divided by the elements a thread handles.
Every compile has a process of its own, and fails if it prints 'error:', which a HIP compile can do and yet return code.
"""

import argparse
import heapq
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass
class Row:
    """One launch compiled for one target. Bytes are per thread for registers' spills, per program for shared memory."""

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
    path: int = 0  # instructions that a thread executes on the usual path, and in each loop once around
    path_mufu: int = 0
    loops: list[int] = field(default_factory=list)  # instructions of one turn of each loop
    loops_mufu: list[int] = field(default_factory=list)
    through: list[int] = field(default_factory=list)  # instructions of the cheapest way that takes each loop once
    wide_bytes: float | None = None  # an element, by 16-byte accesses
    load_bits: int = 0  # of the widest global load and store
    store_bits: int = 0
    ptx: dict[str, int] = field(default_factory=dict)  # opcodes, to assert on rounding modes and contraction


def report(targets: Iterable[str] = TARGETS, cases: Iterable[str] | None = None) -> list[Row]:
    """Compiles the cases (all of them by default) for the targets, outside this process and its interpreter."""
    command = [sys.executable, "-m", "benchmarks.static", "--json", *targets]
    for case in cases or ():
        command += ["--case", case]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return [Row(**row) for row in json.loads(result.stdout.splitlines()[-1])]


class _Driver:
    """A driver of a GPU that is not there: enough of one to compile for it."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        return self.target  # a key of the kernels' caches

    def get_current_stream(self, device: Any) -> int:
        return 0


def _compile(launch: Any, target: str) -> Any:
    """The launch's kernel, specialised and compiled by Triton as on that GPU."""
    import triton
    from torch import Tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import MockTensor

    def described(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(described(item) for item in arg)
        return MockTensor(arg.dtype) if isinstance(arg, Tensor) else arg

    hip = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target[3:]), 32)
    triton.runtime.driver.set_active(_Driver(gpu))
    kwargs = {name: described(value) for name, value in launch.kwargs.items()}
    if "PTX" in kwargs:
        kwargs["PTX"] = not hip
    return launch.kernel.warmup(*map(described, launch.args), grid=(1,), **kwargs)


def _start(launch: Any, row: Row, tile: int | None, folder: Path) -> int:
    """Compiles in a fork of this process, so that an abort or a stray message is seen and ends nothing else."""
    child = os.fork()
    if child == 0:
        try:
            output = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            _read(_compile(launch, row.target), row, tile)
            (folder / "row").write_text(json.dumps(asdict(row)))
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


def _compile_all(jobs: list[tuple[Any, Row, int | None]]) -> list[Row]:
    """One process a compile, as many at once as there are cores."""
    rows: dict[int, Row] = {}
    running: dict[int, int] = {}  # process to job
    with tempfile.TemporaryDirectory() as folder:
        for i, (launch, row, tile) in enumerate(jobs):
            place = Path(folder, str(i))
            place.mkdir()
            running[_start(launch, row, tile, place)] = i
            while len(running) >= (os.cpu_count() or 1) or (running and i == len(jobs) - 1):
                child, status = os.wait()
                done = running.pop(child)
                rows[done] = _finish(jobs[done][1], status, Path(folder, str(done)))
    return [rows[i] for i in range(len(jobs))]


def _read(compiled: Any, row: Row, tile: int | None) -> None:
    if row.target.startswith("gfx"):
        _read_amdgcn(compiled.asm["amdgcn"], row)
        return
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage = subprocess.check_output([tools / "cuobjdump", "--dump-resource-usage", cubin.name], text=True)
        sass = subprocess.check_output([tools / "nvdisasm", "-c", cubin.name], text=True)
    counts = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    row.registers, row.spilled = counts["REG"], counts["STACK"] + counts["LOCAL"]
    row.shared = compiled.metadata.shared
    row.ptx = dict(Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.]+)", compiled.asm["ptx"], re.M)))
    blocks = basic_blocks(sass)
    path = usual_path(blocks)
    every = [instruction for block in blocks for instruction in block.instructions]
    row.code = len(every)
    row.load_bits, row.store_bits = _widest(path, "LDG"), _widest(path, "STG")
    row.warps, row.path, row.path_mufu = compiled.metadata.num_warps, len(path), _mufu(path)
    for loop in loops(blocks):
        row.loops.append(_length(blocks, loop))
        row.loops_mufu.append(_mufu([instruction for i in loop for instruction in blocks[i].instructions]))
        row.through.append(_length(blocks, _cheapest(blocks, 0, loop[0])[:-1] + loop + _cheapest(blocks, loop[-1])[1:]))
    if tile:
        threads = 32 * row.warps
        row.instructions = row.path * threads / tile
        row.mufu = row.path_mufu * threads / tile
        row.wide_bytes = sum(map(_is_wide, path)) * 16 * threads / tile


def _read_amdgcn(assembly: str, row: Row) -> None:
    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(match[1]) if match else 0

    row.registers = number("vgpr_count")
    row.spilled = number("private_segment_fixed_size")  # scalars spilled to the lanes of a vector register cost none
    row.shared = number("group_segment_fixed_size")
    row.code = len(re.findall(r"^\s+(?:[vs]_|global_|buffer_|flat_|ds_)", assembly, re.M))
    words = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "dword": 32}
    for kind in ("load", "store"):
        names = re.findall(rf"(?:global|buffer|flat)_{kind}_([a-z]+)(?:_d16\w*)?(?:x(\d))?\b", assembly)
        bits = max((words.get(word, 0) * int(times or 1) for word, times in names), default=0)
        setattr(row, f"{kind}_bits", bits)


@dataclass
class Block:
    """Instructions that run one after another, and the blocks that may follow."""

    instructions: list[str]
    successors: list[int]


def basic_blocks(sass: str) -> list[Block]:
    """nvdisasm's text as its control flow graph; the first block is the entry."""
    code: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            code.append([])
            labels[label[1]] = len(code) - 1
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code[-1].append(instruction[1])
            if re.search(r"\b(BRA|EXIT|RET|BRX)\b", instruction[1]):
                code.append([])
    blocks = []
    for i, instructions in enumerate(code):
        last = instructions[-1] if instructions else ""
        falls = [i + 1] if i + 1 < len(code) else []
        target = [labels[name] for name in re.findall(r"\.L_x_\d+", last)] if re.search(r"\bBRA\b", last) else []
        # a branch is taken on the predicate before it, or on the one among its operands
        conditional = last.startswith("@") or re.search(r"\bBRA\S*\s+!?U?P\d", last)
        leaves = re.search(r"\b(BRA|EXIT|RET)\b", last)
        blocks.append(Block(instructions, target + (falls if conditional or not leaves else [])))
    return blocks


def usual_path(blocks: list[Block]) -> list[str]:
    """The instructions of the cheapest way through, a loop's body once, among those that make the most 16-byte
    accesses: a tile's fast path, since what handles exceptions also costs more."""
    wide = [sum(map(_is_wide, block.instructions)) for block in blocks]
    # length, 16-byte accesses, path; the shortest first
    ways: list[tuple[int, int, tuple[int, ...]]] = [(len(blocks[0].instructions), wide[0], (0,))]
    reached: set[tuple[int, int]] = set()
    ends: dict[int, tuple[int, ...]] = {}
    while ways:
        length, count, path = heapq.heappop(ways)
        i = path[-1]
        if (i, count) in reached:
            continue
        reached.add((i, count))
        last = blocks[i].instructions[-1:]
        if not blocks[i].successors or any("EXIT" in instruction for instruction in last):
            ends.setdefault(count, path)
        for j in blocks[i].successors:
            if path.count(j) < (1 if wide[j] else 2):  # a loop's test runs once more than its body
                heapq.heappush(ways, (length + len(blocks[j].instructions), count + wide[j], (*path, j)))
    return [instruction for i in ends[max(ends)] for instruction in blocks[i].instructions]


def loops(blocks: list[Block]) -> list[tuple[int, ...]]:
    """The blocks on each loop's cheapest way around, in the order of the loops' first blocks: one loop for each branch
    back to a block that lies before. Inner loops are passed by."""
    found = [
        (first, -last, around)
        for last, block in enumerate(blocks)
        for first in block.successors
        if first <= last and len(around := _cheapest(blocks, first, last)) and _length(blocks, around) > 1
    ]
    return [around for _, _, around in sorted(found)]


def _cheapest(blocks: list[Block], first: int, last: int | None = None) -> tuple[int, ...]:
    """The blocks on the way of fewest instructions from one to another, or out, without a branch back."""
    ways: list[tuple[int, tuple[int, ...]]] = [(len(blocks[first].instructions), (first,))]
    reached: set[int] = set()
    while ways:
        length, path = heapq.heappop(ways)
        i = path[-1]
        if i == last or (last is None and "EXIT" in " ".join(blocks[i].instructions[-1:])):
            return path
        if i not in reached:
            reached.add(i)
            for j in blocks[i].successors:
                if i < j and (last is None or j <= last):
                    heapq.heappush(ways, (length + len(blocks[j].instructions), (*path, j)))
    return ()


def _length(blocks: list[Block], path: tuple[int, ...]) -> int:
    return sum(len(blocks[i].instructions) for i in path)


def _mufu(path: list[str]) -> int:
    return sum(" MUFU" in f" {_opcode(i)}" for i in path)


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _is_wide(instruction: str) -> bool:
    return re.search(r"\b(LDG|STG)\b.*\.128\b", instruction) is not None


def _widest(path: list[str], kind: str) -> int:
    opcodes = [_opcode(i) for i in path if re.search(rf"\b{kind}\b", i)]
    return max(
        (int(found[1]) if (found := re.search(r"\.[US]?(8|16|64|128)\b", o)) else 32 for o in opcodes), default=0
    )


def _table(rows: list[Row]) -> str:
    lines = [
        f"{'case':32} {'kernel':26} {'target':7} {'registers':>9} {'spilled':>7} {'shared':>6} {'code':>5} "
        f"{'instr/el':>8} {'MUFU/el':>7} {'load':>4} {'store':>5}"
    ]
    for row in rows:
        per = [f"{value:.2f}" if value is not None else "" for value in (row.instructions, row.mufu)]
        lines.append(
            f"{row.case:32} {row.kernel:26} {row.target:7} {row.registers:9} {row.spilled:7} {row.shared:6} "
            f"{row.code:5} {per[0]:>8} {per[1]:>7} {row.load_bits:4} {row.store_bits:5}  {row.error}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=TARGETS, help=f"among {', '.join(TARGETS)}")
    parser.add_argument("--case", action="append", help="only these cases of benchmarks.static.launches")
    parser.add_argument("--json", action="store_true", help="print the rows as one line of JSON")
    arguments = parser.parse_args()
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a cached binary prints no message
    import triton

    from benchmarks.static.launches import CASES
    from benchmarks.static.recorder import record

    jobs = [
        (
            launch,
            Row(name, launch.kernel.__name__, target),
            CASES[name].tile if CASES[name].kernel in (None, launch.kernel.__name__) else None,
        )
        for name in arguments.case or CASES
        for launch in {launch.variant: launch for launch in record(CASES[name].run)}.values()
        for target in arguments.targets
    ]
    rows = _compile_all(jobs)
    print(
        json.dumps([asdict(row) for row in rows]) if arguments.json else f"triton {triton.__version__}\n{_table(rows)}"
    )
    if not arguments.json and any(row.error for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

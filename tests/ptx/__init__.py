"""Runs compiled kernels without a GPU: an emulator of PTX, the code that Triton compiles for NVIDIA's GPUs.

``launch.emulated`` makes launches of Triton kernels on CPU tensors compile for a GPU and run here, thread by thread.
From low to high: ``program`` parses PTX; ``floats`` and ``integers`` are the arithmetic; ``writer``, ``code`` and the
three ``emit`` files turn each basic block into a Python function over numpy arrays; ``memory``, ``races``, ``traffic``,
``accesses``, ``scalars``, ``warps`` and ``matrices`` are what such a function calls; ``machine`` runs the threads, in
an order that ``schedule`` chooses; ``compiling`` has Triton compile; ``launch`` stands in for Triton's driver.
``cases`` calls every operation of the project, and ``table``, ``counts``, ``barriers``, ``faults`` and ``fuzz`` are
commands over such calls.

    python -m tests.ptx.table [CASE ...] [--all]     every case, equal to its reference or not
    python -m tests.ptx.counts [CASE ...]            instructions, sectors, wavefronts, barriers
    python -m tests.ptx.barriers [CASE ...]          each barrier taken out: is it seen?
    python -m tests.ptx.faults [PART ...]            faults planted in the kernels: do the compiled tests fail?
    python -m tests.ptx.fuzz SEED SECONDS            random calls
    python -m pytest -p tests.ptx.plugin tests/kernels/test_box_loss.py      all tests of a kernel, compiled
    python -m pytest -m slow tests/kernels tests/ptx                         other orders, sm_80, inexact functions

What is modelled: several programs run at a time, in an order that a seed chooses, and in random orders whole programs
run between the accesses of two warps of another; barriers, at which all warps of a program must meet, and instructions
of a whole warp; scalars, which all warps of a program must load alike; bounds, alignment and initialisation of every
access; races between warps and between programs; sectors and shared-memory wavefronts; copies into shared memory, which
are done when they are waited for; products of 16-bit matrices, also of matrices in shared memory, which are done at
once. What is not: the order of the lanes within a warp, weak memory, waiting for such a product, NaN payloads; races
that a barrier of some of a program's threads leaves to the others. An instruction that the emulator does not know
raises. Counts are of PTX, which the assembler still changes.
"""

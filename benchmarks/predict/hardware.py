"""What is known of an H200, as the model of `roofline.py` takes it, and where from."""

import math

# NVIDIA's H200 data sheet: https://www.nvidia.com/en-us/data-center/h200/
SMS = 132
CLOCK = 67e12 / (2 * 128 * SMS)  # 1.98 GHz: what 67 TFLOP/s of float32 by fma on 128 lanes an SM mean
BANDWIDTH = 0.9 * 4.8e12  # a copy reaches about nine tenths of the data sheet's (assumed)
MATMUL = 0.8 * 989e12  # of dense bf16, what a large product reaches (assumed)
# CUDA C++ Programming Guide, tables of arithmetic instructions and of technical specifications, capability 9.0
ISSUE = 4 * SMS * CLOCK  # instructions of a warp a second: four schedulers an SM, one each a cycle
MUFU = 16 / 32 * SMS * CLOCK  # of a warp: 16 results an SM and cycle
WARPS, REGISTERS, SHARED, BLOCKS = 64, 65536, 233472, 32  # that an SM holds
# https://pmc.ncbi.nlm.nih.gov/articles/PMC10448217/, table 3, H100, in cycles: device memory, L2; and 4 from one
# instruction to the next that needs its result, of which a warp alone on its scheduler is taken to have two under way
DRAM, L2, ALONE = 400, 200, 2.0
REDUCTION = 100  # cycles over the warps of a program: two barriers, two round trips to shared memory of 20 (assumed)
# https://developer.nvidia.com/blog/cuda-graphs/: a kernel of 2.9 us takes 3.8 us in a stream that the host keeps full,
# 3.4 us in a graph
STREAM_GAP, GRAPH_GAP = 0.9e-6, 0.5e-6
SORT = 4  # launches of torch's radix sort beside its passes: indices, a histogram, its sums, a copy (assumed)
START = 1.0e-6  # of a kernel that does nothing: blocks handed out, code fetched, memory flushed (assumed)
# of MATMUL, what cuDNN reaches in whole waves of tiles of so many outputs; it chooses the best of them (assumed)
CONV = {(128, 128): 0.7, (128, 64): 0.6, (64, 64): 0.5}


def held(registers: int, warps: int, shared: int) -> int:
    """Returns how many programs an SM holds at once, of so many registers a thread and bytes of shared memory."""
    of_registers = REGISTERS // (32 * warps * (8 * math.ceil(registers / 8)))
    return min(WARPS // warps, of_registers, SHARED // (shared + 1024), BLOCKS)

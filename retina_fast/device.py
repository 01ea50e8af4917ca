"""Between the host and the device: uploads that do not wait, reads that come late, and the dtype to compute in."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Upload a small CPU tensor without waiting for the GPU.

    Example::

        >>> to_device(torch.tensor([1, 2]), torch.device("cpu"))
        tensor([1, 2])
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class LateRead:
    """Values of the device that the host reads once they have arrived, so that it does not wait for them.

    On a CUDA device the copy into pinned memory is queued behind the work that computes the values, and an event marks
    its end. Elsewhere the values are there at once.

    Example::

        >>> late = LateRead(torch.tensor([1.0, 2.0]))
        >>> late.arrived(), late.wait().tolist()
        (True, [1.0, 2.0])
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def arrived(self) -> bool:
        """Whether the values are on the host; this never waits."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The values on the host; this waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware: compute capability 8.0, AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has it in hardware; else float16 on a GPU and float32 on a CPU."""
    if has_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32

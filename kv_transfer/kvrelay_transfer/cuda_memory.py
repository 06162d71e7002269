"""Device memory by plain cudaMalloc, as a tensor: what a pool must lie in so that peers can map it.

torch's own allocator cuts tensors out of larger segments and may use expandable segments; the first would share other
tensors along, the second drops same-host transfers to a hundredth of their speed. Knows no layout.
"""

from __future__ import annotations

import weakref

import torch

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.cuda_runtime import OUT_OF_MEMORY, CudaCallError, CudaRuntime

GIB = 1 << 30
# An IPC handle stands for whole pages of this size: smaller allocations would share one with strangers.
PAGE_BYTES = 2 << 20


class CudaAllocation:
    """Freed exactly once, when the last tensor over it is gone."""

    def __init__(self, runtime: CudaRuntime, size_bytes: int, device: int) -> None:
        """Raises CudaCallError."""
        reserved_bytes = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        self.address = runtime.allocate(reserved_bytes, device)
        # What torch asks for; its tensor then holds this object.
        self.__cuda_array_interface__ = {
            "data": (self.address, False),
            "shape": (size_bytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }
        self._finalizer = weakref.finalize(self, runtime.free, self.address, device)
        self._finalizer.atexit = False  # the driver frees what a process leaves


def allocate_tensor(size_bytes: int, device: torch.device, advice: str) -> torch.Tensor:
    """Zeroed bytes [size_bytes] in an allocation of their own.

    Raises ConfigError, ending with `advice`, when the GPU's memory is short.
    """
    runtime = CudaRuntime.load()
    index = device.index if device.index is not None else torch.cuda.current_device()
    torch.cuda.empty_cache()  # what torch holds in reserve is not free for cudaMalloc
    try:
        allocation = CudaAllocation(runtime, size_bytes, index)
    except CudaCallError as error:
        if error.code != OUT_OF_MEMORY:
            raise ConfigError(f"the KV pool cannot be allocated on {device}: {error}") from error
        free_bytes = torch.cuda.mem_get_info(index)[0]
        raise ConfigError(
            f"the KV pool needs {size_bytes / GIB:.2f} GiB of {device} memory, {free_bytes / GIB:.2f} GiB are free; "
            f"{advice}",
            needed_bytes=size_bytes,
            free_bytes=free_bytes,
        ) from error
    tensor = torch.as_tensor(allocation, device=torch.device("cuda", index))
    tensor.zero_()
    torch.cuda.synchronize(index)  # peers and other streams see zeros from the start
    return tensor

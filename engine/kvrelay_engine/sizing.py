"""How much memory a device has, whether something fits, and how many KV blocks do.

`--memory-fraction` is the share of a device's whole memory that one worker may use in all:

    pool = fraction x total - weights - runtime and activations of the largest step

It knows nothing of models: callers bring bytes and a KV layout.
"""

from __future__ import annotations

import torch
from msgspec import Struct

from kvrelay_core.errors import ConfigError
from kvrelay_transfer import host_memory
from kvrelay_transfer.layout import KvLayout

GIB = 2**30


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: of the GPU, or of this host within its control groups' limits."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory.available_bytes()


def total_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of this host within its control groups' limits, whoever uses it."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else host_memory.total_bytes()


def check_fits(required_bytes: int, free_bytes: int, what: str) -> None:
    """Raises ConfigError that says how many GiB are missing."""
    missing = required_bytes - free_bytes
    if missing > 0:
        raise ConfigError(
            f"{what} needs {required_bytes / GIB:.2f} GiB but only {max(free_bytes, 0) / GIB:.2f} GiB are free: "
            f"{missing / GIB:.2f} GiB are missing; free memory, or take a smaller model or dtype"
        )


class MemoryShare(Struct, frozen=True, kw_only=True):
    """What one worker may use of its device, and what of that is spoken for. Bytes."""

    fraction: float
    total: int  # of the device
    weights: int
    activations: int  # of the largest step, and of the process itself

    def blocks_of(self, layout: KvLayout) -> int:
        """Blocks of the pool that the rest holds, the null block included. Raises as `bytes_for`."""
        return self.bytes_for(layout.block_bytes) // layout.block_bytes

    def bytes_for(self, block_bytes: int) -> int:
        """The rest, for blocks of this size; of several groups, one of each.

        Raises ConfigError where not even two fit: the null block and one to use.
        """
        pool = int(self.fraction * self.total) - self.weights - self.activations
        if pool < 2 * block_bytes:
            raise ConfigError(
                f"memory_fraction {self.fraction:g} of {self.total / GIB:.2f} GiB is "
                f"{self.fraction * self.total / GIB:.2f} GiB; the weights take {self.weights / GIB:.2f} GiB, "
                f"runtime and activations {self.activations / GIB:.2f} GiB, which leaves no room for a KV pool (one "
                f"block is {block_bytes / GIB:.4f} GiB); raise --memory-fraction, give --kv-blocks, or take a "
                "smaller model or dtype",
                field="memory_fraction",
            )
        return pool

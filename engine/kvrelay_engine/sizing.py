"""How much memory a device has left, whether something fits, and how many KV blocks do.

It knows nothing of models: callers bring bytes and a KV layout.
"""

from __future__ import annotations

from pathlib import Path

import torch

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.layout import KvLayout

GIB = 2**30
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: of the GPU, or of this host within its container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (_CGROUP / "memory.max").read_text().strip(), (_CGROUP / "memory.current").read_text()
    except OSError:  # no container, or a host with the first version of cgroups
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def check_fits(required_bytes: int, free_bytes: int, what: str) -> None:
    """Raises ConfigError that says how many GiB are missing."""
    missing = required_bytes - free_bytes
    if missing > 0:
        raise ConfigError(
            f"{what} needs {required_bytes / GIB:.2f} GiB but only {max(free_bytes, 0) / GIB:.2f} GiB are free: "
            f"{missing / GIB:.2f} GiB are missing; free memory, or take a smaller model or dtype"
        )


def kv_blocks_that_fit(layout: KvLayout, free_bytes: int, fraction: float) -> int:
    """Blocks of a pool that takes `fraction` of the free bytes, the null block included.

    Raises ConfigError where not even two fit: the null block and one to use.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"the memory fraction must be above 0 and at most 1, not {fraction}")
    usable_bytes = int(free_bytes * fraction)
    check_fits(2 * layout.block_bytes, usable_bytes, "a KV pool of one block")
    return usable_bytes // layout.block_bytes

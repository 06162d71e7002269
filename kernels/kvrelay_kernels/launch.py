"""Block sizes of the Triton kernels: a checked-in table by op, class of shapes and GPU.

Not `@triton.autotune`: it needs a GPU to be imported, costs start-up, and its choice may differ between workers.
Entries are measured; a GPU that is not listed uses `*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """One program works on `tile` elements, or on `rows` x `tile` (in attention query rows x context tokens)."""

    tile: int
    rows: int = 1
    num_warps: int = 4
    num_stages: int = 2


_ANY_GPU: Final = "*"

# (op, class of shapes) -> GPU name -> launch
_TABLE: Final = MappingProxyType(
    {
        ("norm", "rows"): {_ANY_GPU: Launch(tile=2048)},
        ("silu_mul", "rows"): {_ANY_GPU: Launch(tile=1024)},
        ("gelu_tanh_mul", "rows"): {_ANY_GPU: Launch(tile=1024)},
        ("kv_copy", "span"): {_ANY_GPU: Launch(tile=2048, num_warps=8)},
        ("kv_copy", "long rows"): {_ANY_GPU: Launch(tile=2048, rows=4, num_warps=16)},
        ("kv_copy", "rows"): {_ANY_GPU: Launch(tile=128, rows=64, num_warps=16)},
        ("kv_copy", "short rows"): {_ANY_GPU: Launch(tile=16, rows=512, num_warps=16)},
        ("paged_attention", "decode"): {
            _ANY_GPU: Launch(tile=64, rows=16, num_warps=4, num_stages=2),
            "NVIDIA H200": Launch(tile=64, rows=16, num_warps=4, num_stages=3),
        },
        ("paged_attention", "decode float32"): {_ANY_GPU: Launch(tile=32, rows=16, num_warps=4, num_stages=1)},
        ("paged_attention", "prefill"): {
            _ANY_GPU: Launch(tile=64, rows=64, num_warps=4, num_stages=2),
            "NVIDIA H200": Launch(tile=64, rows=128, num_warps=4, num_stages=2),
        },
        ("paged_attention", "prefill float32"): {_ANY_GPU: Launch(tile=32, rows=32, num_warps=4, num_stages=1)},
        ("penalties", "entries"): {_ANY_GPU: Launch(tile=256)},
        ("thresholds", "row"): {
            _ANY_GPU: Launch(tile=2048, num_warps=16),
            "NVIDIA H200": Launch(tile=8192, num_warps=32),
        },
        ("gumbel", "row"): {_ANY_GPU: Launch(tile=1024)},
    }
)


def launch_for(op: str, shapes: str, device: torch.device) -> Launch:
    """The launch for tensors on `device`; those on the CPU are for Triton's interpreter."""
    by_gpu = _TABLE[op, shapes]
    return by_gpu.get(_gpu_name(device), by_gpu[_ANY_GPU])


def num_multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; a few on the CPU, so that tests see split work."""
    return _num_multiprocessors(device.index or 0) if device.type == "cuda" else 4


def _gpu_name(device: torch.device) -> str:
    return _cuda_name(device.index or 0) if device.type == "cuda" else _ANY_GPU


@cache
def _cuda_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@cache
def _num_multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)

"""How slow a link may be before something is wrong with it, as data, and what to look for then.

A floor is far below what a sound machine reaches, so that a busy one does not ring. Knows no links.
"""

from __future__ import annotations

from msgspec import Struct


class Floor(Struct, frozen=True):
    gb_per_s: float  # 10^9 bytes a second
    look_for: str


_BUSY = "more busy threads than cores"
_HOST_COPY = f"{_BUSY}, swapping, memory of another NUMA node"

# By connector and the kind of device that our pool is on; what is not listed has no floor.
FLOORS: dict[tuple[str, str], Floor] = {
    ("cuda_ipc", "cuda"): Floor(100.0, "no NVLink between these GPUs (nvidia-smi topo -m), links that are down"),
    ("shm", "cpu"): Floor(1.0, _HOST_COPY),
    ("nixl", "cpu"): Floor(0.5, f"UCX_TLS or UCX_NET_DEVICES that leave the fast transport out, {_BUSY}"),
    ("nixl", "cuda"): Floor(
        0.5, "GPU memory staged through the host: no GPUDirect (nvidia-peermem), the card on another NUMA node"
    ),
    ("ucx", "cpu"): Floor(0.5, f"UCX_TLS or UCX_NET_DEVICES that leave the fast transport out, {_BUSY}"),
    ("ucx", "cuda"): Floor(0.5, "UCX_TLS without cuda_ipc and cuda_copy, no GPUDirect (nvidia-peermem)"),
    # The slowest connector that a lease gives time for (PROTOCOL B5).
    ("grpc", "cpu"): Floor(0.2, f"a network slower than 2 Gbit/s, {_BUSY} at the source or here"),
    ("grpc", "cuda"): Floor(0.2, f"a network slower than 2 Gbit/s, {_BUSY} at the source or here"),
}


def floor_of(connector: str, device: str) -> Floor:
    return FLOORS.get((connector, device), Floor(0.0, ""))

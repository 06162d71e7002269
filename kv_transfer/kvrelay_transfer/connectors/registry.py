"""Which connectors this engine has, and which of them to try for a peer.

Order is preference: the first one that connects carries the peer. New connectors are one more case in
`create_connectors` and a place in `preferred`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from kvrelay_core.clock import Clock
from kvrelay_core.errors import ConfigError
from kvrelay_transfer.connectors.base import Connector, ConnectorOffer
from kvrelay_transfer.connectors.cuda_ipc import CudaIpcConnector
from kvrelay_transfer.connectors.grpc import GrpcConnector, SocketHalf
from kvrelay_transfer.connectors.nixl import NixlConnector, has_rdma
from kvrelay_transfer.connectors.shm import ShmConnector
from kvrelay_transfer.connectors.ucx import UcxConnector
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging import BlockStaging

# Of the pools that a connector can read; those not listed read any.
_DEVICE_OF = {"shm": "cpu", "cuda_ipc": "cuda"}

_logger = logging.getLogger(__name__)


def preferred(device: str) -> tuple[str, ...]:
    """What `auto` stands for. Without RDMA hardware NIXL could read what shm and cuda_ipc read, and nothing else."""
    near = "shm" if device == "cpu" else "cuda_ipc"
    return (near, *(("nixl",) if _is_nixl_of_use() else ()), "grpc")


def _is_nixl_of_use() -> bool:
    if not has_rdma():
        return False
    if find_spec("nixl") is None:
        _logger.info("this host has RDMA hardware, but NIXL is not installed: pip install 'kvrelay[nixl]'")
        return False
    return True


def create_connectors(
    names: Sequence[str],
    *,
    memory: PoolMemory,
    run_dir: Path | None,
    worker_id: str,
    staging: BlockStaging,
    socket_half: SocketHalf,
    clock: Clock,
    first_read_id: int = 1,
) -> dict[str, Connector]:
    """The named connectors in the given order; `["auto"]` is what suits the pool's device. `run_dir` None: this pool
    is only read into.

    Raises ConfigError for a name that is unknown or cannot serve this device.
    """
    wanted = preferred(memory.device) if list(names) == ["auto"] else tuple(names)
    connectors: dict[str, Connector] = {}
    pool_socket = None if run_dir is None else run_dir / f"{worker_id.replace('/', '_')}.pool.sock"
    for name in wanted:
        if name in _DEVICE_OF and memory.device != _DEVICE_OF[name]:
            raise ConfigError(f"{name} connects pools on {_DEVICE_OF[name]}, and this one is on {memory.device}")
        match name:
            case "shm":
                connectors[name] = ShmConnector(memory, clock, pool_socket)
            case "cuda_ipc":
                connectors[name] = CudaIpcConnector(memory, clock, pool_socket)
            case "nixl":
                connectors[name] = NixlConnector(memory, clock)
            case "grpc":
                connectors[name] = GrpcConnector(
                    memory.num_blocks, staging, socket_half, clock, first_read_id=first_read_id
                )
            case "ucx":
                connectors[name] = UcxConnector(memory, clock)
            case _:
                raise ConfigError(f"no connector {name!r}; there are: auto, cuda_ipc, shm, nixl, ucx, grpc")
    return connectors


def for_host_memory(names: Sequence[str]) -> tuple[str, ...]:
    """Of the connectors that were chosen for a pool on any device, those that can read one in host memory too; auto
    where none can."""
    return tuple(name for name in names if _DEVICE_OF.get(name, "cpu") == "cpu") or ("auto",)


def choose(
    offers: Sequence[ConnectorOffer], connectors: Mapping[str, Connector]
) -> Iterator[tuple[Connector, ConnectorOffer]]:
    """Our connectors that the peer offers too, in our order of preference."""
    by_name = {offer.name: offer for offer in offers}
    return ((connector, by_name[name]) for name, connector in connectors.items() if name in by_name)

"""What a connector offers, whose offers it refuses, and which connector is tried first."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from connector_benches import GrpcBench, make_bench
from handoff_sides import ADDRESS, LAYOUT, MODEL, make_memory
from msgspec.structs import replace

from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import ConfigError, TransferError
from kvrelay_transfer.connectors.base import ConnectorOffer, PeerInfo
from kvrelay_transfer.connectors.registry import choose, create_connectors
from kvrelay_transfer.connectors.shm import ShmConnector, ShmEndpoint
from kvrelay_transfer.pool_memory import PoolMemory


def shm_connector(tmp_path: Path) -> tuple[PoolMemory, ShmConnector]:
    memory = make_memory()
    return memory, ShmConnector(memory, MonotonicClock(), tmp_path / "reader.sock")


@pytest.mark.parametrize("endpoint", [b"", b"\xff\xff", b"garbage"])
def test_shm_refuses_an_endpoint_that_it_cannot_read(tmp_path: Path, endpoint: bytes) -> None:
    memory, connector = shm_connector(tmp_path)
    peer = PeerInfo(ADDRESS, b"e" * 16, MODEL, LAYOUT, ())
    with pytest.raises(TransferError, match="cannot read"):
        connector.connect(peer, ConnectorOffer("shm", endpoint))
    connector.close()
    memory.close()


def test_shm_refuses_another_host(tmp_path: Path) -> None:

    memory, connector = shm_connector(tmp_path)
    endpoint = msgspec.msgpack.encode(ShmEndpoint("another boot", str(tmp_path / "reader.sock")))
    peer = PeerInfo(ADDRESS, memory.engine_epoch, MODEL, LAYOUT, ())
    with pytest.raises(TransferError, match="another host"):
        connector.connect(peer, ConnectorOffer("shm", endpoint))
    connector.close()
    memory.close()


def test_shm_refuses_a_pool_of_another_layout_than_announced(tmp_path: Path) -> None:
    memory, connector = shm_connector(tmp_path)
    other = make_memory(8, replace(LAYOUT, head_dim=16))
    reader = ShmConnector(other, MonotonicClock(), None)
    offer = connector.offer()
    assert offer is not None and reader.offer() is None
    peer = PeerInfo(ADDRESS, memory.engine_epoch, MODEL, other.layout, (offer,))
    with pytest.raises(TransferError, match="another layout than the peer says"):
        reader.connect(peer, offer)
    for closable in (reader, connector, memory, other):
        closable.close()


def test_connectors_are_tried_in_our_order(tmp_path: Path) -> None:
    bench = make_bench("grpc", tmp_path)
    assert isinstance(bench, GrpcBench)
    ours = create_connectors(
        ["auto"],
        memory=bench.memory,
        run_dir=tmp_path,
        worker_id="decode/0",
        staging=bench.staging,
        socket_half=bench.pump,
        clock=bench.clock,
    )
    assert list(ours) == ["shm", "grpc"]
    offers = [ConnectorOffer("grpc", b""), ConnectorOffer("rdma", b""), ConnectorOffer("shm", b"x")]
    assert [connector.name for connector, _ in choose(offers, ours)] == ["shm", "grpc"]
    assert [offer.endpoint for _, offer in choose(offers, ours)] == [b"x", b""]
    assert list(choose([ConnectorOffer("rdma", b"")], ours)) == []
    for connector in ours.values():
        connector.close()
    bench.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_connector_is_a_config_error(tmp_path: Path) -> None:
    bench = make_bench("grpc", tmp_path)
    assert isinstance(bench, GrpcBench)
    with pytest.raises(ConfigError, match="there are: auto, cuda_ipc, shm, nixl, grpc"):
        create_connectors(
            ["pigeon"],
            memory=bench.memory,
            run_dir=tmp_path,
            worker_id="w",
            staging=bench.staging,
            socket_half=bench.pump,
            clock=bench.clock,
        )
    bench.close()

"""What a connector offers, whose offers it refuses, and which connector is tried first."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from connector_benches import GrpcBench, make_bench
from handoff_sides import ADDRESS, LAYOUT, MODEL, make_memory, wait_until
from msgspec.structs import replace

from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import ConfigError, TransferError
from kvrelay_transfer.connectors import registry
from kvrelay_transfer.connectors.base import ConnectorOffer, PeerInfo
from kvrelay_transfer.connectors.nixl import NixlConnector
from kvrelay_transfer.connectors.nixl_endpoint import MAX_ENDPOINT_BYTES, NixlEndpoint, decode_endpoint, digest_of
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


@pytest.fixture
def nixl_offer() -> Iterator[tuple[PoolMemory, NixlConnector, NixlEndpoint]]:
    memory = make_memory()
    connector = NixlConnector(memory, MonotonicClock())
    yield memory, connector, msgspec.msgpack.decode(connector.offer().endpoint, type=NixlEndpoint)
    connector.close()
    memory.close()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metadata": b"damaged"}, "arrived damaged"),
        ({"metadata": b"", "digest": digest_of(b"")}, "could not take in the peer's metadata"),
        ({"metadata": b"nixl", "digest": digest_of(b"nixl")}, "could not take in the peer's metadata"),
        ({"agent_name": "somebody else"}, "of another agent"),
        ({"engine_epoch": b"another start"}, "another engine start"),
        ({"layout_fingerprint": b"another"}, "another layout"),
        ({"num_blocks": 1}, "contradicts itself"),
        ({"num_blocks": 1 << 31}, "contradicts itself"),
        ({"data_address": -1}, "contradicts itself"),
        ({"data_kind": "FILE"}, "contradicts itself"),
        ({"num_blocks": 1 << 20}, "could not"),
        ({"words_address": 4096}, "could not"),
    ],
)
def test_nixl_refuses_an_offer_that_is_not_whole(
    nixl_offer: tuple[PoolMemory, NixlConnector, NixlEndpoint], changes: dict[str, object], match: str
) -> None:
    source, source_connector, endpoint = nixl_offer
    memory = make_memory()
    reader = NixlConnector(memory, MonotonicClock())
    peer = PeerInfo(ADDRESS, source.engine_epoch, MODEL, LAYOUT, ())
    offer = ConnectorOffer("nixl", msgspec.msgpack.encode(replace(endpoint, **changes)))
    with pytest.raises(TransferError, match=match):
        reader.connect(peer, offer)
    link = reader.connect(peer, source_connector.offer())
    wait_until(lambda: link.probed_gb_per_s() is not None)
    assert link.probed_gb_per_s() != 0.0, "a bad offer spoils nothing for the next"
    reader.close()
    memory.close()


@pytest.mark.parametrize("endpoint", [b"", b"\xff\xff", b"\xa1\xff" * 8, bytes(MAX_ENDPOINT_BYTES + 1)])
def test_nixl_refuses_an_endpoint_that_it_cannot_read(endpoint: bytes) -> None:
    with pytest.raises(TransferError, match=r"cannot read|at most"):
        decode_endpoint(endpoint, PeerInfo(ADDRESS, b"e" * 16, MODEL, LAYOUT, ()), LAYOUT)


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
    with pytest.raises(ConfigError, match="there are: auto, cuda_ipc, shm, nixl, ucx, grpc"):
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


def test_nixl_is_tried_where_there_is_hardware_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "has_rdma", lambda: True)
    assert registry.preferred("cpu") == ("shm", "nixl", "grpc")
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    assert registry.preferred("cpu") == ("shm", "grpc")
    monkeypatch.undo()
    monkeypatch.setattr(registry, "has_rdma", lambda: False)
    assert registry.preferred("cpu") == ("shm", "grpc")


def test_nixl_that_is_not_installed_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    memory = make_memory()
    before = threading.active_count()
    with pytest.raises(ConfigError, match=r"pip install 'kvrelay\[nixl\]'"):
        NixlConnector(memory, MonotonicClock())
    assert threading.active_count() == before
    memory.close()


def test_nixl_leaves_environment_and_logging_as_they_are() -> None:
    code = """
import logging, os
before = dict(os.environ)
from kvrelay_core.clock import MonotonicClock
from kvrelay_transfer.connectors.nixl import NixlConnector
import sys
assert "nixl" not in sys.modules
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
memory = PoolMemory.allocate(KvLayout("float32", 1, 1, 4, 8, hash_unit_tokens=8), 4, "cpu", os.urandom(16))
NixlConnector(memory, MonotonicClock()).close()
assert "nixl" in sys.modules and dict(os.environ) == before and logging.raiseExceptions
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == ""

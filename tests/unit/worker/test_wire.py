from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec
import pytest
from fake_engine import LAYOUT
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kvrelay.v1 import common_pb2 as pb
from kvrelay.v1 import kv_source_pb2
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import InvalidRequestError, MismatchError, PoolExhaustedError
from kvrelay_core.request import AttemptId
from kvrelay_engine.load_messages import ConnectorLoad, LinkLoad, Load, ReadCounts, TierLoad
from kvrelay_engine.messages import ReleaseReason
from kvrelay_transfer.ticket import GroupBlocks, KvTicket, LeaseTerms, TicketSigner
from kvrelay_worker import wire
from kvrelay_worker.embedding_wire import peer_from_wire

WORDS = st.lists(st.tuples(st.integers(1, 2**32 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=5)


def make_ticket(blocks: list[tuple[int, int]], wall_cap_s: float = 10.0) -> KvTicket:
    group = GroupBlocks(0, 0, tuple(block for block, _ in blocks), tuple(word for _, word in blocks))
    return KvTicket(
        ticket_id="t",
        source_id="p",
        source_address="127.0.0.1:1",
        engine_epoch=b"e" * 16,
        attempt=AttemptId("router", "request", 2),
        model_fingerprint=b"m",
        layout=LAYOUT,
        groups=(group,),
        num_tokens=7,
        unit_hashes=b"h" * 64,
        lease=LeaseTerms(wall_cap_s=wall_cap_s),
    )


def test_a_ticket_of_two_groups_survives_the_wire() -> None:
    """And one of a model with one group sends what it sent before there were more."""
    one = make_ticket([(3, 30)])
    two = replace(
        one, groups=(*one.groups, GroupBlocks(1, 16, (5,), (50,))), more_layouts=(replace(LAYOUT, window=24),)
    )
    assert wire.ticket_from_wire(pb.KvTicket.FromString(wire.ticket_to_wire(two).SerializeToString())) == two
    sent = wire.ticket_to_wire(one)
    assert not sent.more_layouts and b"window" not in str(sent).encode()


@given(WORDS, st.floats(0, 1e9))
def test_a_ticket_survives_the_wire_with_its_signature(blocks: list[tuple[int, int]], wall_cap_s: float) -> None:
    signer = TicketSigner(b"key", b"e" * 16)
    ticket = signer.sign(make_ticket(blocks, wall_cap_s))
    copy = wire.ticket_from_wire(pb.KvTicket.FromString(wire.ticket_to_wire(ticket).SerializeToString()))
    assert copy == ticket
    signer.verify(copy)


BREAKAGES: dict[str, Callable[[pb.KvTicket], object]] = {
    "empty": lambda ticket: ticket.Clear(),
    "no id": lambda ticket: ticket.ClearField("ticket_id"),
    "no source": lambda ticket: ticket.ClearField("source"),
    "short epoch": lambda ticket: setattr(ticket, "engine_epoch", b"short"),
    "no attempt": lambda ticket: ticket.ClearField("attempt"),
    "no layout": lambda ticket: ticket.ClearField("layout"),
    "unknown dtype": lambda ticket: setattr(ticket.layout, "dtype", "int3"),
    "no groups": lambda ticket: ticket.ClearField("groups"),
    "a word too few": lambda ticket: ticket.groups[0].words.pop(),
    "torn hashes": lambda ticket: setattr(ticket, "block_hashes", b"x" * 33),
    "endless lease": lambda ticket: setattr(ticket.lease, "beat_s", float("inf")),
    "lease of no number": lambda ticket: setattr(ticket.lease, "wall_cap_s", float("nan")),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_malformed_ticket_is_an_invalid_request(name: str) -> None:
    message = wire.ticket_to_wire(make_ticket([(1, 2)]))
    BREAKAGES[name](message)
    with pytest.raises(InvalidRequestError):
        wire.ticket_from_wire(message)


@given(st.binary(max_size=200))
def test_any_bytes_that_parse_are_a_ticket_or_an_invalid_request(data: bytes) -> None:
    message = pb.KvTicket()
    try:
        message.ParseFromString(data)
    except Exception:
        return  # what gRPC refuses before it comes to us
    with contextlib.suppress(InvalidRequestError):
        wire.ticket_from_wire(message)


def test_a_peer_is_named_by_the_address_that_was_dialled() -> None:
    response = kv_source_pb2.ConnectResponse(
        source=pb.WorkerRef(worker_id="p", address="elsewhere:1"),
        engine_epoch=b"e" * 16,
        model_fingerprint=b"m",
        offers=[kv_source_pb2.ConnectorOffer(name="shm", endpoint=b"x")],
        layouts=[wire.layout_to_wire(LAYOUT)],
    )
    peer = peer_from_wire("127.0.0.1:1", response)
    assert (peer.peer_id, peer.layout, peer.offers[0].name) == ("127.0.0.1:1", LAYOUT, "shm")
    window = replace(LAYOUT, num_layers=7, window=24)
    response.more_pools.add(layout=wire.layout_to_wire(window), offers=response.offers)
    peer = peer_from_wire("127.0.0.1:1", response)
    assert peer.layouts == (LAYOUT, window) and peer.of_group(1).offers == peer.offers
    with pytest.raises(MismatchError, match="has 2 KV groups"):
        peer.of_group(2)
    response.layouts.add()
    with pytest.raises(InvalidRequestError, match="names 2 layouts"):
        peer_from_wire("127.0.0.1:1", response)


def test_release_reasons_and_errors_round_trip() -> None:
    for reason in ReleaseReason:
        assert wire.release_reason_from_wire(wire.release_reason_to_wire(reason)) is reason
    assert wire.release_reason_from_wire(99) is ReleaseReason.FAILED
    info = info_of(PoolExhaustedError("no room", needed=3))
    assert wire.error_info_from_wire(wire.error_info_to_wire(info)) == info


def test_every_count_of_the_load_reaches_the_wire() -> None:
    names = [name for name in Load.__struct_fields__ if name not in ("links", "connectors", "tiers")]
    counts = {name: number for number, name in enumerate(names, start=1)}
    load = msgspec.convert(counts, Load)
    message = wire.load_to_wire(load, streams=50, tasks=60, draining=True)
    assert {name: getattr(message, name) for name in counts} == counts
    assert (message.streams, message.tasks, message.draining) == (50, 60, True)


def test_every_count_of_a_tier_reaches_the_wire() -> None:
    names = [name for name in TierLoad.__struct_fields__ if name not in ("tier", "is_left_alone")]
    counts = {name: number for number, name in enumerate(names, start=1)}
    tier = msgspec.convert({"tier": "redis", "is_left_alone": True, **counts}, TierLoad)
    (report,) = wire.load_to_wire(Load(tiers=(tier,)), streams=0, tasks=0, draining=False).tiers
    assert {name: getattr(report, name) for name in counts} == counts
    assert (report.tier, report.left_alone) == ("redis", True)


COUNTS = ReadCounts(
    reads=1, size_bytes=2, spans=3, reading_s=4.0, mean_read_s=5.0, failed_reads=6, stale_reads=7, fallbacks=8
)


def test_every_count_of_a_link_and_of_a_connector_reaches_the_wire() -> None:
    link = LinkLoad(
        peer_id="10.0.0.7:1", connector="shm", is_current=True, probed_gb_per_s=9.0, probed_latency_s=10.0,
        floor_gb_per_s=11.0, is_below_floor=True, counts=COUNTS,
    )  # fmt: skip
    load = Load(links=(link,), connectors=(ConnectorLoad(connector="grpc", counts=COUNTS),))
    message = wire.load_to_wire(load, streams=0, tasks=0, draining=False)
    (report,), (total,) = message.links, message.connectors
    assert (report.peer, report.connector, report.current, report.below_floor) == ("10.0.0.7:1", "shm", True, True)
    assert (report.probed_gb_per_s, report.probed_latency_s, report.floor_gb_per_s) == (9.0, 10.0, 11.0)
    assert total.connector == "grpc"
    for side in (report, total):
        counts = (side.reads, side.bytes, side.spans, side.reading_s, side.mean_read_s)
        assert (*counts, side.failed_reads, side.stale_reads, side.fallbacks) == (1, 2, 3, 4.0, 5.0, 6, 7, 8)

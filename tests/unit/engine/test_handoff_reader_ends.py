"""What a hand-off leaves when it is given up, and the links that it is pulled over."""

from __future__ import annotations

import re

import pytest
from handoff_pair import TOKENS, HandoffPair, finished
from handoff_sides import ADDRESS, LAYOUT, make_sequence
from msgspec.structs import replace

from kvrelay_core.errors import (
    TransferError,
)
from kvrelay_engine.handoff_reader import ReaderLimits
from kvrelay_engine.messages import (
    ConnectPeer,
    PeerConnected,
    PeerFailed,
    ReleaseReason,
)
from kvrelay_transfer.connectors.base import Connector, ConnectorOffer
from kvrelay_transfer.connectors.memory import MemoryConnector


@pytest.fixture
def pair() -> HandoffPair:
    return HandoffPair()


# ---------------------------------------------------------------------------------------- abort and quarantine


def test_an_abort_quarantines_what_is_posted_and_frees_the_rest() -> None:
    pair = HandoffPair(limits=ReaderLimits(max_reads=1, max_read_bytes=1))
    decode, _ = finished(pair)
    pair.poll()
    transfer = pair.only_transfer()
    pair.reader.abort(1)
    pair.reader.abort(1)
    assert transfer.was_aborted
    assert pair.released() is ReleaseReason.CANCELLED
    assert pair.pool.num_in_use == pair.reader.num_quarantined == 1
    assert pair.reader.is_busy and decode.blocks == []

    others = pair.pool.reserve(pair.pool.num_free)
    assert not set(others) & set(transfer.request.local_blocks), "nobody gets a quarantined block"
    pair.pool.release(others)
    transfer.land()
    assert pair.reader.poll() == []
    pair.assert_all_free()


def test_an_abort_before_anything_was_posted_frees_everything(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS)
    pair.open(sequence, pair.side.accept(sequence))
    pair.reader.abort(1)
    pair.carry()
    assert pair.reader.poll() == []
    pair.assert_all_free()


def test_a_peer_with_too_much_in_quarantine_is_torn_down() -> None:
    pair = HandoffPair(limits=ReaderLimits(max_quarantined_share=0.25))  # 8 of 32 blocks
    for request_id in (1, 2):
        sequence = make_sequence([request_id * 1000 + token for token in TOKENS], request_id)
        pair.open(sequence, pair.side.prefill(sequence))
        pair.carry(request_id)
        pair.poll()
    assert [len(read.request.local) for read in pair.fabric.pending] == [5, 3], "as much as may be given up at once"
    pair.reader.abort(1)
    assert pair.reader.num_quarantined == 5
    pair.reader.abort(2)
    assert pair.reader.num_quarantined == 8

    for request_id in (3, 4):
        sequence = make_sequence([request_id * 1000 + token for token in TOKENS], request_id)
        pair.open(sequence, pair.side.prefill(sequence))
        pair.carry(request_id)
        pair.poll()
    assert [len(read.request.local) for read in pair.fabric.pending] == [5, 3, 1], "one read comes through"
    pair.take_events()
    pair.reader.abort(3)
    failed = [event for event in pair.take_events() if isinstance(event, PeerFailed)]
    assert [event.peer_id for event in failed] == [ADDRESS]
    pair.reader.abort(4)
    pair.assert_all_free()
    pair.take_events()
    pair.connect()


def test_closing_the_reader_frees_everything(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    pair.reader.close()
    pair.reader.poll()
    pair.assert_all_free()


def test_a_hand_off_that_gives_way_refuses_the_ticket(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    pair.reader.abort(1, ReleaseReason.REFUSED)
    assert pair.released() is ReleaseReason.REFUSED
    assert pair.reader.num_quarantined == 5, "the read is still under way"
    pair.fabric.land_all()
    assert pair.reader.poll() == []
    pair.assert_all_free()


# ------------------------------------------------------------------------------------------ links and fallbacks


class Unreachable(MemoryConnector):
    name = "unreachable"

    def connect(self, *_: object) -> object:  # type: ignore[override]
        raise TransferError("not from here")


def test_the_next_connector_is_tried_when_one_cannot_connect() -> None:
    pair = HandoffPair(is_connected=False)
    memory = MemoryConnector(pair.fabric, pair.memory, pair.clock)
    first = Unreachable(pair.fabric, pair.memory, pair.clock)
    fallback = HandoffPair(connectors={"unreachable": first, "memory": memory}, is_connected=False)
    offers = (ConnectorOffer("memory", pair.side.memory.engine_epoch), ConnectorOffer("unreachable", b""))
    fallback.reader.handle(ConnectPeer(pair.side.peer(*offers)))
    fallback.reader.poll()
    assert fallback.take_events() == [PeerConnected(ADDRESS, "memory", 0.0)]
    fallback.reader.handle(ConnectPeer(pair.side.peer(*offers)))
    fallback.reader.poll()
    assert fallback.take_events() == [PeerConnected(ADDRESS, "memory", 0.0)], "asking again is answered again"
    fallback.reader.handle(ConnectPeer(pair.side.peer(offers[1])))
    (failed,) = fallback.take_events()
    assert isinstance(failed, PeerFailed) and "unreachable: not from here" in failed.error.message


@pytest.mark.parametrize(
    ("changes", "advice"),
    [({"dtype": "bfloat16"}, "has bfloat16, this pool float32.*same --dtype"), ({"head_dim": 16}, "same model")],
)
def test_a_peer_with_other_content_is_refused_at_connect(
    pair: HandoffPair, changes: dict[str, object], advice: str
) -> None:
    peer = pair.side.peer(pair.source_connector.offer())
    pair.reader.handle(ConnectPeer(replace(peer, peer_id="other:1", layout=replace(peer.layout, **changes))))
    (failed,) = pair.take_events()
    assert isinstance(failed, PeerFailed) and failed.error.reason == "MismatchError"
    assert re.search(advice, failed.error.message)


class WholeBlocks(MemoryConnector):
    name = "whole"
    can_slice = False


@pytest.mark.parametrize("has_other", [True, False])
def test_a_connector_that_cannot_slice_is_passed_over_for_a_peer_with_other_blocks(has_other: bool) -> None:
    pair = HandoffPair(is_connected=False)
    connectors: dict[str, Connector] = {"whole": WholeBlocks(pair.fabric, pair.memory, pair.clock)}
    if has_other:
        connectors["memory"] = MemoryConnector(pair.fabric, pair.memory, pair.clock)
    larger = replace(LAYOUT, block_tokens=16)
    reader = HandoffPair(connectors=connectors, source_layout=larger, is_connected=False)
    source = MemoryConnector(pair.fabric, reader.side.memory, pair.clock).offer()
    offers = tuple(ConnectorOffer(name, source.endpoint) for name in connectors)
    reader.reader.handle(ConnectPeer(reader.side.peer(*offers)))
    reader.reader.poll()
    (event,) = reader.take_events()
    if has_other:
        assert event == PeerConnected(ADDRESS, "memory", 0.0)
        return
    assert isinstance(event, PeerFailed) and event.error.reason == "TransferError"
    assert "whole: moves whole blocks only" in event.error.message
    assert (
        "the source have 16 tokens of 2 KV heads, ours 4 tokens of 2 KV heads: use one --block-tokens"
        in event.error.message
    )

"""Embedding tickets and layouts survive the wire, and what is malformed is refused there."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from kvrelay.v1 import common_pb2 as pb
from kvrelay.v1 import kv_source_pb2
from kvrelay_core.errors import InvalidRequestError, MismatchError
from kvrelay_transfer.embedding_layout import EmbeddingLayout
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import EmbeddingTicket, LeaseTerms
from kvrelay_worker import embedding_wire as wire

LAYOUT = EmbeddingLayout("bfloat16", 64)
KV = KvLayout(dtype="float32", num_layers=1, num_kv_heads=1, block_tokens=4, head_dim=8, hash_unit_tokens=4)
TICKET = EmbeddingTicket(
    ticket_id="t1", source_id="encoder-0", source_address="127.0.0.1:1", engine_epoch=b"e" * 16,
    content_hash=b"c" * 32, encoder_fingerprint=b"f" * 32, layout=LAYOUT, blocks=(3, 1), words=(7, 1 << 60),
    num_tokens=20, lease=LeaseTerms(first_follow_s=9.0), mac=b"m" * 32,
)  # fmt: skip


def test_a_ticket_survives_the_wire() -> None:
    assert wire.embedding_ticket_from_wire(wire.embedding_ticket_to_wire(TICKET)) == TICKET


def test_a_fetch_names_either_kind_of_ticket() -> None:
    request = wire.fetch_to_wire(TICKET, 0, (3,))
    assert wire.readable_from_wire(request) == TICKET
    assert list(request.blocks) == [3]


@pytest.mark.parametrize(
    "change",
    [{"ticket_id": ""}, {"source_address": ""}, {"engine_epoch": b"e"}, {"content_hash": b"c"}, {"words": (1,)},
     {"layout": EmbeddingLayout("int4", 64)}, {"layout": EmbeddingLayout("float32", 0)}],
)  # fmt: skip
def test_malformed_tickets_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError):
        wire.embedding_ticket_from_wire(wire.embedding_ticket_to_wire(replace(TICKET, **change)))


def test_a_reader_is_checked_by_its_pool_of_our_kind() -> None:
    request = wire.connect_to_wire(pb.WorkerRef(), [], (KV, LAYOUT))
    wire.check_reader(request, (LAYOUT,))
    wire.check_reader(request, (KV,))
    with pytest.raises(MismatchError, match="hidden_size"):
        wire.check_reader(request, (EmbeddingLayout("bfloat16", 32),))
    with pytest.raises(MismatchError, match="head_dim"):
        wire.check_reader(request, (replace(KV, head_dim=16),))
    with pytest.raises(MismatchError, match="the source has 2 KV groups, this worker 1"):
        wire.check_reader(request, (KV, replace(KV, window=24)))


def test_a_peer_has_one_pool_of_either_kind() -> None:
    response = kv_source_pb2.ConnectResponse(
        engine_epoch=b"e" * 16, embedding_layouts=[wire.embedding_layout_to_wire(LAYOUT)]
    )
    assert wire.peer_from_wire("a:1", response).layout == LAYOUT
    response.embedding_layouts.append(wire.embedding_layout_to_wire(LAYOUT))
    with pytest.raises(InvalidRequestError):
        wire.peer_from_wire("a:1", response)

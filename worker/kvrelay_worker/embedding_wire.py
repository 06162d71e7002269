"""Between protobuf and the dataclasses of embeddings: tickets and layouts; and what a pool of either kind is.

`x_to_wire` makes the message, `x_from_wire` the dataclass. Malformed input is an InvalidRequestError; whether a
well-formed ticket is genuine is the issuing encoder's business.
"""

from __future__ import annotations

from kvrelay.v1 import common_pb2 as pb
from kvrelay.v1 import kv_source_pb2 as source_pb
from kvrelay_core.errors import ConfigError, InvalidRequestError
from kvrelay_core.hashing import HASH_BYTES
from kvrelay_transfer.connectors.base import PeerInfo, PoolOffer
from kvrelay_transfer.embedding_layout import EmbeddingLayout, PoolLayout
from kvrelay_transfer.layout import KvLayout, check_groups
from kvrelay_transfer.ticket import EmbeddingTicket, GroupBlocks, Ticket
from kvrelay_worker.wire import (
    EPOCH_BYTES,
    group_blocks_from_wire,
    group_blocks_to_wire,
    layout_from_wire,
    layout_to_wire,
    lease_from_wire,
    lease_to_wire,
    offer_from_wire,
    ticket_from_wire,
    ticket_to_wire,
)


def embedding_layout_to_wire(layout: EmbeddingLayout) -> pb.EmbeddingLayout:
    return pb.EmbeddingLayout(dtype=layout.dtype, hidden_size=layout.hidden_size, block_tokens=layout.block_tokens)


def embedding_layout_from_wire(wire: pb.EmbeddingLayout) -> EmbeddingLayout:
    layout = EmbeddingLayout(wire.dtype, wire.hidden_size, wire.block_tokens)
    try:
        layout.validate()
    except ConfigError as error:
        raise InvalidRequestError(f"malformed embedding layout: {error.message}") from error
    return layout


def embedding_ticket_to_wire(ticket: EmbeddingTicket) -> pb.EmbeddingTicket:
    return pb.EmbeddingTicket(
        ticket_id=ticket.ticket_id,
        source=pb.WorkerRef(worker_id=ticket.source_id, address=ticket.source_address),
        engine_epoch=ticket.engine_epoch,
        content_hash=ticket.content_hash,
        encoder_fingerprint=ticket.encoder_fingerprint,
        num_tokens=ticket.num_tokens,
        hidden_size=ticket.layout.hidden_size,
        dtype=ticket.layout.dtype,
        block_tokens=ticket.layout.block_tokens,
        blocks=group_blocks_to_wire(GroupBlocks(0, 0, ticket.blocks, ticket.words)),
        lease=lease_to_wire(ticket.lease),
        hmac=ticket.mac,
    )


def embedding_ticket_from_wire(wire: pb.EmbeddingTicket) -> EmbeddingTicket:
    _require(bool(wire.ticket_id), "the embedding ticket has no ticket_id; send it as the encoder issued it")
    _require(bool(wire.source.address), "the embedding ticket names no source address")
    _require(len(wire.engine_epoch) == EPOCH_BYTES, f"engine_epoch must have {EPOCH_BYTES} bytes")
    _require(len(wire.content_hash) == HASH_BYTES, f"content_hash must have {HASH_BYTES} bytes")
    group = group_blocks_from_wire(wire.blocks)
    return EmbeddingTicket(
        ticket_id=wire.ticket_id,
        source_id=wire.source.worker_id,
        source_address=wire.source.address,
        engine_epoch=wire.engine_epoch,
        content_hash=wire.content_hash,
        encoder_fingerprint=wire.encoder_fingerprint,
        layout=embedding_layout_from_wire(
            pb.EmbeddingLayout(dtype=wire.dtype, hidden_size=wire.hidden_size, block_tokens=wire.block_tokens)
        ),
        blocks=group.blocks,
        words=group.words,
        num_tokens=wire.num_tokens,
        lease=lease_from_wire(wire.lease),
        mac=wire.hmac,
    )


# ---------------------------------------------------------------------------------- pools of either kind


def fetch_to_wire(ticket: Ticket, group: int, blocks: tuple[int, ...]) -> source_pb.FetchRequest:
    if isinstance(ticket, EmbeddingTicket):
        embedding_ticket = embedding_ticket_to_wire(ticket)
        return source_pb.FetchRequest(embedding_ticket=embedding_ticket, group=group, blocks=blocks)
    return source_pb.FetchRequest(ticket=ticket_to_wire(ticket), group=group, blocks=blocks)


def readable_from_wire(wire: source_pb.FetchRequest | source_pb.ReleaseRequest) -> Ticket:
    """The ticket of a Fetch or a Release, of whichever kind."""
    if wire.HasField("embedding_ticket"):
        return embedding_ticket_from_wire(wire.embedding_ticket)
    return ticket_from_wire(wire.ticket)


def connect_to_wire(
    reader: pb.WorkerRef, offers: list[source_pb.ConnectorOffer], layouts: tuple[PoolLayout, ...]
) -> source_pb.ConnectRequest:
    """`layouts` are those of all pools of the reader."""
    return source_pb.ConnectRequest(
        reader=reader,
        offers=offers,
        layouts=[layout_to_wire(layout) for layout in layouts if isinstance(layout, KvLayout)],
        embedding_layouts=[
            embedding_layout_to_wire(layout) for layout in layouts if isinstance(layout, EmbeddingLayout)
        ],
    )


def check_reader(wire: source_pb.ConnectRequest, ours: tuple[PoolLayout, ...]) -> None:
    """Raises MismatchError when the reader's pools of our kind cannot take blocks of our groups."""
    if isinstance(ours[0], EmbeddingLayout):
        for embedding_layout in wire.embedding_layouts:
            embedding_layout_from_wire(embedding_layout).check_compatible(ours[0])
    elif wire.layouts:
        check_groups(list(map(layout_from_wire, wire.layouts)), ours)


def peer_from_wire(peer_id: str, wire: source_pb.ConnectResponse) -> PeerInfo:
    """`peer_id` is the address that was dialled, never what the peer calls itself."""
    _require(len(wire.engine_epoch) == EPOCH_BYTES, f"peer {peer_id}: engine_epoch must have {EPOCH_BYTES} bytes")
    num_groups = len(wire.layouts) + len(wire.embedding_layouts)
    _require(num_groups == 1, f"peer {peer_id} names {num_groups} layouts of its first KV group")
    layouts: list[PoolLayout] = [*map(layout_from_wire, wire.layouts)]
    layouts += map(embedding_layout_from_wire, wire.embedding_layouts)
    return PeerInfo(
        peer_id=peer_id,
        engine_epoch=wire.engine_epoch,
        model_fingerprint=wire.model_fingerprint,
        layout=layouts[0],
        offers=tuple(map(offer_from_wire, wire.offers)),
        more_pools=tuple(
            PoolOffer(layout_from_wire(pool.layout), tuple(map(offer_from_wire, pool.offers)))
            for pool in wire.more_pools
        ),
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message)

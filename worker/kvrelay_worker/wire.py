"""Between protobuf and the dataclasses of the transfer package: tickets, layouts, leases, loads, errors.

`x_to_wire` makes the message, `x_from_wire` the dataclass. Malformed input is an InvalidRequestError; whether a
well-formed ticket is genuine is the issuing engine's business.
"""

from __future__ import annotations

import msgspec

from kvrelay.v1 import common_pb2 as pb
from kvrelay.v1 import kv_source_pb2 as source_pb
from kvrelay.v1 import worker_pb2
from kvrelay_core.error_info import error_of, info_of
from kvrelay_core.errors import ConfigError, InvalidRequestError
from kvrelay_core.hashing import HASH_BYTES
from kvrelay_core.request import ErrorInfo
from kvrelay_core.rpc import wire as core_wire
from kvrelay_core.rpc.status import error_from_detail, error_to_detail
from kvrelay_engine.load_messages import ConnectorLoad, LinkLoad, Load, TierLoad
from kvrelay_engine.messages import ReleaseReason
from kvrelay_transfer.connectors.base import ConnectorOffer
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import GroupBlocks, KvTicket, LeaseTerms

EPOCH_BYTES = 16

_REASON_TO_WIRE: dict[ReleaseReason, source_pb.ReleaseReason.ValueType] = {
    ReleaseReason.PULLED: source_pb.RELEASE_REASON_PULLED,
    ReleaseReason.CANCELLED: source_pb.RELEASE_REASON_CANCELLED,
    ReleaseReason.FAILED: source_pb.RELEASE_REASON_FAILED,
    ReleaseReason.REFUSED: source_pb.RELEASE_REASON_REFUSED,
}
_REASON_FROM_WIRE = {int(wire): reason for reason, wire in _REASON_TO_WIRE.items()}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message)


def release_reason_to_wire(reason: ReleaseReason) -> source_pb.ReleaseReason.ValueType:
    return _REASON_TO_WIRE[reason]


def release_reason_from_wire(wire: int) -> ReleaseReason:
    """A reason of a later release counts as a failure: the pins are freed."""
    return _REASON_FROM_WIRE.get(wire, ReleaseReason.FAILED)


def error_info_to_wire(info: ErrorInfo) -> pb.ErrorDetail:
    return error_to_detail(error_of(info))


def error_info_from_wire(wire: pb.ErrorDetail) -> ErrorInfo:
    return info_of(error_from_detail(wire))


def layout_to_wire(layout: KvLayout) -> pb.KvLayout:
    return pb.KvLayout(
        dtype=layout.dtype,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        block_tokens=layout.block_tokens,
        head_dim=layout.head_dim,
        tp_size=layout.tp_size,
        tp_rank=layout.tp_rank,
        hash_unit_tokens=layout.hash_unit_tokens,
        window=layout.window,
    )


def layout_from_wire(wire: pb.KvLayout) -> KvLayout:
    layout = KvLayout(
        dtype=wire.dtype,
        num_layers=wire.num_layers,
        num_kv_heads=wire.num_kv_heads,
        block_tokens=wire.block_tokens,
        head_dim=wire.head_dim,
        tp_size=wire.tp_size,
        tp_rank=wire.tp_rank,
        hash_unit_tokens=wire.hash_unit_tokens,
        window=wire.window,
    )
    try:
        layout.validate()
    except ConfigError as error:
        raise InvalidRequestError(f"malformed KV layout: {error.message}") from error
    return layout


def group_blocks_to_wire(group: GroupBlocks) -> pb.GroupBlocks:
    return pb.GroupBlocks(group=group.group, first_token=group.first_token, blocks=group.blocks, words=group.words)


def group_blocks_from_wire(wire: pb.GroupBlocks) -> GroupBlocks:
    _require(
        len(wire.blocks) == len(wire.words),
        f"group {wire.group} lists {len(wire.blocks)} blocks and {len(wire.words)} fence words; one word per block",
    )
    return GroupBlocks(wire.group, wire.first_token, tuple(wire.blocks), tuple(wire.words))


def lease_to_wire(lease: LeaseTerms) -> pb.LeaseTerms:
    return pb.LeaseTerms(
        first_follow_s=lease.first_follow_s,
        beat_s=lease.beat_s,
        missed_beats=lease.missed_beats,
        lost_grace_s=lease.lost_grace_s,
        wall_cap_s=lease.wall_cap_s,
    )


def lease_from_wire(wire: pb.LeaseTerms) -> LeaseTerms:
    durations = (wire.first_follow_s, wire.beat_s, wire.lost_grace_s, wire.wall_cap_s)
    _require(all(0.0 <= duration < float("inf") for duration in durations), "lease durations must be finite and >= 0")
    return LeaseTerms(wire.first_follow_s, wire.beat_s, wire.missed_beats, wire.lost_grace_s, wire.wall_cap_s)


def ticket_to_wire(ticket: KvTicket) -> pb.KvTicket:
    return pb.KvTicket(
        ticket_id=ticket.ticket_id,
        source=pb.WorkerRef(worker_id=ticket.source_id, address=ticket.source_address),
        engine_epoch=ticket.engine_epoch,
        attempt=core_wire.attempt_to_wire(ticket.attempt),
        model_fingerprint=ticket.model_fingerprint,
        layout=layout_to_wire(ticket.layout),
        groups=map(group_blocks_to_wire, ticket.groups),
        num_tokens=ticket.num_tokens,
        block_hashes=ticket.unit_hashes,
        lease=lease_to_wire(ticket.lease),
        hmac=ticket.mac,
        unpinned=not ticket.is_pinned,
        more_layouts=map(layout_to_wire, ticket.more_layouts),
    )


def ticket_from_wire(wire: pb.KvTicket) -> KvTicket:
    _require(bool(wire.ticket_id), "ticket_id is empty; send the ticket as prefill issued it")
    _require(bool(wire.source.address), "the ticket names no source address")
    _require(len(wire.engine_epoch) == EPOCH_BYTES, f"engine_epoch must have {EPOCH_BYTES} bytes")
    _require(len(wire.block_hashes) % HASH_BYTES == 0, f"block_hashes must be a multiple of {HASH_BYTES} bytes")
    _require(bool(wire.groups), "the ticket lists no blocks")
    return KvTicket(
        ticket_id=wire.ticket_id,
        source_id=wire.source.worker_id,
        source_address=wire.source.address,
        engine_epoch=wire.engine_epoch,
        attempt=core_wire.attempt_from_wire(wire.attempt),
        model_fingerprint=wire.model_fingerprint,
        layout=layout_from_wire(wire.layout),
        groups=tuple(map(group_blocks_from_wire, wire.groups)),
        num_tokens=wire.num_tokens,
        unit_hashes=wire.block_hashes,
        lease=lease_from_wire(wire.lease),
        mac=wire.hmac,
        is_pinned=not wire.unpinned,
        more_layouts=tuple(map(layout_from_wire, wire.more_layouts)),
    )


def offer_to_wire(offer: ConnectorOffer) -> source_pb.ConnectorOffer:
    return source_pb.ConnectorOffer(name=offer.name, endpoint=offer.endpoint)


def offer_from_wire(wire: source_pb.ConnectorOffer) -> ConnectorOffer:
    return ConnectorOffer(wire.name, wire.endpoint)


def link_to_wire(link: LinkLoad) -> worker_pb2.LinkReport:
    counts = link.counts
    return worker_pb2.LinkReport(
        peer=link.peer_id,
        connector=link.connector,
        current=link.is_current,
        probed_gb_per_s=link.probed_gb_per_s,
        probed_latency_s=link.probed_latency_s,
        floor_gb_per_s=link.floor_gb_per_s,
        below_floor=link.is_below_floor,
        reads=counts.reads,
        bytes=counts.size_bytes,
        spans=counts.spans,
        reading_s=counts.reading_s,
        mean_read_s=counts.mean_read_s,
        failed_reads=counts.failed_reads,
        stale_reads=counts.stale_reads,
        fallbacks=counts.fallbacks,
    )


def connector_to_wire(load: ConnectorLoad) -> worker_pb2.ConnectorReport:
    counts = load.counts
    return worker_pb2.ConnectorReport(
        connector=load.connector,
        reads=counts.reads,
        bytes=counts.size_bytes,
        spans=counts.spans,
        reading_s=counts.reading_s,
        mean_read_s=counts.mean_read_s,
        failed_reads=counts.failed_reads,
        stale_reads=counts.stale_reads,
        fallbacks=counts.fallbacks,
    )


def tier_to_wire(tier: TierLoad) -> worker_pb2.TierReport:
    fields = msgspec.structs.asdict(tier)
    return worker_pb2.TierReport(left_alone=fields.pop("is_left_alone"), **fields)


def load_to_wire(load: Load, *, streams: int, tasks: int, draining: bool) -> worker_pb2.WatchLoadResponse:
    return worker_pb2.WatchLoadResponse(
        requests_waiting=load.requests_waiting,
        requests_waiting_remote_kv=load.requests_waiting_remote_kv,
        requests_running=load.requests_running,
        tokens_queued=load.tokens_queued,
        blocks_total=load.blocks_total,
        blocks_in_use=load.blocks_in_use,
        blocks_cached=load.blocks_cached,
        blocks_pinned=load.blocks_pinned,
        blocks_quarantined=load.blocks_quarantined,
        leases=load.leases,
        transfers=load.transfers,
        embedding_blocks=load.embedding_blocks,
        sliding_blocks=load.sliding_blocks,
        embedding_items=load.embedding_items,
        embedding_hits=load.embedding_hits,
        embeddings_evicted=load.embeddings_evicted,
        streams=streams,
        steps=load.steps,
        draining=draining,
        handoff_bytes=load.handoff_bytes,
        handoff_s=load.handoff_s,
        stale_reads=load.stale_reads,
        expired_leases=load.expired_leases,
        prefix_blocks_pulled=load.prefix_blocks_pulled,
        tier_blocks_loaded=load.tier_blocks_loaded,
        failed_reads=load.failed_reads,
        fallbacks=load.fallbacks,
        digests_checked=load.digests_checked,
        digests_wrong=load.digests_wrong,
        links=map(link_to_wire, load.links),
        connectors=map(connector_to_wire, load.connectors),
        tiers=map(tier_to_wire, load.tiers),
        tasks=tasks,
    )

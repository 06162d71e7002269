"""What an engine says of its load: part of its messages, see `messages.py`."""

from __future__ import annotations

from msgspec import Struct


class ReadCounts(Struct, frozen=True, kw_only=True):
    """What was read from other workers over one connector. All of it only goes up."""

    reads: int = 0  # that brought their blocks
    size_bytes: int = 0  # of these
    spans: int = 0  # contiguous pieces of memory, of these
    reading_s: float = 0.0  # with at least one read under way
    mean_read_s: float = 0.0  # from posting to the poll that saw the end
    failed_reads: int = 0  # on their way; not what the source refused
    stale_reads: int = 0  # whose blocks had been reused; they are in `reads` too
    fallbacks: int = 0  # times that a pair left this connector for another


class ConnectorLoad(Struct, frozen=True, kw_only=True):
    """Since the engine's start, peers that have gone included."""

    connector: str
    counts: ReadCounts


class LinkLoad(Struct, frozen=True, kw_only=True):
    """One peer over one connector that connected, until the peer goes or starts anew."""

    peer_id: str
    connector: str
    is_current: bool  # what the next read goes over
    probed_gb_per_s: float = 0.0  # 0.0: no probe, or not over
    probed_latency_s: float = 0.0
    floor_gb_per_s: float = 0.0  # 0.0: none
    is_below_floor: bool = False
    counts: ReadCounts


class TierLoad(Struct, frozen=True, kw_only=True):
    """One tier of KV, since the engine's start; of a shared one what this engine did. Counts are of parts."""

    tier: str
    hits: int = 0
    misses: int = 0
    bad: int = 0  # damaged, truncated or foreign
    read_bytes: int = 0
    written: int = 0
    written_bytes: int = 0
    errors: int = 0  # calls that failed
    dropped: int = 0  # not stored: no room, too much waiting, or the tier is left alone
    stale: int = 0  # not stored: the block was given away meanwhile
    queued: int = 0  # now, reads and writes
    is_left_alone: bool = False  # after errors, for a while
    times_left_alone: int = 0
    parts: int = 0  # there now, as far as was asked lately
    used_bytes: int = 0
    capacity_bytes: int = 0  # 0: it bounds itself
    evicted: int = 0
    gb_per_s: float = 0.0  # of reads; 0.0: none yet


class Load(Struct, frozen=True, kw_only=True):
    """What the engine holds now. All but blocks_total, blocks_cached and the counters are 0 when idle."""

    requests_waiting: int = 0
    requests_waiting_remote_kv: int = 0
    requests_running: int = 0
    tokens_queued: int = 0
    blocks_total: int = 0
    blocks_in_use: int = 0
    blocks_cached: int = 0
    blocks_pinned: int = 0
    blocks_quarantined: int = 0
    leases: int = 0
    transfers: int = 0
    embedding_blocks: int = 0  # of prefill's pool of embeddings, held by requests
    sliding_blocks: int = 0  # in use, of layers with a window; other counts are of those without
    embedding_items: int = 0  # in an encoder's cache
    embedding_hits: int = 0
    embeddings_evicted: int = 0
    steps: int = 0
    handoff_bytes: int = 0
    handoff_s: float = 0.0
    stale_reads: int = 0
    expired_leases: int = 0
    prefix_blocks_pulled: int = 0
    tier_blocks_loaded: int = 0
    failed_reads: int = 0
    fallbacks: int = 0
    digests_checked: int = 0  # of blocks that were read
    digests_wrong: int = 0
    links: tuple[LinkLoad, ...] = ()
    connectors: tuple[ConnectorLoad, ...] = ()
    tiers: tuple[TierLoad, ...] = ()

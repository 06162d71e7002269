"""A worker's load as OpenTelemetry metrics: read off the engine's latest beat whenever they are collected.

The names and units are documented in docs/operations.md. Who collects, and how often, is `kvrelay_core.telemetry`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from kvrelay_engine.load_messages import TierLoad
from kvrelay_engine.messages import Load
from kvrelay_worker.worker import Worker


class Reading(NamedTuple):
    name: str
    unit: str
    of: Callable[[Load], float]


# What goes up and down.
GAUGES = (
    Reading("kvrelay.requests.waiting", "{request}", lambda load: load.requests_waiting),
    Reading("kvrelay.requests.waiting_remote_kv", "{request}", lambda load: load.requests_waiting_remote_kv),
    Reading("kvrelay.requests.running", "{request}", lambda load: load.requests_running),
    Reading("kvrelay.tokens.queued", "{token}", lambda load: load.tokens_queued),
    Reading("kvrelay.kv.blocks.total", "{block}", lambda load: load.blocks_total),
    Reading("kvrelay.kv.blocks.in_use", "{block}", lambda load: load.blocks_in_use),
    Reading("kvrelay.kv.blocks.cached", "{block}", lambda load: load.blocks_cached),
    Reading("kvrelay.kv.blocks.pinned", "{block}", lambda load: load.blocks_pinned),
    Reading("kvrelay.kv.pinned_share", "1", lambda load: load.blocks_pinned / max(1, load.blocks_total)),
    Reading("kvrelay.kv.blocks.quarantined", "{block}", lambda load: load.blocks_quarantined),
    Reading("kvrelay.kv.leases", "{lease}", lambda load: load.leases),
    Reading("kvrelay.kv.transfers", "{transfer}", lambda load: load.transfers),
)
# What only goes up, since the engine's start.
COUNTERS = (
    Reading("kvrelay.engine.steps", "{step}", lambda load: load.steps),
    Reading("kvrelay.kv.handoff.size", "By", lambda load: load.handoff_bytes),
    Reading("kvrelay.kv.handoff.time", "s", lambda load: load.handoff_s),
    Reading("kvrelay.kv.stale_reads", "{read}", lambda load: load.stale_reads),
    Reading("kvrelay.kv.expired_leases", "{lease}", lambda load: load.expired_leases),
    Reading("kvrelay.kv.prefix_blocks_pulled", "{block}", lambda load: load.prefix_blocks_pulled),
    Reading("kvrelay.kv.failed_reads", "{read}", lambda load: load.failed_reads),
    Reading("kvrelay.kv.fallbacks", "{fallback}", lambda load: load.fallbacks),
    Reading("kvrelay.kv.digests_checked", "{block}", lambda load: load.digests_checked),
    Reading("kvrelay.kv.digests_wrong", "{block}", lambda load: load.digests_wrong),
    Reading("kvrelay.kv.tier_blocks_loaded", "{block}", lambda load: load.tier_blocks_loaded),
)


class TierReading(NamedTuple):
    name: str
    unit: str
    of: Callable[[TierLoad], float]


# The same of each tier.
TIER_GAUGES = (
    TierReading("kvrelay.tier.parts", "{part}", lambda tier: tier.parts),
    TierReading("kvrelay.tier.used", "By", lambda tier: tier.used_bytes),
    TierReading("kvrelay.tier.capacity", "By", lambda tier: tier.capacity_bytes),
    TierReading("kvrelay.tier.queued", "{call}", lambda tier: tier.queued),
    TierReading("kvrelay.tier.left_alone", "1", lambda tier: tier.is_left_alone),
    TierReading("kvrelay.tier.read_speed", "GBy/s", lambda tier: tier.gb_per_s),
)
TIER_COUNTERS = (
    TierReading("kvrelay.tier.hits", "{part}", lambda tier: tier.hits),
    TierReading("kvrelay.tier.misses", "{part}", lambda tier: tier.misses),
    TierReading("kvrelay.tier.bad", "{part}", lambda tier: tier.bad),
    TierReading("kvrelay.tier.read", "By", lambda tier: tier.read_bytes),
    TierReading("kvrelay.tier.written", "By", lambda tier: tier.written_bytes),
    TierReading("kvrelay.tier.errors", "{call}", lambda tier: tier.errors),
    TierReading("kvrelay.tier.dropped", "{part}", lambda tier: tier.dropped),
    TierReading("kvrelay.tier.stale", "{part}", lambda tier: tier.stale),
    TierReading("kvrelay.tier.evicted", "{part}", lambda tier: tier.evicted),
)


def observe(worker: Worker) -> None:
    """Makes the instruments of a worker; they cost nothing where nobody collects."""
    meter = metrics.get_meter("kvrelay")
    for reading in GAUGES:
        meter.create_observable_gauge(reading.name, [_callback(worker, reading)], reading.unit)
    for reading in COUNTERS:
        meter.create_observable_counter(reading.name, [_callback(worker, reading)], reading.unit)
    for of_tier in TIER_GAUGES:
        meter.create_observable_gauge(of_tier.name, [_tier_callback(worker, of_tier)], of_tier.unit)
    for of_tier in TIER_COUNTERS:
        meter.create_observable_counter(of_tier.name, [_tier_callback(worker, of_tier)], of_tier.unit)


def _callback(worker: Worker, reading: Reading) -> Callable[[CallbackOptions], Iterable[Observation]]:
    attributes = {"kvrelay.role": worker.config.role}
    return lambda options: [Observation(reading.of(worker.engine.load), attributes)]


def _tier_callback(worker: Worker, reading: TierReading) -> Callable[[CallbackOptions], Iterable[Observation]]:
    role = worker.config.role
    return lambda options: [
        Observation(reading.of(tier), {"kvrelay.role": role, "kvrelay.tier": tier.tier})
        for tier in worker.engine.load.tiers
    ]

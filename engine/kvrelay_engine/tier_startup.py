"""Puts an engine's tiers together: the chain, and the cut of its KV into records."""

from __future__ import annotations

import logging
from contextlib import ExitStack

from kvrelay_core.clock import Clock
from kvrelay_engine.kv_startup import StartedKv
from kvrelay_engine.kv_tiers import KvTiers
from kvrelay_transfer.tiers.chain import TierChain
from kvrelay_transfer.tiers.kv_chunks import KvChunks
from kvrelay_transfer.tiers.kv_records import KvRecords
from kvrelay_transfer.tiers.make import kv_keys, make_kv_chain
from kvrelay_transfer.tiers.tier_config import TierConfig

logger = logging.getLogger(__name__)

# Together less than the time after which a service kills an engine that does not exit.
_DRAIN_S = 3.0
_CLOSE_S = 1.0


def build_tiers(
    config: TierConfig, kv: StartedKv, model_fingerprint: bytes, clock: Clock, stack: ExitStack
) -> KvTiers | None:
    """None where none are asked for. What is closed before the pool is entered into `stack`. Raises ConfigError."""
    if not config.is_on:
        return None
    if kv.sliding is not None:
        logger.warning("the tiers are off: this model has layers with a window, whose KV they do not keep yet")
        return None
    chunks = KvChunks.of(kv.groups[0].layout)
    chain = make_kv_chain(config, chunks, clock, is_pinned=kv.memories[0].device == "cuda")
    stack.callback(_end, chain)
    keys = kv_keys(chunks, model_fingerprint, config.codec, config.read_secret())
    logger.info("KV is kept in tiers, in chunks of %d tokens", chunks.chunk_tokens)
    return KvTiers(chain, KvRecords(kv.memories[0], chunks, keys))


def _end(chain: TierChain) -> None:
    if not chain.drain(_DRAIN_S):
        logger.warning("not all KV reached the tiers within %g s; what did not is computed again", _DRAIN_S)
    chain.close(_CLOSE_S)

"""Puts tiers together as their configuration says: the stores, fastest first, and the chain over them.

What is wrong with folders, files or sizes comes out of here as a ConfigError; a Redis that cannot be reached does not:
it may come. A library that only one store needs is imported when that store is made.
"""

from __future__ import annotations

from pathlib import Path

from kvrelay_core.clock import Clock
from kvrelay_transfer.layout import ELEMENT_BYTES
from kvrelay_transfer.tiers.chain import TierChain
from kvrelay_transfer.tiers.codec import Codec
from kvrelay_transfer.tiers.eviction import Lru
from kvrelay_transfer.tiers.host_slab import HostSlab
from kvrelay_transfer.tiers.host_store import HostStore
from kvrelay_transfer.tiers.kv_chunks import KvChunks
from kvrelay_transfer.tiers.part_key import KeyMaker
from kvrelay_transfer.tiers.part_store import PartStore
from kvrelay_transfer.tiers.s3_fifo import S3Fifo
from kvrelay_transfer.tiers.tier import Tier
from kvrelay_transfer.tiers.tier_config import TierConfig

_PASSING_BYTES = 256 << 20  # of host memory that parts only move through


def make_stores(config: TierConfig) -> list[PartStore]:
    """Those below host memory. Raises ConfigError."""
    stores: list[PartStore] = []
    if config.disk_dir:
        from kvrelay_transfer.tiers.disk_store import DiskStore

        stores.append(DiskStore(Path(config.disk_dir), config.disk_bytes))
    if config.redis_url:
        stores.append(_make_redis(config))
    return stores


def _make_redis(config: TierConfig) -> PartStore:
    from kvrelay_transfer.tiers.redis_store import RedisStore
    from kvrelay_transfer.tiers.redis_targets import parse_redis_url

    return RedisStore(parse_redis_url(config.redis_url, config.read_password()))


def make_kv_chain(config: TierConfig, chunks: KvChunks, clock: Clock, *, is_pinned: bool) -> TierChain:
    """`is_pinned`: a GPU copies to and from host memory. Raises ConfigError."""
    secret, codec = config.read_secret(), make_codec(config.codec, chunks)
    host_bytes = _PASSING_BYTES if config.host_bytes is None else config.host_bytes
    slab = HostSlab(host_bytes, max(chunks.part_bytes), is_pinned=is_pinned)
    host = HostStore(slab, Lru() if config.policy == "lru" else S3Fifo(), secret=secret)
    tiers = [Tier(store, clock) for store in make_stores(config)]
    return TierChain(host, tiers, codec=codec, secret=secret, clock=clock)


def make_codec(name: str, chunks: KvChunks) -> Codec | None:
    """Raises ConfigError where it is not for KV of this dtype."""
    if name == "none":
        return None
    if name == "zstd":
        from kvrelay_transfer.tiers.codec_zstd import ZstdCodec

        return ZstdCodec(ELEMENT_BYTES[chunks.layout.dtype])
    from kvrelay_transfer.tiers.codec_fp8 import Fp8Codec

    return Fp8Codec(chunks.layout.dtype, chunks.layout.head_dim)


def kv_keys(chunks: KvChunks, model_fingerprint: bytes, codec: str, secret: bytes) -> KeyMaker:
    """Of everything that the bytes of a chunk depend on but its tokens. The size of blocks is not among it: prefill and
    decode may share what they store and cut their pools differently."""
    layout = chunks.layout
    numbers = (
        layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.tp_size, layout.tp_rank, layout.window,
        chunks.chunk_tokens, chunks.part_layers,
    )  # fmt: skip
    names = (b"kv", model_fingerprint, layout.dtype.encode(), codec.encode())
    fields = (*names, *(str(number).encode() for number in numbers))
    return KeyMaker(fields, secret)

"""The shape of a KV pool, and whether two pools can exchange blocks.

One block is one contiguous span: `[layers, 2 (key, value), kv_heads, block_tokens, head_dim]`.
"""

from __future__ import annotations

import msgspec
from blake3 import blake3
from msgspec import Struct

from kvrelay_core.errors import ConfigError, MismatchError

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1}


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


class KvLayout(Struct, frozen=True, array_like=True):
    """Descriptor of one KV group's pool on one rank. `num_kv_heads` counts the heads of this rank."""

    dtype: str
    num_layers: int
    num_kv_heads: int
    block_tokens: int
    head_dim: int
    tp_size: int = 1
    tp_rank: int = 0
    hash_unit_tokens: int = 64

    def validate(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            raise ConfigError(f"KV dtype {self.dtype!r} is not one of {', '.join(ELEMENT_BYTES)}")
        for name in ("block_tokens", "hash_unit_tokens"):
            if not _is_power_of_two(getattr(self, name)):
                raise ConfigError(f"{name} must be a power of two, not {getattr(self, name)}")
        if min(self.num_layers, self.num_kv_heads, self.head_dim) < 1:
            raise ConfigError("num_layers, num_kv_heads and head_dim must be at least 1")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of one block: [layers, 2, kv_heads, block_tokens, head_dim]."""
        return (self.num_layers, 2, self.num_kv_heads, self.block_tokens, self.head_dim)

    @property
    def block_bytes(self) -> int:
        elements = self.num_layers * 2 * self.num_kv_heads * self.block_tokens * self.head_dim
        return elements * ELEMENT_BYTES[self.dtype]

    @property
    def hit_tokens(self) -> int:
        """Granularity of prefix hits in tokens: whole hash units and whole blocks."""
        return max(self.block_tokens, self.hash_unit_tokens)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def fingerprint(self) -> bytes:
        return blake3(msgspec.msgpack.encode(self)).digest()

    def check_compatible(self, source: KvLayout) -> None:
        """Raises MismatchError unless whole blocks of `source` can be copied into this pool as they are."""
        for name in self.__struct_fields__:
            ours, theirs = getattr(self, name), getattr(source, name)
            if ours != theirs:
                raise MismatchError(
                    f"KV layouts differ in {name}: the source has {theirs}, this pool {ours}; "
                    "start both workers with the same value",
                    field=name,
                )


def block_keys(unit_hashes: list[bytes], layout: KvLayout) -> list[bytes]:
    """One prefix-cache key for each block that full hash units cover, in order.

    A block of several units is keyed by its last unit's (chained) hash; of several blocks in one unit each is
    keyed by the unit's hash and its index. Blocks that the hashes cover only in part have no key.
    """
    if layout.block_tokens >= layout.hash_unit_tokens:
        units_per_block = layout.block_tokens // layout.hash_unit_tokens
        return unit_hashes[units_per_block - 1 :: units_per_block]
    blocks_per_unit = layout.hash_unit_tokens // layout.block_tokens
    return [unit + index.to_bytes(2, "little") for unit in unit_hashes for index in range(blocks_per_unit)]

"""The shape of a KV pool, and whether two pools can exchange blocks.

One block is one contiguous span: `[layers, 2 (key, value), kv_heads, block_tokens, head_dim]`. Two pools that hold the
same content may cut it differently, into blocks of other sizes and among other ranks (`slice_plan.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3
from msgspec import Struct

from kvrelay_core.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from kvrelay_transfer.embedding_layout import PoolLayout

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1}


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


class KvLayout(Struct, frozen=True, array_like=True, tag="kv"):
    """Descriptor of one KV group's pool on one rank. `num_kv_heads` counts the heads of this rank.

    Layers with a `window` see that many tokens, themselves included; without one (0) they see all.
    """

    dtype: str
    num_layers: int
    num_kv_heads: int
    block_tokens: int
    head_dim: int
    tp_size: int = 1
    tp_rank: int = 0
    hash_unit_tokens: int = 64
    window: int = 0

    def validate(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            raise ConfigError(f"KV dtype {self.dtype!r} is not one of {', '.join(ELEMENT_BYTES)}")
        for name in ("block_tokens", "hash_unit_tokens"):
            if not _is_power_of_two(getattr(self, name)):
                raise ConfigError(f"{name} must be a power of two, not {getattr(self, name)}")
        if min(self.num_layers, self.num_kv_heads, self.head_dim) < 1:
            raise ConfigError("num_layers, num_kv_heads and head_dim must be at least 1")
        if not 0 <= self.tp_rank < self.tp_size:
            raise ConfigError(f"there is no rank {self.tp_rank} of {self.tp_size}")
        if self.window < 0:
            raise ConfigError(f"a window has at least one token, not {self.window}")

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

    def first_block(self, num_tokens: int) -> int:
        """The first block that the token at position `num_tokens`, or any behind it, sees."""
        return max(0, num_tokens - self.window + 1) // self.block_tokens if self.window else 0

    def fingerprint(self) -> bytes:
        """Of a pool without a window it is what it was before there were any: releases share hosts."""
        fields = msgspec.structs.astuple(self)
        return blake3(msgspec.msgpack.encode(["kv", *(fields if self.window else fields[:-1])])).digest()

    def check_compatible(self, source: PoolLayout) -> None:
        """Raises MismatchError unless both hold the same content: only block size and ranks may differ."""
        if not isinstance(source, KvLayout):
            raise MismatchError("the source's pool holds embeddings, this one KV", field="layout")
        for name, remedy in _CONTENT.items():
            ours, theirs = getattr(self, name), getattr(source, name)
            if ours != theirs:
                raise MismatchError(
                    f"KV layouts differ in {name}: the source has {theirs}, this pool {ours}; "
                    f"start both workers with the same {remedy}",
                    field=name,
                )
        num_heads = self.common_heads(source)
        for layout in (self, source):
            if not layout._divides(num_heads):
                raise MismatchError(
                    f"KV layouts differ in num_kv_heads: the source has {source._heads_text}, this pool "
                    f"{self._heads_text}; start both workers with the same model",
                    field="num_kv_heads",
                )

    def needs_slices(self, source: PoolLayout) -> bool:
        """False if blocks of `source` fit into this pool as they are, both being compatible."""
        return self.shape != source.shape

    def common_heads(self, other: KvLayout) -> int:
        """KV heads of the model, as far as the two layouts tell.

        Where there are more ranks than heads, neighbouring ranks hold copies of one head; their product counts the
        copies. Of two layouts the smaller product is nearer. If both count copies it may still be too many, which
        changes nothing: each "head" is then a copy, and the ranks pair up all the same.
        """
        return min(self.num_kv_heads * self.tp_size, other.num_kv_heads * other.tp_size)

    def _divides(self, num_heads: int) -> bool:
        """Whether the ranks of this layout can share `num_heads` among them, each head as often as any other."""
        copies, rest = divmod(self.num_kv_heads * self.tp_size, num_heads)
        return rest == 0 and (copies == 1 or self.num_kv_heads == 1)

    @property
    def block_text(self) -> str:
        """What is in a block, for messages."""
        return f"{self.block_tokens} tokens of {self.num_kv_heads} KV heads"

    @property
    def _heads_text(self) -> str:
        return f"{self.num_kv_heads} on each of {self.tp_size} ranks"


def check_groups(ours: Sequence[PoolLayout], source: Sequence[PoolLayout]) -> None:
    """Raises MismatchError unless the source has the same groups as this worker, with the same content."""
    if len(ours) != len(source):
        raise MismatchError(
            f"the source has {len(source)} KV groups, this worker {len(ours)}; run one release with one model on both",
            field="layout",
        )
    for layout, theirs in zip(ours, source, strict=True):
        layout.check_compatible(theirs)


# What two workers must agree on, and where they get it from.
_CONTENT = {
    "dtype": "--dtype", "num_layers": "model", "head_dim": "model", "hash_unit_tokens": "hash unit", "window": "model"
}  # fmt: skip


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

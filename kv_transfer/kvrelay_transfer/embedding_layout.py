"""The shape of a pool of embeddings, and the union of what a pool may hold.

One block is one contiguous span: `[block_tokens, hidden]`, the rows of consecutive placeholders of one media item.
Connectors need of a layout only how many bytes a block has and whether two pools agree: KV and embeddings travel
alike.
"""

from __future__ import annotations

import msgspec
from blake3 import blake3
from msgspec import Struct

from kvrelay_core.errors import ConfigError, MismatchError
from kvrelay_transfer.layout import ELEMENT_BYTES, KvLayout

# One size for all pools of a cluster, so that blocks travel whole. 16 rows of 7,168 bytes are 112 KiB.
EMBEDDING_BLOCK_TOKENS = 16


class EmbeddingLayout(Struct, frozen=True, array_like=True, tag="embeddings"):
    """Descriptor of one pool of embeddings; `hidden_size` is the text model's."""

    dtype: str
    hidden_size: int
    block_tokens: int = EMBEDDING_BLOCK_TOKENS

    def validate(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            raise ConfigError(f"embedding dtype {self.dtype!r} is not one of {', '.join(ELEMENT_BYTES)}")
        if min(self.hidden_size, self.block_tokens) < 1:
            raise ConfigError("hidden_size and block_tokens must be at least 1")

    @property
    def shape(self) -> tuple[int, int]:
        """Of one block: [block_tokens, hidden]."""
        return (self.block_tokens, self.hidden_size)

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * ELEMENT_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * self.row_bytes

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def fingerprint(self) -> bytes:
        return blake3(msgspec.msgpack.encode(self)).digest()

    def check_compatible(self, source: PoolLayout) -> None:
        """Raises MismatchError unless the source holds rows of our size and type, cut alike."""
        if not isinstance(source, EmbeddingLayout):
            raise MismatchError("the source's pool holds KV, this one embeddings", field="layout")
        for name, remedy in (("dtype", "--dtype"), ("hidden_size", "model"), ("block_tokens", "release")):
            ours, theirs = getattr(self, name), getattr(source, name)
            if ours != theirs:
                raise MismatchError(
                    f"embeddings differ in {name}: the encoder has {theirs}, this pool {ours}; "
                    f"start both workers with the same {remedy}",
                    field=name,
                )

    def needs_slices(self, source: PoolLayout) -> bool:
        """False if blocks of `source` fit into this pool as they are, both being compatible."""
        return self.shape != source.shape

    @property
    def block_text(self) -> str:
        """What is in a block, for messages."""
        return f"{self.block_tokens} rows of {self.row_bytes} bytes"


PoolLayout = KvLayout | EmbeddingLayout

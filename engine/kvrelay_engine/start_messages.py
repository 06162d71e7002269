"""What an engine says of its start: part of its messages, see `messages.py`."""

from __future__ import annotations

from kvrelay_core.request import ErrorInfo
from kvrelay_engine.message_kinds import Event
from kvrelay_transfer.connectors.base import ConnectorOffer, PoolOffer
from kvrelay_transfer.embedding_layout import EmbeddingLayout, PoolLayout
from kvrelay_transfer.layout import check_groups


class Started(Event, frozen=True):
    """The engine is ready. First message of a start."""

    engine_epoch: bytes
    model_fingerprint: bytes
    layout: PoolLayout
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_batched_tokens: int
    vocab_size: int
    offers: tuple[ConnectorOffer, ...]
    device: str
    decode_alone_tokens: int
    staging_fd_path: str  # /proc/<engine pid>/fd/<n> of the staging ring
    staging_slots: int
    staging_slot_bytes: int
    embedding_layout: EmbeddingLayout | None = None  # of a pool that embeddings are read into
    more_pools: tuple[PoolOffer, ...] = ()  # of the KV groups behind the first

    @property
    def groups(self) -> tuple[PoolLayout, ...]:
        """Of each group that peers read here."""
        return (self.layout, *(pool.layout for pool in self.more_pools))

    @property
    def layouts(self) -> tuple[PoolLayout, ...]:
        """Of every pool here."""
        return self.groups if self.embedding_layout is None else (*self.groups, self.embedding_layout)

    def check_source(self, source: tuple[PoolLayout, ...]) -> None:
        """Raises MismatchError unless our pools can take blocks of the groups of the source."""
        if isinstance(source[0], EmbeddingLayout) and self.embedding_layout is not None:
            self.embedding_layout.check_compatible(source[0])
        else:
            check_groups(self.groups, source)


class StartFailed(Event, frozen=True):
    error: ErrorInfo

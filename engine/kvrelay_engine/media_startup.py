"""Puts the image side of a text engine together: what its model does with images, and the pool that prefill reads
embeddings into.

The pool lies in host memory whatever the device: a picture's rows are few, and go to the device with their chunk.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import ExitStack

from kvrelay_core.clock import Clock
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.embeddings.cache import EmbeddingCache
from kvrelay_engine.embeddings.reader import EmbeddingReader
from kvrelay_engine.engine_media import FIRST_EMBEDDING_READ, EngineMedia
from kvrelay_engine.handoff_fetches import EmittedFetches
from kvrelay_engine.loader import LoadedModel
from kvrelay_engine.media_traits import MediaTraits
from kvrelay_engine.messages import Event
from kvrelay_engine.model_config import ModelConfig
from kvrelay_transfer.connectors.registry import create_connectors, for_host_memory
from kvrelay_transfer.embedding_layout import EmbeddingLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging import BlockStaging
from kvrelay_transfer.staging_slots import StagingSlots


def media_traits(model: ModelConfig) -> MediaTraits | None:
    """None: the model takes no images."""
    if model.mrope is not None:
        return MediaTraits(model.hidden_size, mrope=model.mrope, max_positions=model.max_model_len)
    return MediaTraits(model.hidden_size, whole_runs=True) if model.media_see_ahead else None


def build_media(
    config: EngineConfig,
    loaded: LoadedModel,
    slots: StagingSlots,
    clock: Clock,
    emit: Callable[[Event], None],
    stack: ExitStack,
) -> EngineMedia:
    """What has to be closed at the end is entered into `stack`. Raises ConfigError."""
    traits = media_traits(loaded.config)
    if traits is None or config.role != "prefill":
        return EngineMedia(traits)
    layout = EmbeddingLayout(loaded.dtype, traits.hidden_size)
    memory = allocate_embeddings(layout, config.embedding_bytes, secrets.token_bytes(16))
    stack.callback(memory.close)
    staging = BlockStaging(memory, slots)
    stack.callback(staging.close)
    connectors = create_connectors(
        for_host_memory(config.connectors),
        memory=memory,
        run_dir=None,
        worker_id=config.worker_id,
        staging=staging,
        socket_half=EmittedFetches(emit),
        clock=clock,
        first_read_id=FIRST_EMBEDDING_READ,
    )
    for connector in connectors.values():
        stack.callback(connector.close)
    return EngineMedia(traits, EmbeddingReader(EmbeddingCache(memory, layout), connectors, clock, emit))


def allocate_embeddings(layout: EmbeddingLayout, size_bytes: int, epoch: bytes) -> PoolMemory:
    """A pool of about `size_bytes` in host memory. Raises ConfigError."""
    num_blocks = size_bytes // layout.block_bytes + 1  # the null block is never used
    return PoolMemory.allocate(layout, num_blocks, "cpu", epoch, sized_by="--embedding-mib")

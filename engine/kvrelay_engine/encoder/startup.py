"""Puts a real encoder's engine together from its configuration: tower, pool, connectors, staging ring.

The pool of embeddings lies in host memory whatever the tower's device. Everything that can be wrong with flags, files
or memory comes out of here as a ConfigError.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kvrelay_core.clock import Clock
from kvrelay_core.media.video import MediaContent
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.embeddings.cache import EmbeddingCache
from kvrelay_engine.embeddings.source import EmbeddingSource
from kvrelay_engine.encoder.decode_threads import DecodeThreads
from kvrelay_engine.encoder.engine import EncoderEngine
from kvrelay_engine.engine_identity import EngineIdentity
from kvrelay_engine.handoff_fetches import EmittedFetches
from kvrelay_engine.loader import DTYPES
from kvrelay_engine.media_startup import allocate_embeddings
from kvrelay_engine.messages import Event, Started
from kvrelay_engine.startup import device_name, make_current
from kvrelay_engine.vision.image_input import ImageInput
from kvrelay_engine.vision.loader import LoadedTower, load_tower
from kvrelay_transfer.connectors.registry import create_connectors, for_host_memory
from kvrelay_transfer.embedding_layout import EmbeddingLayout
from kvrelay_transfer.staging import TARGET_SLOT_BYTES, BlockStaging
from kvrelay_transfer.staging_slots import StagingSlots
from kvrelay_transfer.ticket import TicketSigner

_WARM_UP_SIZE = (448, 448)


@dataclass(frozen=True, slots=True)
class StartedEncoder:
    engine: EncoderEngine
    started: Started


class ModelTower:
    """Implements `encoder.tower.Tower` and `Processor` by a loaded model's tower and processor."""

    def __init__(self, loaded: LoadedTower) -> None:
        self._loaded = loaded
        self.fingerprint = loaded.fingerprint
        self.hidden_size = loaded.hidden_size
        self.dtype = loaded.dtype

    def decoding_bytes(self, data: MediaContent) -> int:
        return self._loaded.processor.decoding_bytes(data)

    def process(self, data: MediaContent) -> ImageInput:
        loaded = self._loaded
        make_current(loaded.device)  # it is one of each thread, and memory is pinned for it
        return loaded.processor.process(data).staged_for(loaded.device, DTYPES[loaded.dtype])

    def warm_up(self) -> None:
        """Makes the first image as fast as the later ones; nothing of it is left."""
        blank = BytesIO()
        Image.new("RGB", _WARM_UP_SIZE).save(blank, "PNG")
        self.encode([self.process(blank.getvalue())])

    def encode(self, inputs: Sequence[ImageInput]) -> list[Tensor]:
        """On the host already: what is asynchronous on a device has ended."""
        rows = self._loaded.tower.encode(inputs)
        if self._loaded.device.type == "cpu":
            return rows
        on_host = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in rows]
        for one, copy in zip(rows, on_host, strict=True):
            copy.copy_(one, non_blocking=True)
        torch.cuda.current_stream(self._loaded.device).synchronize()
        return on_host


def _load_tower(config: EngineConfig) -> ModelTower:
    make_current(torch.device(config.device))
    tower = ModelTower(load_tower(config.model, config.dtype, config.device))
    if config.device != "cpu":  # there libraries start and kernels are chosen; here it would only cost a large image
        tower.warm_up()
    return tower


def build_encoder(
    config: EngineConfig,
    clock: Clock,
    emit: Callable[[Event], None],
    stack: ExitStack,
    computing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StartedEncoder:
    """What has to be closed at the end is entered into `stack`. Raises ConfigError."""
    torch.set_num_threads(config.num_threads)
    Path(config.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
    tower = _load_tower(config)
    layout = EmbeddingLayout(tower.dtype, tower.hidden_size)
    epoch = secrets.token_bytes(16)
    memory = allocate_embeddings(layout, config.embedding_bytes, epoch)
    stack.callback(memory.close)
    slot_bytes = max(1, TARGET_SLOT_BYTES // layout.block_bytes) * layout.block_bytes
    slots = StagingSlots.create(config.staging_slots, slot_bytes)
    stack.callback(slots.close)
    staging = BlockStaging(memory, slots)
    stack.callback(staging.close)
    connectors = create_connectors(
        for_host_memory(config.connectors),
        memory=memory,
        run_dir=Path(config.run_dir),
        worker_id=config.worker_id,
        staging=staging,
        socket_half=EmittedFetches(emit),
        clock=clock,
    )
    for connector in connectors.values():
        stack.callback(connector.close)
    cache = EmbeddingCache(memory, layout)
    identity = EngineIdentity(config.worker_id, config.address, epoch, tower.fingerprint)
    signer = TicketSigner(secrets.token_bytes(32), epoch)
    source = EmbeddingSource(
        cache, identity, signer, config.lease, clock, emit, staging=staging, connectors=connectors.values()
    )
    decoder = DecodeThreads(tower, config.num_decode_threads, config.decoded_bytes)
    stack.callback(decoder.close)
    engine = EncoderEngine(config, tower, cache, source, decoder, clock, emit, computing)
    offers = (connector.offer() for connector in connectors.values())
    started = Started(
        engine_epoch=epoch,
        model_fingerprint=tower.fingerprint,
        layout=layout,
        num_blocks=memory.num_blocks,
        max_model_len=0,  # an encoder has no tokens, nor sequences of them
        max_num_seqs=0,
        max_batched_tokens=0,
        vocab_size=0,
        offers=tuple(offer for offer in offers if offer is not None),
        device=device_name(config.device),
        decode_alone_tokens=0,
        staging_fd_path=slots.fd_path,
        staging_slots=slots.num_slots,
        staging_slot_bytes=slots.slot_bytes,
    )
    return StartedEncoder(engine, started)

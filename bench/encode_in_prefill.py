"""Prefill whose engine computes the vision tower itself, between its steps: what an encoder is compared with.

The relay has no such mode. Here the encoder worker only hands images on, and rows that nobody uses; prefill decodes an
image on a thread while its tickets are on their way, computes the tower in its step loop when an encoder's rows would
have been there, and keeps the rows on its device. So the two arrangements differ by where the tower is computed, and
by nothing else: the same processes, requests and hops. KVRELAY_BENCH_MEDIA names a folder for the images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvrelay_core.checkpoint import resolve_model
from kvrelay_core.media.image_header import read_image_header
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.processor_config import QwenProcessorConfig, read_processor_config
from kvrelay_core.media.qwen_vision import image_grid, num_tokens
from kvrelay_core.request import MediaReference
from kvrelay_engine import media_startup
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.embeddings.pull import EmbeddingPull
from kvrelay_engine.embeddings.reader import EmbeddingReader
from kvrelay_engine.encoder import startup
from kvrelay_engine.encoder.engine import EncoderEngine
from kvrelay_engine.encoder_messages import EncodeItem
from kvrelay_engine.vision.image_input import ImageInput
from kvrelay_engine.vision.loader import LoadedTower, load_tower
from kvrelay_transfer.ticket import EmbeddingTicket

MEDIA_FOLDER = "KVRELAY_BENCH_MEDIA"


class NoTower:
    """As many rows as the tower would make, of nothing."""

    def __init__(self, model: str, loaded: LoadedTower) -> None:
        config = read_processor_config(resolve_model(model))
        assert isinstance(config, QwenProcessorConfig), "only Qwen2.5-VL's images are counted here"
        self._config = config
        self.fingerprint = loaded.fingerprint
        self.hidden_size = loaded.hidden_size
        self.dtype = loaded.dtype

    def warm_up(self) -> None:
        pass

    def decoding_bytes(self, data: bytes) -> int:
        return 0

    def process(self, data: bytes) -> ImageInput:
        header = read_image_header(data, MediaLimits())
        grid = image_grid(header.width, header.height, self._config)
        return ImageInput(torch.empty(0), grid, grid[1] * grid[2], num_tokens(grid, self._config))

    def encode(self, inputs: Sequence[ImageInput]) -> list[Tensor]:
        return [torch.zeros(image.num_tokens, self.hidden_size) for image in inputs]


def hand_images_on(model: str, folder: Path) -> None:
    """The encoder's part."""
    take = EncoderEngine._take

    def keep_and_take(engine: EncoderEngine, command: EncodeItem) -> None:
        assert isinstance(command.data, bytes), "the bench sends images only"
        (folder / command.content_hash.hex()).write_bytes(command.data)
        take(engine, command)

    patched: Any = EncoderEngine
    patched._take = keep_and_take
    patched = startup
    patched.ModelTower = partial(NoTower, model)


class EncodingReader(EmbeddingReader):
    """Prefill's part: rows of its own in the place of those that it was sent."""

    def __init__(self, loaded: LoadedTower, folder: Path, *args: Any) -> None:
        super().__init__(*args)
        self._tower = startup.ModelTower(loaded)
        self._compute = loaded.tower.encode
        self._folder = folder
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decode-image")
        self._decoded: dict[bytes, Future[ImageInput]] = {}
        self._rows: dict[bytes, Tensor] = {}

    def rows(self, request_id: int, reference: MediaReference, first: int, count: int) -> Tensor:
        start = reference.first_row + first
        return self._rows[reference.content_hash][start : start + count]

    def _begin(self, ticket: EmbeddingTicket) -> None:
        super()._begin(ticket)
        data = (self._folder / ticket.content_hash.hex()).read_bytes()
        self._decoded[ticket.content_hash] = self._decoders.submit(self._tower.process, data)

    def _check(self, pull: EmbeddingPull) -> None:
        if self._decoded[pull.ticket.content_hash].done():
            super()._check(pull)

    def _finish(self, content_hash: bytes, pull: EmbeddingPull) -> None:
        [self._rows[content_hash]] = self._compute([self._decoded.pop(content_hash).result()])
        super()._finish(content_hash, pull)

    def close(self) -> None:
        super().close()
        self._decoders.shutdown()


def change(config: EngineConfig) -> None:
    folder = Path(os.environ[MEDIA_FOLDER])
    if config.role == "encoder":
        hand_images_on(config.model, folder)
    elif config.role == "prefill":
        patched: Any = media_startup
        # Not loaded before it is asked for: the engine then has chosen its GPU and its threads.
        patched.EmbeddingReader = lambda *args: EncodingReader(
            load_tower(config.model, config.dtype, config.device), folder, *args
        )

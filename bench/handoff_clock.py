"""Notes when an image's embedding gets where, from the encoder's device to prefill.

Each engine writes lines of `HASH STAGE SECONDS` into its run directory, on a clock that all processes share:

    computed    the tower has computed it, on its device
    published   it lies in the encoder's pool, and its ticket is about to be sent
    asked       prefill's engine has the ticket and begins to pull
    copied      all rows are in prefill's pool, their words verified
    usable      the encoder has found the ticket its own: a chunk may cover the image
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from kvrelay_engine.config import EngineConfig
from kvrelay_engine.embeddings.pull import EmbeddingPull
from kvrelay_engine.embeddings.reader import EmbeddingReader
from kvrelay_engine.encoder import startup
from kvrelay_engine.encoder.engine import EncoderEngine
from kvrelay_engine.vision.image_input import ImageInput
from kvrelay_engine.vision.loader import LoadedTower, load_tower
from kvrelay_transfer.ticket import EmbeddingTicket

FILE_NAME = "handoff_clock"
STAGES = ("computed", "published", "asked", "copied", "usable")


class Clock:
    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._computed_s = 0.0

    def note(self, content_hash: bytes, stage: str, at_s: float | None = None) -> None:
        self._log.write(f"{content_hash.hex()} {stage} {time.monotonic() if at_s is None else at_s}\n")

    def time_encoder(self) -> None:
        answer = EncoderEngine._answer

        def load_timed(*args: Any) -> LoadedTower:
            loaded = load_tower(*args)
            tower: Any = loaded.tower
            tower.encode = self._timed(tower.encode, loaded.device)
            return loaded

        def answer_timed(engine: EncoderEngine, job: Any, item: Any) -> None:
            self.note(job.content_hash, "computed", self._computed_s)
            self.note(job.content_hash, "published")
            answer(engine, job, item)

        patched: Any = startup
        patched.load_tower = load_timed
        patched = EncoderEngine
        patched._answer = answer_timed

    def _timed(
        self, encode: Callable[[Sequence[ImageInput]], list[Tensor]], device: torch.device
    ) -> Callable[[Sequence[ImageInput]], list[Tensor]]:
        def timed(images: Sequence[ImageInput]) -> list[Tensor]:
            rows = encode(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self._computed_s = time.monotonic()
            return rows

        return timed

    def time_reader(self) -> None:
        begin, check, finish = EmbeddingReader._begin, EmbeddingReader._check, EmbeddingReader._finish

        def begin_timed(reader: EmbeddingReader, ticket: EmbeddingTicket) -> None:
            self.note(ticket.content_hash, "asked")
            begin(reader, ticket)

        def check_timed(reader: EmbeddingReader, pull: EmbeddingPull) -> None:
            self.note(pull.ticket.content_hash, "copied")
            check(reader, pull)

        def finish_timed(reader: EmbeddingReader, content_hash: bytes, pull: EmbeddingPull) -> None:
            finish(reader, content_hash, pull)
            self.note(content_hash, "usable")

        patched: Any = EmbeddingReader
        patched._begin, patched._check, patched._finish = begin_timed, check_timed, finish_timed


def change(config: EngineConfig) -> None:
    if config.role == "decode":
        return
    log = Path(config.run_dir, FILE_NAME).open("w", buffering=1)  # noqa: SIM115  (as long as the engine lives)
    clock = Clock(log)
    if config.role == "encoder":
        clock.time_encoder()
    else:
        clock.time_reader()


def read_stages(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of each stage, by hash, of the items that went through all; of the engines that run below `folder`."""
    found: dict[str, dict[str, float]] = {}
    for path in folder.rglob(FILE_NAME):
        for line in path.read_text().splitlines():
            content_hash, stage, at_s = line.split()
            found.setdefault(content_hash, {})[stage] = float(at_s)
    return {name: stages for name, stages in found.items() if len(stages) == len(STAGES)}

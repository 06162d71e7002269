"""An engine in the test's own process: records commands, and says what the test lets it say.

It answers nothing by itself except GetLoad, so that a test decides the order of everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from kvrelay_core.errors import WorkerLostError
from kvrelay_engine import messages
from kvrelay_engine.config import EngineConfig
from kvrelay_transfer.connectors.base import ConnectorOffer
from kvrelay_transfer.embedding_layout import EmbeddingLayout, PoolLayout
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.staging_slots import StagingSlots
from kvrelay_worker.engine_link import EngineLink

C = TypeVar("C", bound=messages.Command)

LAYOUT = KvLayout(dtype="float32", num_layers=1, num_kv_heads=1, block_tokens=4, head_dim=8, hash_unit_tokens=4)
WAIT_S = 5.0


class FakeEngine(EngineLink):
    def __init__(self, *, epoch: bytes = b"e" * 16, layout: PoolLayout = LAYOUT, num_slots: int = 4) -> None:
        """Each staging slot holds two blocks."""
        super().__init__()
        self.epoch = epoch
        self.layout = layout
        self.num_slots = num_slots
        self.sent: list[messages.EngineCommand] = []
        self.embedding_layout: EmbeddingLayout | None = None
        self.reply_load = messages.Load(blocks_total=9)
        self.config: EngineConfig | None = None
        self.staging: StagingSlots | None = None
        self._unread: list[messages.EngineCommand] = []
        self._arrived = asyncio.Event()

    # ------------------------------------------------------------------------------------------ EngineLink

    async def start(self, make_config: Callable[[str, str], EngineConfig], timeout_s: float) -> messages.Started:
        self.config = make_config("ipc:///commands", "ipc:///events")
        self.staging = StagingSlots.create(self.num_slots, 2 * self.layout.block_bytes)
        self.dispatch(self.make_started())
        return self.started

    async def stop(self) -> None:
        if self.staging is not None:
            self.staging.close()
            self.staging = None

    def send(self, command: messages.EngineCommand) -> None:
        if self.loss is not None:
            raise self.loss
        self.sent.append(command)
        self._unread.append(command)
        self._arrived.set()
        if isinstance(command, messages.GetLoad):
            self.dispatch(messages.LoadReply(command.call, self.reply_load))

    # ------------------------------------------------------------------------------------------- for tests

    def make_started(self) -> messages.Started:
        assert self.staging is not None
        return messages.Started(
            engine_epoch=self.epoch,
            model_fingerprint=b"model",
            layout=self.layout,
            num_blocks=10,
            max_model_len=64,
            max_num_seqs=4,
            max_batched_tokens=16,
            vocab_size=100,
            offers=(ConnectorOffer("grpc", b""),),
            device="cpu",
            decode_alone_tokens=8,
            staging_fd_path=self.staging.fd_path,
            staging_slots=self.num_slots,
            staging_slot_bytes=self.staging.slot_bytes,
            embedding_layout=self.embedding_layout,
        )

    async def expect(self, command_type: type[C]) -> C:
        """The next command of this type that was not yet expected; AssertionError when none comes in 5 s."""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    for command in self._unread:
                        if isinstance(command, command_type):
                            self._unread.remove(command)
                            return command
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError as error:
            raise AssertionError(f"no {command_type.__name__} came; unread: {self._unread}") from error

    def sent_of(self, command_type: type[C]) -> list[C]:
        return [command for command in self.sent if isinstance(command, command_type)]

    def beat(self, load: messages.Load | None = None, **pulled: int) -> None:
        """`pulled` maps `r<id>` to the blocks pulled for that request."""
        counts = {int(name[1:]): count for name, count in pulled.items()}
        self.dispatch(messages.Beat(load or messages.Load(), counts, bool(self.sent_of(messages.Drain))))

    def die(self) -> None:
        self.declare_lost(WorkerLostError("the engine process exited with code 1"))

"""An encoder's engine in the test's own process, with a tower that can be followed by eye.

An item's bytes are its "pixels": the fake processor makes one token of each byte, the fake tower fills that token's row
with the byte's value times its column. What begins with `bad` is no image.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from blake3 import blake3
from engine_rig import make_config
from torch import Tensor

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.video import MediaContent, count_bytes
from kvrelay_engine import messages
from kvrelay_engine.embeddings.cache import EmbeddingCache
from kvrelay_engine.embeddings.source import EmbeddingSource
from kvrelay_engine.encoder.decoding import Decoding
from kvrelay_engine.encoder.engine import EncoderEngine
from kvrelay_engine.encoder_messages import EncodeItem, ItemEncoded
from kvrelay_engine.engine_identity import EngineIdentity
from kvrelay_transfer.connectors.base import Connector, PeerInfo
from kvrelay_transfer.connectors.memory import MemoryConnector, MemoryFabric
from kvrelay_transfer.embedding_layout import EmbeddingLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging import BlockStaging
from kvrelay_transfer.staging_slots import StagingSlots
from kvrelay_transfer.ticket import EmbeddingTicket, TicketSigner

ADDRESS = "encoder:1"
FINGERPRINT = b"fake tower".ljust(32, b".")
HIDDEN = 8
LAYOUT = EmbeddingLayout("float32", HIDDEN, 4)

E = TypeVar("E", bound=messages.Event)


def hash_of(data: bytes) -> bytes:
    return blake3(data).digest()


def rows_of(data: bytes) -> Tensor:
    """What the fake tower makes of an item: [num_tokens, HIDDEN]."""
    values = torch.tensor(list(data), dtype=torch.float32)
    return values[:, None] * torch.arange(1, HIDDEN + 1)


@dataclass(frozen=True)
class FakeInput:
    data: bytes

    @property
    def num_patches(self) -> int:
        return 4 * len(self.data)

    @property
    def num_tokens(self) -> int:
        return len(self.data)

    @property
    def num_bytes(self) -> int:
        return 100 * len(self.data)


class FakeTower:
    fingerprint = FINGERPRINT
    hidden_size = HIDDEN
    dtype = "float32"

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.poison: bytes | None = None

    def decoding_bytes(self, data: MediaContent) -> int:
        return 10 * count_bytes(data)

    def process(self, data: MediaContent) -> FakeInput:
        assert isinstance(data, bytes)
        if data.startswith(b"bad"):
            raise InvalidRequestError("this is no image")
        return FakeInput(data)

    def encode(self, inputs: Sequence[FakeInput]) -> list[Tensor]:
        self.batches.append([one.data for one in inputs])
        if self.poison in self.batches[-1]:
            raise RuntimeError("the tower broke")
        return [rows_of(one.data) for one in inputs]


class FakeDecoder:
    """Has decoded an item when it is asked, unless the item is one of `held`."""

    def __init__(self, tower: FakeTower) -> None:
        self._tower = tower
        self.held: set[bytes] = set()
        self.submitted: list[Decoding[FakeInput]] = []  # and not ended

    @property
    def is_idle(self) -> bool:
        return not self.submitted

    def submit(self, data: MediaContent) -> Decoding[FakeInput]:
        self.submitted.append(Decoding(data))
        return self.submitted[-1]

    def take_finished(self) -> list[Decoding[FakeInput]]:
        finished = [one for one in self.submitted if not one.is_running and one.data not in self.held]
        for one in finished:
            one.is_running = True  # it is not taken twice
            try:
                one.result = self._tower.process(one.data)
            except Exception as error:
                one.error = error
        return finished

    def end(self, decoding: Decoding[FakeInput]) -> None:
        self.submitted.remove(decoding)

    def close(self) -> None:
        assert not self.submitted


class EncoderRig:
    def __init__(
        self,
        *,
        num_blocks: int = 40,
        clock: ManualClock | None = None,
        fabric: MemoryFabric | None = None,
        **changes: object,
    ) -> None:
        config = make_config("encoder", address=ADDRESS, **changes)
        self.clock = clock or ManualClock()
        self.tower = FakeTower()
        self.events: list[messages.Event] = []
        self.epoch = secrets.token_bytes(16)
        self.memory = PoolMemory.allocate(LAYOUT, num_blocks, "cpu", self.epoch)
        self.slots = StagingSlots.create(2, 4 * LAYOUT.block_bytes)
        self.staging = BlockStaging(self.memory, self.slots)
        self.cache = EmbeddingCache(self.memory, LAYOUT)
        self.connector = MemoryConnector(fabric or MemoryFabric(), self.memory, self.clock)
        self.source = EmbeddingSource(
            self.cache, EngineIdentity("encoder-0", ADDRESS, self.epoch, FINGERPRINT),
            TicketSigner(secrets.token_bytes(32), self.epoch), config.lease, self.clock, self.events.append,
            staging=self.staging,
        )  # fmt: skip
        self.decoder = FakeDecoder(self.tower)
        self.engine = EncoderEngine(
            config, self.tower, self.cache, self.source, self.decoder, self.clock, self.events.append
        )

    def ask(self, request_id: int, data: bytes) -> None:
        self.engine.handle(EncodeItem(request_id, hash_of(data), data))

    def encode(self, data: bytes, request_id: int = 1) -> EmbeddingTicket:
        """Asks for an item and runs until it is there."""
        self.events.clear()
        self.ask(request_id, data)
        self.run()
        ticket = self.answer(request_id).ticket
        assert ticket is not None
        return ticket

    def run(self) -> None:
        while self.engine.step():
            pass

    def answer(self, request_id: int) -> ItemEncoded:
        (event,) = [event for event in self.events if isinstance(event, ItemEncoded) and event.id == request_id]
        return event

    def error(self, request_id: int) -> str:
        error = self.answer(request_id).error
        assert error is not None
        return error.reason

    def release(self, ticket: EmbeddingTicket) -> bool:
        return self.answer_release(ticket).released

    def answer_release(self, ticket: EmbeddingTicket) -> messages.Released:
        self.engine.handle(messages.ReleaseTicket(1, ticket))
        event = self.events.pop()
        assert isinstance(event, messages.Released)
        return event

    def take_events(self) -> list[messages.Event]:
        taken = list(self.events)
        self.events.clear()
        return taken

    def overwrite(self, block: int) -> None:
        """As if the block had been given to another item."""
        self.memory.words.bump(block)
        self.memory.block_rows[block] = 99

    def peer(self, connector: Connector | None = None) -> PeerInfo:
        offer = (connector or self.connector).offer()
        assert offer is not None
        return PeerInfo(ADDRESS, self.epoch, FINGERPRINT, LAYOUT, (offer,))

    def check(self) -> messages.Load:
        """The counts fit together."""
        self.engine.handle(messages.GetLoad(0, check_integrity=True))
        reply = self.events.pop()
        assert isinstance(reply, messages.LoadReply)
        assert reply.error is None, reply.error
        return reply.load

    def check_empty(self) -> None:
        """Nobody holds a block, nothing waits."""
        load = self.check()
        assert (load.requests_waiting, load.leases, load.blocks_in_use, load.blocks_pinned) == (0, 0, 0, 0)
        assert self.engine.is_idle

    def close(self) -> None:
        self.engine.close()
        self.decoder.close()
        self.cache.check_integrity(Counter())
        self.connector.close()
        self.staging.close()
        self.slots.close()
        self.memory.close()

"""An encoder's engine and a prefill engine that reads its embeddings, in the test's process."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from encoder_rig import HIDDEN, LAYOUT, EncoderRig, hash_of
from engine_rig import STEP_S, EngineRig, attempt_of, make_generation
from fake_runner import continuation
from msgspec.structs import replace

from kvrelay_core.clock import ManualClock
from kvrelay_core.request import Generation, MediaReference
from kvrelay_engine import messages
from kvrelay_engine.embedding_messages import EmbeddingCheck, EmbeddingChecked, EmbeddingRelease
from kvrelay_engine.embeddings.cache import EmbeddingCache
from kvrelay_engine.embeddings.reader import EmbeddingReader
from kvrelay_engine.engine_media import EngineMedia
from kvrelay_engine.media_traits import MediaTraits
from kvrelay_transfer.connectors.memory import MemoryConnector, MemoryFabric
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.ticket import EmbeddingTicket

PLACEHOLDER = 96


def prompt_of(*parts: int | bytes) -> tuple[list[int], tuple[MediaReference, ...], list[int]]:
    """Text of so many tokens, or a picture: tokens, references, and the context as the fake model sees it."""
    tokens: list[int] = []
    seen: list[int] = []
    media = []
    for part in parts:
        if isinstance(part, bytes):
            media.append(MediaReference(hash_of(part), len(tokens), len(part)))
            tokens += [PLACEHOLDER] * len(part)
            seen += part
        else:
            text = [(len(tokens) + index) % 50 for index in range(part)]
            tokens += text
            seen += text
    return tokens, tuple(media), seen


def generation_of(*parts: int | bytes, **options: Any) -> Generation:
    tokens, media, _ = prompt_of(*parts)
    return replace(make_generation(tokens, **options), media=media)


def first_token_of(*parts: int | bytes) -> int:
    """The right answer."""
    return continuation(prompt_of(*parts)[2], 1)[0]


class ReaderSide:
    """A prefill engine's pool of embeddings, and what reads into it."""

    def __init__(
        self,
        clock: ManualClock,
        fabric: MemoryFabric,
        emit: Callable[[messages.Event], None],
        *,
        num_blocks: int = 40,
        whole_runs: bool = False,
    ) -> None:
        self.memory = PoolMemory.allocate(LAYOUT, num_blocks, "cpu", secrets.token_bytes(16))
        self.connector = MemoryConnector(fabric, self.memory, clock, deadline_s=60.0)
        self.cache = EmbeddingCache(self.memory, LAYOUT)
        self.reader = EmbeddingReader(self.cache, {"memory": self.connector}, clock, emit)
        self.media = EngineMedia(MediaTraits(HIDDEN, whole_runs=whole_runs), self.reader)

    def close(self) -> None:
        self.connector.close()
        self.memory.close()


def pass_on_tickets(events: list[messages.Event], encoder: EncoderRig, reader: EmbeddingReader) -> None:
    """Does what the prefill service does with what a reader said of tickets, and takes it out of `events`."""
    for event in [one for one in events if isinstance(one, EmbeddingRelease | EmbeddingCheck)]:
        events.remove(event)
        error = encoder.answer_release(event.ticket).error
        if isinstance(event, EmbeddingCheck):
            reader.handle(EmbeddingChecked(event.ticket.ticket_id, error))


class MediaPair:
    def __init__(self, *, num_blocks: int = 40, whole_runs: bool = False, **prefill: Any) -> None:
        self.clock = ManualClock()
        self.fabric = MemoryFabric()
        self.encoder = EncoderRig(clock=self.clock, fabric=self.fabric)
        self.side = ReaderSide(
            self.clock, self.fabric, lambda event: self.prefill.events.append(event),
            num_blocks=num_blocks, whole_runs=whole_runs,
        )  # fmt: skip
        self.memory, self.cache, self.reader = self.side.memory, self.side.cache, self.side.reader
        self.prefill = EngineRig("prefill", clock=self.clock, fabric=self.fabric, media=self.side.media, **prefill)
        self.connect()

    def connect(self) -> None:
        self.prefill.engine.handle(messages.ConnectPeer(self.encoder.peer()))

    def tickets(self, *parts: int | bytes) -> tuple[EmbeddingTicket, ...]:
        return tuple(self.encoder.encode(part) for part in dict.fromkeys(parts) if isinstance(part, bytes))

    def start(self, request_id: int, *parts: int | bytes, tickets: tuple[EmbeddingTicket, ...] | None = None) -> None:
        found = self.tickets(*parts) if tickets is None else tickets
        generation = generation_of(*parts)
        command = messages.Prefill(request_id, attempt_of(request_id), generation, False, None, found)
        self.prefill.engine.handle(command)

    def turn(self) -> None:
        """One step, then what it said of tickets is passed on. Reads stay where they are."""
        self.clock.advance(STEP_S)
        self.prefill.engine.step()
        self.pass_on()

    def pass_on(self) -> None:
        pass_on_tickets(self.prefill.events, self.encoder, self.reader)

    def run(self, max_turns: int = 200) -> None:
        """Until all requests are over."""
        for _ in range(max_turns):
            self.turn()
            self.fabric.land_all()
            if not self.prefill.engine.has_requests:
                self.pass_on()
                return
        raise AssertionError("still busy")

    def first_token(self, request_id: int) -> int:
        (event,) = [event for event in self.prefill.of(messages.PrefillFinished) if event.id == request_id]
        return event.first_tokens[0].token_id

    def check_empty(self) -> None:
        """Nothing is held on either side."""
        self.prefill.check_empty()
        assert self.reader.num_requests == self.reader.num_transfers == self.cache.pool.num_in_use == 0
        self.encoder.check_empty()

    def close(self) -> None:
        self.prefill.close()
        self.fabric.land_all()
        self.side.close()
        self.encoder.close()

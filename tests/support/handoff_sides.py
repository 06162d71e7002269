"""Two small engines' memories, pools and hand-off parts, wired by hand: what tests of the hand-off start from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from kvrelay_core.clock import ManualClock
from kvrelay_core.hashing import root_hash
from kvrelay_core.request import AttemptId, ChoiceState, FirstToken, Generation, MediaReference, SamplingParams
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.engine_identity import EngineIdentity
from kvrelay_engine.handoff_source import HandoffSource
from kvrelay_engine.messages import Event
from kvrelay_engine.sequence import EngineRequest, HashChain, Sequence
from kvrelay_transfer.block_digest import BlockDigester
from kvrelay_transfer.connectors.base import ConnectorOffer, PeerInfo
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging import BlockStaging, slot_bytes_for
from kvrelay_transfer.staging_slots import StagingSlots
from kvrelay_transfer.ticket import KvTicket, LeaseTerms, TicketSigner

torch.set_num_threads(1)

LAYOUT = KvLayout("float32", num_layers=2, num_kv_heads=2, block_tokens=4, head_dim=8, hash_unit_tokens=8)
MODEL = b"model fingerprint".ljust(32, b".")
ADDRESS = "prefill:1"


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Gives the processor away until `condition` holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        os.sched_yield()


def make_memory(num_blocks: int = 32, layout: KvLayout = LAYOUT, device: str = "cpu") -> PoolMemory:
    return PoolMemory.allocate(layout, num_blocks, device, os.urandom(16))


def fill_block(memory: PoolMemory, block: int, seed: int) -> None:
    """Random bytes that depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (memory.layout.block_bytes,), generator=generator).to(torch.uint8)
    memory.block_rows[block] = data.to(memory.tensor.device)


def make_sequence(
    tokens: list[int],
    request_id: int = 1,
    num_choices: int = 1,
    layout: KvLayout = LAYOUT,
    media: tuple[MediaReference, ...] = (),
) -> Sequence:
    choices = tuple(ChoiceState(index) for index in range(num_choices))
    generation = Generation(prompt=tuple(tokens), sampling=SamplingParams(), seed=0, choices=choices, media=media)
    request = EngineRequest(request_id, AttemptId("router", f"request-{request_id}", 1), generation, True, 0.0)
    sequence = Sequence(request, 0, list(tokens), HashChain(root_hash(MODEL), layout, media))
    request.sequences.append(sequence)
    return sequence


def first_tokens(num_choices: int = 1) -> tuple[FirstToken, ...]:
    return tuple(FirstToken(choice, 0, 100 + choice) for choice in range(num_choices))


class SourceSide:
    """A prefill engine without the engine: `prefill` does in one call what its steps would do."""

    def __init__(
        self,
        clock: ManualClock,
        num_blocks: int = 32,
        *,
        layout: KvLayout = LAYOUT,
        terms: LeaseTerms | None = None,
        max_pinned_share: float = 0.8,
        num_slots: int = 4,
        device: str = "cpu",
        digest_share: float = 0.0,
    ) -> None:
        self.layout = layout
        self.memory = make_memory(num_blocks, layout, device)
        self.pool = BlockPool(num_blocks, self.memory.words)
        self.events: list[Event] = []
        self.identity = EngineIdentity("prefill-0", ADDRESS, self.memory.engine_epoch, MODEL)
        self.signer = TicketSigner(os.urandom(32), self.memory.engine_epoch)
        self.slots = StagingSlots.create(num_slots, slot_bytes_for(layout))
        self.staging = BlockStaging(self.memory, self.slots)
        self.source = HandoffSource(
            self.pool,
            layout,
            self.identity,
            self.signer,
            terms or LeaseTerms(),
            max_pinned_share,
            clock,
            self.events.append,
            staging=self.staging,
            digester=BlockDigester(self.memory, digest_share),
        )

    def take_events(self) -> list[Event]:
        taken = list(self.events)
        self.events.clear()
        return taken

    def accept(self, sequence: Sequence) -> KvTicket:
        """Reserves, fills every block with bytes of its own, and issues the ticket."""
        sequence.blocks = self.pool.reserve(self.layout.blocks_for(len(sequence.tokens)))
        for block in sequence.blocks:
            fill_block(self.memory, block, seed=1000 + block)
        return self.source.accept(sequence)

    def prefill(self, sequence: Sequence, num_choices: int = 1) -> KvTicket:
        """Accepted, sealed and finished; the request itself is over, its ticket alone holds the blocks."""
        ticket = self.accept(sequence)
        self.source.finished(sequence, first_tokens(num_choices))
        self.pool.release(sequence.blocks)
        return ticket

    def overwrite(self, block: int) -> None:
        """What happens when a block is given to another request."""
        self.memory.words.bump(block)
        fill_block(self.memory, block, seed=77777 + block)

    def peer(self, *offers: ConnectorOffer) -> PeerInfo:
        return PeerInfo(ADDRESS, self.memory.engine_epoch, MODEL, self.layout, offers)

    def close(self) -> None:
        self.staging.close()
        self.slots.close()
        self.memory.close()

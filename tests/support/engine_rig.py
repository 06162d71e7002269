"""Whole engines in the test's own process: a fake model, a manual clock, and a relay that stands for the services.

`EngineRig` is one engine with everything it emitted. `EnginePair` is a prefill and a decode engine; its `pump`
turns the events of each into the commands that the services would send to the other.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from fake_runner import VOCAB_SIZE, FakeRunner, fake_layout

from kvrelay_core.clock import ManualClock
from kvrelay_core.request import NO_SLO, AttemptId, ChoiceState, FinishReason, Generation, SamplingParams, Slo
from kvrelay_engine import messages
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.engine import Engine
from kvrelay_engine.engine_identity import EngineIdentity
from kvrelay_engine.engine_media import EngineMedia
from kvrelay_engine.engine_parts import EngineParts
from kvrelay_engine.kv_group import KvGroup
from kvrelay_engine.kv_tiers import KvTiers
from kvrelay_transfer.connectors.base import PeerInfo, PoolOffer
from kvrelay_transfer.connectors.memory import MemoryConnector, MemoryFabric
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.ticket import KvTicket, TicketSigner

FINGERPRINT = b"fake model".ljust(32, b".")
STEP_S = 0.001  # that the clock advances with each step

E = TypeVar("E", bound=messages.Event)


def make_config(role: str = "decode", **changes: Any) -> EngineConfig:
    settings: dict[str, Any] = {
        "role": role, "model": "fake", "worker_id": role, "address": f"{role}:1", "run_dir": "/nowhere",
        "commands_endpoint": "inproc://commands", "events_endpoint": "inproc://events",
        "max_num_seqs": 8, "max_batched_tokens": 16, "block_tokens": 4, "hash_unit_tokens": 4, "kv_blocks": 64,
    }  # fmt: skip
    config = EngineConfig(**(settings | changes))
    config.validate()
    return config


def make_generation(
    prompt: list[int],
    max_tokens: int = 6,
    *,
    num_choices: int = 1,
    committed: tuple[int, ...] = (),
    temperature: float = 0.0,
    deadline_s: float | None = None,
    priority: int = 0,
    cache_salt: str = "",
    slo: Slo = NO_SLO,
    eos_token_ids: tuple[int, ...] = (),
    **sampling: Any,
) -> Generation:
    choices = tuple(ChoiceState(index, committed) for index in range(num_choices))
    return Generation(
        prompt=tuple(prompt),
        sampling=SamplingParams(temperature=temperature, max_tokens=max_tokens, **sampling),
        seed=7,
        choices=choices,
        eos_token_ids=eos_token_ids,
        deadline_s=deadline_s,
        priority=priority,
        cache_salt=cache_salt,
        slo=slo,
    )


def attempt_of(request_id: int) -> AttemptId:
    return AttemptId("router", str(request_id), 1)


class EngineRig:
    def __init__(
        self,
        role: str = "decode",
        *,
        clock: ManualClock | None = None,
        fabric: MemoryFabric | None = None,
        max_model_len: int = 4096,
        media: EngineMedia | None = None,
        window: int = 0,
        sliding_blocks: int = 64,
        make_tiers: Callable[[PoolMemory, ManualClock], KvTiers] | None = None,
        **changes: Any,
    ) -> None:
        """With a `window` there is a second group, of `sliding_blocks`. Tiers are closed with the rig."""
        config = make_config(role, **changes)
        layout = fake_layout(config.block_tokens, config.hash_unit_tokens)
        epoch = secrets.token_bytes(16)
        self.clock = clock or ManualClock()
        assert config.kv_blocks is not None
        self.memory = PoolMemory.allocate(layout, config.kv_blocks, "cpu", epoch)
        self.pool = BlockPool(config.kv_blocks, self.memory.words)
        fabric = fabric or MemoryFabric()
        self.connector = MemoryConnector(fabric, self.memory, self.clock)
        self.sliding: KvGroup | None = None
        self._memories = [self.memory]
        sliding_pool = None
        if window:
            sliding_layout = fake_layout(config.block_tokens, config.hash_unit_tokens, window)
            sliding_pool = self._add_sliding(sliding_layout, sliding_blocks, fabric)
        self.runner = FakeRunner(self.memory.tensor, sliding_pool, window)
        self.events: list[messages.Event] = []
        self.tiers = None if make_tiers is None else make_tiers(self.memory, self.clock)
        self.engine = Engine(
            config,
            EngineParts(
                runner=self.runner,
                pool=self.pool,
                layout=layout,
                max_model_len=max_model_len,
                identity=EngineIdentity(config.worker_id, config.address, epoch, FINGERPRINT),
                signer=TicketSigner(b"key", epoch),
                connectors={"memory": self.connector},
                clock=self.clock,
                emit=self.events.append,
                media=media or EngineMedia(),
                sliding=self.sliding,
                tiers=self.tiers,
            ),
        )
        self.peer = PeerInfo(config.address, epoch, FINGERPRINT, layout, (self.connector.offer(),), self._more_pools())

    def _add_sliding(self, layout: KvLayout, num_blocks: int, fabric: MemoryFabric) -> torch.Tensor:
        memory = PoolMemory.allocate(layout, num_blocks, "cpu", self.memory.engine_epoch)
        self._memories.append(memory)
        pool = BlockPool(num_blocks, memory.words)
        connector = MemoryConnector(fabric, memory, self.clock)
        self.sliding = KvGroup(index=1, pool=pool, layout=layout, connectors={"memory": connector})
        return memory.tensor

    def _more_pools(self) -> tuple[PoolOffer, ...]:
        if self.sliding is None:
            return ()
        offers = tuple(connector.offer() for connector in self.sliding.connectors.values())
        return (PoolOffer(self.sliding.layout, tuple(offer for offer in offers if offer is not None)),)

    # ------------------------------------------------------------------------------------- requests

    def prefill(self, request_id: int, generation: Generation, *, handoff: bool = False) -> None:
        self.engine.handle(messages.Prefill(request_id, attempt_of(request_id), generation, handoff))

    def decode(self, request_id: int, generation: Generation, ticket: KvTicket | None = None) -> None:
        attempt = attempt_of(request_id) if ticket is None else ticket.attempt  # whatever it is called here
        self.engine.handle(messages.Decode(request_id, attempt, generation, ticket))

    def abort(self, request_id: int) -> None:
        self.engine.handle(messages.Abort(request_id, "test"))

    def step(self) -> bool:
        self.clock.advance(STEP_S)
        return self.engine.step()

    def run(self, max_steps: int = 2000) -> None:
        """Steps until nothing more is computed here by itself."""
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"still computing after {max_steps} steps")

    # --------------------------------------------------------------------------------------- answers

    def of(self, event_type: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, event_type)]

    def the(self, event_type: type[E]) -> E:
        (event,) = self.of(event_type)
        return event

    def tokens(self, request_id: int, choice: int = 0) -> list[int]:
        """What decode streamed, in the order of positions, which have to be contiguous."""
        rows = [
            (position, token)
            for event in self.of(messages.StepTokens)
            for row_id, row_choice, position, token in zip(
                event.ids, event.choices, event.positions, event.token_ids, strict=True
            )
            if (row_id, row_choice) == (request_id, choice)
        ]
        positions = [position for position, _ in rows]
        assert positions == list(range(positions[0], positions[0] + len(rows))) if rows else True
        return [token for _, token in rows]

    def finish(self, request_id: int, choice: int = 0) -> messages.ChoiceFinished:
        (event,) = [
            event for event in self.of(messages.ChoiceFinished) if (event.id, event.choice) == (request_id, choice)
        ]
        return event

    def error(self, request_id: int) -> str:
        """The reason of the request's one failure."""
        (event,) = [event for event in self.of(messages.RequestFailed) if event.id == request_id]
        return event.error.reason

    def load(self) -> messages.Load:
        self.engine.handle(messages.GetLoad(0, check_integrity=True))
        reply = self.events.pop()
        assert isinstance(reply, messages.LoadReply)
        assert reply.error is None, reply.error
        return reply.load

    def check_empty(self) -> None:
        """Nothing is held any more by anybody."""
        load = self.load()
        assert not self.runner.wrong_windows
        held = {
            name: getattr(load, name)
            for name in load.__struct_fields__
            if name.startswith(("requests_", "tokens_")) or name in HELD_WHEN_BUSY
        }
        assert not any(held.values()), held
        assert not self.engine.has_requests
        assert self.engine.is_idle

    def close(self) -> None:
        self.engine.close()
        if self.tiers is not None:
            self.tiers.chain.close()
        self.connector.close()
        for memory in self._memories:
            memory.close()


HELD_WHEN_BUSY = (
    "blocks_in_use", "sliding_blocks", "embedding_blocks", "blocks_pinned", "blocks_quarantined", "leases", "transfers",
)  # fmt: skip


class EnginePair:
    """One prefill and one decode engine. Follow streams have the number of their request."""

    def __init__(self, *, prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None) -> None:
        self.clock = ManualClock()
        self.fabric = MemoryFabric()
        self.source = EngineRig("prefill", clock=self.clock, fabric=self.fabric, **(prefill or {}))
        self.reader = EngineRig("decode", clock=self.clock, fabric=self.fabric, **(decode or {}))
        self.reader.engine.handle(messages.ConnectPeer(self.source.peer))
        self.committed: defaultdict[tuple[int, int], dict[int, int]] = defaultdict(dict)
        self.generations: dict[int, Generation] = {}
        self.lands_reads = True
        self.auto_follow = True
        self._seen = {self.source.engine: 0, self.reader.engine: 0}

    def submit(self, request_id: int, generation: Generation) -> None:
        self.generations[request_id] = generation
        self.source.prefill(request_id, generation, handoff=True)

    def turn(self) -> bool:
        """One step of each engine, then their messages; True if anything happened."""
        self.clock.advance(STEP_S)
        computed = self.source.engine.step()
        computed |= self.reader.engine.step()
        if self.lands_reads:
            computed |= bool(self.fabric.pending)
            self.fabric.land_all()
        return self.pump() or computed

    def run(self, max_turns: int = 4000) -> None:
        for _ in range(max_turns):
            if not self.turn():
                return
        raise AssertionError(f"still busy after {max_turns} turns")

    def pump(self) -> bool:
        """Forwards what both engines said since the last time."""
        from_source, from_reader = self._new_events(self.source), self._new_events(self.reader)
        for event in from_source:
            self._forward_from_source(event)
        for event in from_reader:
            self._forward_from_reader(event)
        return bool(from_source or from_reader)

    def _new_events(self, rig: EngineRig) -> list[messages.Event]:
        new = rig.events[self._seen[rig.engine] :]
        self._seen[rig.engine] = len(rig.events)
        return new

    def _forward_from_source(self, event: messages.Event) -> None:
        match event:
            case messages.Accepted(request_id, KvTicket() as ticket) if self.auto_follow:
                self.follow(request_id, ticket)
            case messages.PrefillFinished(request_id, first_tokens):
                for first in first_tokens:
                    self._commit(request_id, first.choice, first.position, first.token_id)
            case messages.FollowReady(follow, num_blocks, digests):
                self.reader.engine.handle(messages.HandoffReady(follow, num_blocks, digests))
            case messages.FollowComplete(follow, first_tokens, partial):
                self.reader.engine.handle(messages.HandoffComplete(follow, first_tokens, partial))
            case messages.FollowFailed(follow, error):
                self.reader.engine.handle(messages.HandoffFailed(follow, error))
            case _:
                pass

    def _forward_from_reader(self, event: messages.Event) -> None:
        match event:
            case messages.HandoffRelease(request_id, reason):
                self.source.engine.handle(messages.FollowRelease(request_id, reason))
            case messages.Beat(_, pulled):
                for request_id in pulled:
                    self.source.engine.handle(messages.FollowBeat(request_id))
            case messages.StepTokens():
                for request_id, choice, position, token in zip(
                    event.ids, event.choices, event.positions, event.token_ids, strict=True
                ):
                    self._commit(request_id, choice, position, token)
            case _:
                pass

    def follow(self, request_id: int, ticket: KvTicket) -> None:
        """What the router and the decode service do when a ticket is accepted."""
        self.reader.decode(request_id, self.generations[request_id], ticket)
        self.source.engine.handle(messages.FollowAttach(request_id, ticket))

    def abort_at_reader(self, request_id: int) -> None:
        """The client is gone; both sides are told."""
        self.reader.abort(request_id)
        self.source.abort(request_id)

    def _commit(self, request_id: int, choice: int, position: int, token: int) -> None:
        """The first copy of a position wins; here every later copy has to be the same."""
        assert self.committed[request_id, choice].setdefault(position, token) == token

    def answer(self, request_id: int, choice: int = 0) -> list[int]:
        committed = self.committed[request_id, choice]
        return [committed[position] for position in sorted(committed)]

    def finish_reason(self, request_id: int, choice: int = 0) -> FinishReason:
        return self.reader.finish(request_id, choice).reason

    def check_empty(self) -> None:
        self.source.check_empty()
        self.reader.check_empty()

    def close(self) -> None:
        self.source.close()
        self.reader.close()


def prompt_of(length: int, seed: int = 1) -> list[int]:
    """Deterministic token ids of the fake vocabulary."""
    return [(seed * 31 + position * position * 7 + position) % VOCAB_SIZE for position in range(length)]

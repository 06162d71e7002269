"""KV of an input's beginning, loaded from the tiers before the rest is computed.

    begin    what the prefix cache lacks is looked up and, as it is found, loaded into blocks that nobody is short of
    poll     chunks that are whole enter the prefix cache; when nothing more comes the request is scheduled

Nothing here is ever an error of the request: a tier that does not know, is slow, down or lying costs the wait, and the
wait is bounded by what computing the tokens would take, and by what was promised for the first token. Blocks of a load
that was given up while a thread still copies into them are quarantined (PROTOCOL A5). Knows no tiers by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from msgspec import Struct

from kvrelay_core.clock import Clock
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.kv_tiers import KvTiers
from kvrelay_engine.load_messages import TierLoad
from kvrelay_engine.prefix_cache import PrefixCache
from kvrelay_engine.sequence import Sequence as TokenSequence
from kvrelay_engine.throughput import Throughput
from kvrelay_transfer.tiers.fetch import Fetch
from kvrelay_transfer.tiers.records import RecordDestination

Reserve = Callable[[int], list[int] | None]


class LoadLimits(Struct, frozen=True):
    wait_s: float | None = None  # 0: never; None: as long as computing would take, within the bounds below
    min_wait_s: float = 0.05
    max_wait_s: float = 10.0
    unmeasured_wait_s: float = 2.0  # while nobody knows how long computing takes
    max_quarantined_share: float = 0.1  # of the pool; above it nothing more is loaded


@dataclass(slots=True, eq=False)
class _Load:
    sequence: TokenSequence
    keys: list[bytes]  # of the blocks of all chunks that are looked up
    cached: list[int]  # blocks before them, held so that room for the others is not made at their cost
    rooms: list[list[int]] = field(default_factory=list)  # blocks of each chunk, from the first on
    num_published: int = 0  # chunks
    fetch: Fetch = field(init=False)


@dataclass(frozen=True, slots=True, eq=False)
class _GivenUp:
    fetch: Fetch
    blocks: list[int]


class TierLoads:
    """Without tiers it never makes anybody wait."""

    def __init__(
        self,
        tiers: KvTiers | None,
        pool: BlockPool,
        cache: PrefixCache,
        throughput: Throughput,
        clock: Clock,
        reserve: Reserve,
        limits: LoadLimits | None = None,
    ) -> None:
        """`reserve(n)` takes n blocks that nobody waits for, or none. `clock` is the one of the tiers, too."""
        self._tiers = tiers
        self._pool = pool
        self._cache = cache
        self._throughput = throughput
        self._clock = clock
        self._reserve = reserve
        self._limits = limits or LoadLimits()
        self._loads: dict[int, _Load] = {}
        self._given_up: list[_GivenUp] = []
        self.num_loaded_blocks = 0

    # ------------------------------------------------------------------------------------------- queries

    @property
    def num_transfers(self) -> int:
        """Loads that somebody waits for or that still write to blocks."""
        return len(self._loads) + len(self._given_up)

    @property
    def num_quarantined(self) -> int:
        """Blocks that only a load given up still owns."""
        return sum(len(one.blocks) for one in self._given_up)

    def report(self) -> tuple[TierLoad, ...]:
        return () if self._tiers is None else self._tiers.loads()

    # --------------------------------------------------------------------------------------- begin to end

    def begin(self, sequence: TokenSequence) -> bool:
        """Whether the request waits for a load. False: nothing is to be gained, schedule it now."""
        if self._tiers is None or self._is_crowded or self._limits.wait_s == 0:
            return False
        cached = self._cache.match(sequence)
        chunks = self._tiers.kv.chunks
        # At least one token is left to compute (PROTOCOL A3).
        first, end = len(cached) // chunks.num_blocks, (len(sequence.tokens) - 1) // chunks.chunk_tokens
        if first >= end:
            return False
        num_tokens = len(sequence.tokens) - len(cached) * chunks.layout.block_tokens
        keys = sequence.chain.keys()[first * chunks.num_blocks : end * chunks.num_blocks]
        load = _Load(sequence, keys, cached)
        load.fetch = self._tiers.chain.fetch(
            [self._tiers.record(sequence, chunk) for chunk in range(first, end)],
            partial(self._take_room, load),
            self._until_s(sequence, num_tokens, (end - first) * chunks.chunk_tokens),
            self._is_worth,
        )
        if load.fetch.is_terminal:
            return False  # nobody has to be asked to know that there is nothing
        self._pool.pin(cached)
        self._loads[sequence.request.id] = load
        return True

    def poll(self) -> list[TokenSequence]:
        """Never blocks. Returns those whose load is over, whatever came of it; they hold nothing."""
        self._collect_given_up()
        ended = []
        for request_id, load in list(self._loads.items()):
            load.fetch.poll()
            self._publish(load)
            if load.fetch.is_over:
                self.abort(request_id)
                ended.append(load.sequence)
        return ended

    def abort(self, request_id: int) -> None:
        """Gives the load up; what is whole stays in the prefix cache. Idempotent."""
        load = self._loads.pop(request_id, None)
        if load is None:
            return
        load.fetch.abort()
        self._publish(load)
        self._pool.release(_flat(load.rooms[: load.num_published]))
        self._pool.release(load.cached)
        self._give_up(load.fetch, _flat(load.rooms[load.num_published :]))

    # ------------------------------------------------------------------------------------------ internal

    @property
    def _is_crowded(self) -> bool:
        return self.num_quarantined > self._limits.max_quarantined_share * self._pool.num_blocks

    def _until_s(self, sequence: TokenSequence, num_uncached: int, num_wanted: int) -> float:
        """When to stop waiting. If nothing comes until then, all uncached tokens have to be computed; where the first
        token can still be in time then, it is to be."""
        limits, now_s = self._limits, self._clock.now()
        if limits.wait_s is not None:
            return now_s + limits.wait_s
        compute_s = self._throughput.seconds_for(num_wanted)
        wait_s = min(max(compute_s, limits.min_wait_s), limits.max_wait_s) if compute_s else limits.unmeasured_wait_s
        promised_s = sequence.request.first_token_by_s
        if promised_s is not None:
            slack_s = promised_s - now_s - self._throughput.seconds_for(num_uncached)
            wait_s = min(wait_s, slack_s) if slack_s > 0 else wait_s
        return now_s + wait_s

    def _is_worth(self, num_chunks: int, seconds: float) -> bool:
        assert self._tiers is not None
        compute_s = self._throughput.seconds_for(num_chunks * self._tiers.kv.chunks.chunk_tokens)
        return self._limits.wait_s is not None or not compute_s or seconds < compute_s

    def _take_room(self, load: _Load, first: int, end: int) -> list[RecordDestination] | None:
        assert self._tiers is not None and first == len(load.rooms)
        size = self._tiers.kv.chunks.num_blocks
        blocks = self._reserve((end - first) * size)
        if blocks is None:
            return None
        rooms = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        load.rooms += rooms
        return [self._tiers.kv.destination(room) for room in rooms]

    def _publish(self, load: _Load) -> None:
        """Whole chunks enter the prefix cache. A block whose tokens are there already stays out of it."""
        for index in range(load.num_published, load.fetch.num_loaded):
            room = load.rooms[index]
            keys = load.keys[index * len(room) : (index + 1) * len(room)]
            for block, key in zip(room, keys, strict=True):
                self.num_loaded_blocks += self._pool.publish(block, key)
        load.num_published = load.fetch.num_loaded

    def _give_up(self, fetch: Fetch, blocks: list[int]) -> None:
        if fetch.is_terminal:
            self._pool.release(blocks)
        else:
            self._given_up.append(_GivenUp(fetch, blocks))

    def _collect_given_up(self) -> None:
        given_up, self._given_up = self._given_up, []
        for one in given_up:
            one.fetch.poll()
            self._give_up(one.fetch, one.blocks)


def _flat(rooms: Sequence[list[int]]) -> list[int]:
    return [block for room in rooms for block in room]

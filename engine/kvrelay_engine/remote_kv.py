"""What comes here from elsewhere, under one front: hand-offs by ticket, prefixes by hint or from tiers, embeddings.

    begin    whether a request has to wait for KV from elsewhere before it is scheduled; for embeddings it does not
    poll     what has come, was lost, or is not waited for any longer

They differ in what a loss means: a lost hand-off or embedding goes back to the router, a lost prefix is computed. What
another engine still has comes first, then what the tiers have beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from kvrelay_engine.arrival_wait import ArrivalWait
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.embeddings.reader import EmbeddingsLost
from kvrelay_engine.engine_parts import EngineParts
from kvrelay_engine.handoff_reader import HandoffArrived, HandoffBroken, HandoffReader, ReaderLimits
from kvrelay_engine.kv_group import SLIDING_GROUP
from kvrelay_engine.message_kinds import Command
from kvrelay_engine.messages import Decode, Prefill, ReleaseReason
from kvrelay_engine.prefix_cache import PrefixCache
from kvrelay_engine.prefix_messages import PrefixFound
from kvrelay_engine.prefix_pulls import PrefixPulls, PullLimits, SlidingPulls
from kvrelay_engine.scheduler import Scheduler
from kvrelay_engine.sequence import EngineRequest, Sequence
from kvrelay_engine.sliding_blocks import SlidingBlocks
from kvrelay_engine.throughput import Throughput
from kvrelay_engine.tier_loads import LoadLimits, TierLoads
from kvrelay_transfer.connectors.base import Transfer


@dataclass(slots=True, frozen=True, eq=False)
class PullEnded:
    """What came of it is in the prefix cache; `sequence` holds nothing and is to be scheduled."""

    sequence: Sequence


RemoteOutcome = HandoffArrived | HandoffBroken | PullEnded | EmbeddingsLost


class RemoteKv:
    def __init__(
        self,
        config: EngineConfig,
        parts: EngineParts,
        cache: PrefixCache,
        throughput: Throughput,
        scheduler: Scheduler,
        sliding: SlidingBlocks | None = None,
    ) -> None:
        fingerprint = parts.identity.model_fingerprint
        self._clock = parts.clock
        self._arrival_wait = ArrivalWait(parts.clock)
        self._cache = cache
        self._block_tokens = parts.layout.block_tokens
        self.media = parts.media
        self.reader = HandoffReader(
            parts.pool, parts.layout, parts.connectors, parts.clock, parts.emit, scheduler.reserve_remote,
            model_fingerprint=fingerprint, limits=ReaderLimits(reserve_budget_s=config.reserve_budget_s),
            device=parts.device, sliding=parts.sliding, digester=parts.digester,
        )  # fmt: skip
        sliding_pulls = None
        if sliding is not None:
            links = self.reader.groups[SLIDING_GROUP].peers
            sliding_pulls = SlidingPulls(sliding.group, links, scheduler.reserve_spare_sliding)
        self.pulls = PrefixPulls(
            parts.pool, parts.layout, cache, self.reader.peers, throughput, parts.clock, parts.emit,
            scheduler.reserve_spare, model_fingerprint=fingerprint, limits=PullLimits(wait_s=config.prefix_wait_s),
            sliding=sliding_pulls,
        )  # fmt: skip
        self.loads = TierLoads(
            parts.tiers, parts.pool, cache, throughput, parts.clock, scheduler.reserve_spare,
            LoadLimits(wait_s=config.prefix_wait_s),
        )  # fmt: skip

    def begin(self, request: EngineRequest, command: Prefill | Decode) -> bool:
        """Raises MismatchError when the command's tickets are not for its tokens, this model or this layout; and as
        `EngineMedia.begin`."""
        num_cached = len(self._cache.match(request.trunk)) * self._block_tokens if request.generation.media else 0
        self.media.begin(request, command, num_cached)
        if isinstance(command, Decode) and command.ticket is not None:
            self.reader.open(request.trunk, command.ticket)
            return True
        is_pulled = command.hint is not None and self.pulls.begin(request.trunk, command.hint)
        return is_pulled or self.loads.begin(request.trunk)

    def handle(self, command: Command) -> None:
        if isinstance(command, PrefixFound):
            self.pulls.found(command)
        elif self.media.takes(command):
            self.media.handle(command)
        else:
            self.media.handle(command)
            self.reader.handle(command)

    def poll(self) -> list[RemoteOutcome]:
        """Waits for the last blocks of a hand-off that are due at once, where that is allowed; else never blocks."""
        outcomes = self._poll()
        due_s = self.reader.due_s()
        if due_s is None or due_s > (allowed_s := self._arrival_wait.allowed_s()):
            return outcomes
        started_s = self._clock.now()
        while (waited_s := self._clock.now() - started_s) < allowed_s and self.reader.due_s() is not None:
            outcomes += self._poll()
        self._arrival_wait.spend(waited_s)
        return outcomes

    def _poll(self) -> list[RemoteOutcome]:
        pulled = [sequence for sequence in self.pulls.poll() if not self.loads.begin(sequence)]
        return [*self.reader.poll(), *map(PullEnded, pulled + self.loads.poll()), *self.media.poll()]

    def abort(self, request_id: int, reason: ReleaseReason = ReleaseReason.CANCELLED) -> None:
        """Gives up what the request waits for, and all blocks of it. Idempotent."""
        self.reader.abort(request_id, reason)
        self.pulls.abort(request_id)
        self.loads.abort(request_id)

    def close(self) -> None:
        self.reader.close()
        self.media.close()

    @property
    def is_busy(self) -> bool:
        """Something progresses by itself: poll often."""
        return self.reader.is_busy or self.pulls.is_busy or self.loads.num_transfers > 0 or self.media.is_busy

    @property
    def poll_s(self) -> float:
        """How soon to look again while it is busy and nothing is computed."""
        transfers = chain(self.reader.transfers(), self.pulls.transfers())
        return min((transfer.poll_s for transfer in transfers), default=Transfer.poll_s)

    @property
    def num_transfers(self) -> int:
        """Reads and loads that are not terminal, quarantined ones included."""
        num_reads = self.reader.num_transfers + self.pulls.num_transfers + self.media.num_transfers
        return num_reads + self.loads.num_transfers

    def pulled_blocks(self) -> dict[int, int]:
        """Per request id of a hand-off in progress."""
        return self.reader.pulled_blocks()

    @property
    def num_sliding_held(self) -> int:
        """Blocks of the sliding group that belong to reads and to no sequence."""
        return self.reader.groups[SLIDING_GROUP].quarantine.num_blocks + self.pulls.num_held(SLIDING_GROUP)

    @property
    def num_quarantined(self) -> int:
        """Blocks of the full group that only a read given up still owns."""
        return self.reader.num_quarantined + self.pulls.num_quarantined + self.loads.num_quarantined

    @property
    def stale_reads(self) -> int:
        return self.reader.stale_reads + self.pulls.stale_reads

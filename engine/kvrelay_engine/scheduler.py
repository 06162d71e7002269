"""Who runs in the next step, with how many tokens, in which blocks.

    add              WAITING: holds nothing
    add_remote       WAITING_REMOTE_KV: the hand-off reader asks `reserve_remote` for blocks and a seat
    start            RUNNING: its KV is there (branches of a trunk, an arrived hand-off)
    schedule         one step's batch under one budget of tokens: decoding sequences first, then prompts in
                     chunks, then newcomers; the most urgent first
    remove           FINISHED: blocks go back

A waiting sequence never holds blocks, so waiting sequences cannot block each other. A newcomer gets all blocks
of its tokens or none. When a decoding sequence finds no block to grow into, hand-offs that are not here yet give
way first, then the least urgent running one is preempted: recomputed here if that is cheap, else handed back
(PROTOCOL C5). Blocks of an accepted ticket are never taken. Of a sliding group a sequence gets a promise with its
place, and then whatever it needs (`sliding_blocks.py`).

Knows nothing of messages, tickets, sampling or models.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Protocol

from kvrelay_core.clock import Clock
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.engine_media import EngineMedia
from kvrelay_engine.prefix_cache import PrefixCache
from kvrelay_engine.runner import BatchRow
from kvrelay_engine.sequence import EngineRequest, Sequence, SequenceState
from kvrelay_engine.sliding_blocks import SlidingBlocks
from kvrelay_engine.step_budget import StepBudget
from kvrelay_engine.throughput import Throughput
from kvrelay_transfer.layout import KvLayout

Urgency = tuple[bool, float, int, float, int]


class CanPin(Protocol):
    """Whether tickets may pin so many new blocks, and the shared ones as far as they are not pinned yet."""

    def __call__(self, num_blocks: int, shared: Set[int]) -> bool: ...


@dataclass(slots=True)
class ScheduledRow:
    """The next `num_tokens` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_tokens: int
    wants_logits: bool  # it ends with the sequence's last token
    words: tuple[int, ...]  # fence words, at launch, of the blocks that the row fills

    def for_runner(self) -> BatchRow:
        start = self.sequence.num_computed
        tokens = self.sequence.tokens[start : start + self.num_tokens]
        sequence = self.sequence
        return BatchRow(tokens, start, sequence.blocks, self.wants_logits, sliding_table=sequence.sliding)


@dataclass(slots=True)
class Batch:
    """One step: its rows, and what befell whom while it was put together."""

    budget: int  # tokens left
    rows: list[ScheduledRow] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    handed_back: list[EngineRequest] = field(default_factory=list)  # already removed
    crowded_out: list[EngineRequest] = field(default_factory=list)  # their hand-offs gave way

    def drop(self, request: EngineRequest) -> None:
        self.rows = [row for row in self.rows if row.sequence.request is not request]
        self.admitted = [sequence for sequence in self.admitted if sequence.request is not request]


class Scheduler:
    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        layout: KvLayout,
        cache: PrefixCache,
        throughput: Throughput,
        clock: Clock,
        can_pin: CanPin,
        give_up_handoff: Callable[[Sequence], None],
        num_returning: Callable[[], int],
        media: EngineMedia | None = None,
        sliding: SlidingBlocks | None = None,
    ) -> None:
        """`give_up_handoff` makes the reader free the blocks of a remote sequence; those under a read are then
        among the `num_returning` blocks that come back by themselves, soon."""
        self._config = config
        self._pool = pool
        self._layout = layout
        self._cache = cache
        self._throughput = throughput
        self._clock = clock
        self._can_pin = can_pin
        self._give_up_handoff = give_up_handoff
        self._num_returning = num_returning
        self._media = media or EngineMedia()
        self._sliding = sliding
        self._step_budget = StepBudget(config.tokens_per_step, config.step_target_s)
        # Dicts as ordered sets.
        self.waiting: dict[Sequence, None] = {}
        self.running: dict[Sequence, None] = {}
        self.remote: dict[Sequence, None] = {}
        self._seated: set[Sequence] = set()  # remote ones that have their blocks
        self._homeless: list[Sequence] = []  # branches that are neither here nor to be computed here

    # ------------------------------------------------------------------------------ between the states

    def add(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.state = SequenceState.WAITING
        self.waiting[sequence] = None

    def add_remote(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING_REMOTE_KV
        self.remote[sequence] = None

    def start(self, sequence: Sequence) -> None:
        """The sequence has its KV (and, if it came by a hand-off, a seat since `reserve_remote`)."""
        self._leave(sequence)
        sequence.state = SequenceState.RUNNING
        self.running[sequence] = None

    def start_branch(self, sequence: Sequence) -> None:
        """As `start`; but one that got no blocks is computed again from what the prefix cache has."""
        if sequence.blocks:
            self.start(sequence)
        elif not self._requeue(sequence):
            self._homeless.append(sequence)

    def lose_remote(self, sequence: Sequence) -> None:
        """The hand-off broke. The sequence holds nothing while it waits to be replaced or removed."""
        self._seated.discard(sequence)
        self.free(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is over. Idempotent."""
        self._leave(sequence)
        sequence.state = SequenceState.FINISHED
        self.free(sequence)

    def free(self, sequence: Sequence) -> None:
        """Gives its blocks back; what it computed may still be found in the prefix cache."""
        self._pool.release(sequence.blocks, sequence.last_step)
        sequence.blocks = []
        if self._sliding is not None:
            self._sliding.free(sequence)
        sequence.num_computed = 0
        sequence.num_published = 0

    def _leave(self, sequence: Sequence) -> None:
        for queue in (self.waiting, self.running, self.remote):
            queue.pop(sequence, None)
        self._seated.discard(sequence)

    # --------------------------------------------------------------------------------- one step's batch

    def schedule(self) -> Batch:
        batch = Batch(self._step_budget.for_decodes(self._num_decoding()))
        for homeless in self._homeless:
            if homeless.state is not SequenceState.FINISHED:  # nor its request
                self._hand_back(homeless.request, batch)
        self._homeless.clear()
        for sequence in self._running_in_order():
            if sequence.state is SequenceState.RUNNING:  # not preempted meanwhile
                self._continue(sequence, batch)
        self._admit(batch)
        return batch

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """What a step took; the next ones are cut accordingly."""
        self._step_budget.record(num_tokens, seconds)

    def complete_step(self, step: int) -> None:
        """The given step, and every one before it, will touch no block any more."""
        self._pool.complete_step(step)
        if self._sliding is not None:
            self._sliding.pool.complete_step(step)

    def _num_decoding(self) -> int:
        return sum(sequence.num_uncomputed == 1 for sequence in self.running)

    def _running_in_order(self) -> list[Sequence]:
        """Decoding ones first, the most urgent first; in any order when all of them get what they need anyway."""
        if self._pool.num_free >= len(self.running) and all(sequence.num_uncomputed == 1 for sequence in self.running):
            return list(self.running)
        return sorted(self.running, key=lambda sequence: (sequence.num_uncomputed > 1, self._urgency(sequence)))

    def _continue(self, sequence: Sequence, batch: Batch) -> None:
        is_alone = not any(row.num_tokens > 1 for row in batch.rows)
        num_tokens = self._media.clip(sequence, min(sequence.num_uncomputed, batch.budget), may_overrun=is_alone)
        if num_tokens and self._grow(sequence, num_tokens, batch):
            self._add_row(sequence, num_tokens, batch)

    def _grow(self, sequence: Sequence, num_tokens: int, batch: Batch) -> bool:
        """Makes the sequence's blocks cover its next tokens; False if it had to give way itself, or to wait."""
        needed = self._layout.blocks_for(sequence.num_computed + num_tokens) - len(sequence.blocks)
        while needed > self._pool.num_free:
            if needed <= self._pool.num_free + self._num_returning():
                return False  # sits this step out
            if self._seated:
                self._crowd_out(max(self._seated, key=self._urgency), batch)
                continue
            self._preempt(self._least_urgent(batch), batch)
            if sequence.state is not SequenceState.RUNNING:
                return False
        if needed > 0:
            sequence.blocks += self._pool.reserve(needed)
        if self._sliding is not None:
            self._sliding.grow(sequence, num_tokens)
        return True

    def _add_row(self, sequence: Sequence, num_tokens: int, batch: Batch) -> None:
        words = self._cache.words_to_fill(sequence, num_tokens)
        batch.rows.append(ScheduledRow(sequence, num_tokens, num_tokens == sequence.num_uncomputed, words))
        batch.budget = max(0, batch.budget - num_tokens)  # an image is kept whole

    # ------------------------------------------------------------------------------------- newcomers

    def _admit(self, batch: Batch) -> None:
        """Strictly in order: whoever does not fit holds up those behind, so that nobody starves."""
        if not self.waiting or not batch.budget or self._seats_taken() >= self._config.max_num_seqs:
            return
        to_pin: set[int] = set()  # by this batch's newcomers, whose tickets are issued after it is put together
        for sequence in sorted(self.waiting, key=self._urgency):
            if not batch.budget or self._seats_taken() + sequence.num_seats > self._config.max_num_seqs:
                return
            hits = self._hits(sequence)
            num_cached = len(hits) * self._layout.block_tokens
            if not self._media.can_compute(sequence, num_cached):
                self._hand_back(sequence.request, batch)
                continue
            if not self._media.may_start(sequence, num_cached):
                continue  # it waits for room of another kind, in an order of its own
            needed = self._layout.blocks_for(len(sequence.tokens)) - len(hits)
            if sequence.request.handoff and not self._can_pin(needed, to_pin.union(hits)):
                return
            if not self._take_place(sequence, hits, needed):
                return
            if sequence.request.handoff:
                to_pin.update(sequence.blocks)
            batch.admitted.append(sequence)
            self._continue(sequence, batch)

    def _hits(self, sequence: Sequence) -> list[int]:
        """Cached blocks that hold the sequence's first tokens, as far as its images allow."""
        unit_tokens = self._layout.hit_tokens
        return self._cache.match(
            sequence, lambda num_cached: self._media.usable_prefix(sequence, num_cached, unit_tokens)
        )

    def _take_place(self, sequence: Sequence, hits: list[int], needed: int) -> bool:
        """The cached blocks and the others that it needs; or nothing."""
        num_free = self._pool.num_free - sum(self._pool.references(block) == 0 for block in hits)
        watermark = 0 if sequence.request.is_prefill else self._watermark()
        if needed + watermark > num_free:
            return False
        if self._sliding is not None and not self._sliding.take_place(sequence, len(hits) * self._layout.block_tokens):
            return False
        self._pool.pin(hits)
        sequence.blocks = hits + self._pool.reserve(needed)
        sequence.num_published = len(hits)
        sequence.num_computed = sequence.num_cached = len(hits) * self._layout.block_tokens
        self.start(sequence)
        return True

    def reserve_remote(self, sequence: Sequence, num_blocks: int) -> list[int] | None:
        """Blocks, and a seat, for a hand-off whose KV begins to arrive; None when it has to wait or to go."""
        has_seat = self._seats_taken() + sequence.num_seats <= self._config.max_num_seqs
        has_blocks = num_blocks + self._watermark() <= self._pool.num_free
        if not has_seat or not has_blocks or self._is_overtaking(sequence):
            return None
        if self._sliding is not None and not self._sliding.expect(sequence):
            return None
        self._seated.add(sequence)
        return self._pool.reserve(num_blocks)

    def reserve_spare(self, num_blocks: int) -> list[int] | None:
        """Blocks that nobody is short of, for KV that may be of use; None when there are not so many."""
        wanted = sum(self._layout.blocks_for(len(sequence.tokens)) for sequence in self.waiting)
        is_short = num_blocks and num_blocks + wanted + self._watermark() > self._pool.num_free
        return None if is_short else self._pool.reserve(num_blocks)

    def reserve_spare_sliding(self, num_blocks: int) -> list[int] | None:
        """The same of the sliding group: what has been promised is not to be lent, nor to be pinned."""
        assert self._sliding is not None
        is_short = self.waiting or num_blocks > self._sliding.num_unpromised
        return None if is_short else self._sliding.pool.reserve(num_blocks)

    def _is_overtaking(self, sequence: Sequence) -> bool:
        urgency = self._urgency(sequence)
        return any(waiting.num_recomputes or self._urgency(waiting) < urgency for waiting in self.waiting)

    def _seats_taken(self) -> int:
        return sum(sequence.num_seats for sequence in self.running) + sum(
            sequence.num_seats for sequence in self._seated
        )

    def _watermark(self) -> int:
        """Blocks kept free for growth: one for each sequence that decodes here or is about to."""
        return self._seats_taken()

    # ---------------------------------------------------------------------------- order and preemption

    def _urgency(self, sequence: Sequence) -> Urgency:
        """Smaller is more urgent: who waited beyond all patience, then the least slack, priority, arrival."""
        request = sequence.request
        if self._clock.now() - request.arrived_s > self._config.patience_s:
            return (False, request.arrived_s, 0, 0.0, request.id)
        work_s = self._throughput.seconds_for(sequence.num_uncomputed)
        return (True, request.due_s - work_s, -request.generation.priority, request.arrived_s, request.id)

    def _least_urgent(self, batch: Batch) -> Sequence:
        """Of the running sequences that may be preempted and have no row in this step yet."""
        scheduled = {row.sequence for row in batch.rows}
        candidates = [
            sequence for sequence in self.running if not sequence.request.is_prefill and sequence not in scheduled
        ]
        return max(candidates, key=self._urgency)

    def _crowd_out(self, victim: Sequence, batch: Batch) -> None:
        """What was not pulled yet costs least to have elsewhere."""
        self._leave(victim)
        self._give_up_handoff(victim)
        batch.crowded_out.append(victim.request)

    def _preempt(self, victim: Sequence, batch: Batch) -> None:
        if not self._requeue(victim):
            self._hand_back(victim.request, batch)

    def _requeue(self, sequence: Sequence) -> bool:
        """It gives back what it holds, to be computed again; False, and nothing is done, where that is too much."""
        if not self._media.can_compute(sequence, 0) or not self._may_recompute(len(sequence.tokens)):
            return False
        self._leave(sequence)
        self.free(sequence)
        sequence.num_recomputes += 1
        self.add(sequence)
        return True

    def _hand_back(self, request: EngineRequest, batch: Batch) -> None:
        batch.drop(request)
        for sequence in request.sequences:
            self.remove(sequence)
        batch.handed_back.append(request)

    def add_recompute(self, sequence: Sequence) -> bool:
        """Adds a trunk whose hand-off was lost; False, and nothing is added, where too much of it is missing here."""
        choices = sequence.request.pending_choices
        num_in_branches = sum(len(choice.committed) for choice in choices) if len(choices) > 1 else 0
        num_cached = len(self._hits(sequence)) * self._layout.block_tokens
        if not self._media.can_compute(sequence, num_cached):
            return False
        if not self._may_recompute(len(sequence.tokens) - num_cached + num_in_branches):
            return False
        sequence.num_recomputes += 1
        self.add(sequence)
        return True

    def _may_recompute(self, num_tokens: int) -> bool:
        """Under the limit of one sequence, and under the cap of all that recompute here (PROTOCOL C5)."""
        pending = sum(
            sequence.num_uncomputed
            for queue in (self.waiting, self.running)
            for sequence in queue
            if sequence.num_recomputes and sequence.num_uncomputed > 1
        )
        return num_tokens <= self._config.decode_alone_tokens and pending + num_tokens <= self._config.recompute_tokens

    # ------------------------------------------------------------------------------------------ counts

    @property
    def has_work(self) -> bool:
        """Whether `schedule` could find rows; remote sequences wait for others."""
        return bool(self.running or self.waiting or self._homeless)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens to be computed before all that are here now have their next token."""
        return sum(sequence.num_uncomputed for queue in (self.waiting, self.running) for sequence in queue)

"""Model of PROTOCOL A: fence words, seals, pins, reads that land late, writes that complete late, restarts.

A source engine (S) computes prompts into blocks; a reader engine (R) pulls them. Launched writes of a block
complete in order, at any time; a posted read takes its data at one moment and lands at a later one. Blocks hold
the letter of the prompt that was written last. Not modelled: several ranks, chunks, partial blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from protocol_model.explorer import replaced

WRONG_KV = "WRONG KV"
SPURIOUS_STALE = "SPURIOUS STALE"
TIER_POISONED = "TIER POISONED"

_NOTHING = "-"


@dataclass(frozen=True)
class MemoryRules:
    bump_before_reuse: bool = True  # A1: a block taken to be written gets a new word first
    keep_word_on_hit: bool = True  # A1: a prefix hit or a pin leaves the word alone
    publish_only_sealed: bool = True  # A2: the prefix cache learns of a block when its write completed
    credit_by_launch_word: bool = True  # A2: a completion speaks for a request only if the word is the launch's
    rewrite_in_private_block: bool = True  # A3: the last token of a full hit is never written into the shared block
    retire_after_last_step: bool = True  # A4: a freed block waits for launched steps that could touch it
    quarantine_destinations: bool = True  # A5: a destination belongs to its transfer until that is terminal
    words_after_data: bool = True  # A6: words are read by a second operation, after the data landed
    recheck_stores: bool = True  # A7: a write-behind store compares the word after its copy
    epoch_in_word: bool = True  # Words: the epoch makes words of two starts differ


@dataclass(frozen=True)
class MemoryScene:
    """What there is, and which faults may happen."""

    prompts: str = "ab"  # one request per letter; equal letters share their prefix
    source_blocks: int = 1
    reader_blocks: int = 1
    overshoot: bool = False  # asynchronous scheduling: a step may still write for a request that just ended
    store: bool = False  # a write-behind store copies sealed blocks
    restart: bool = False  # the source may restart once; the reader's mapping goes on showing the old memory
    cancels: int = 1


class Word(NamedTuple):
    epoch: int
    generation: int


class Write(NamedTuple):
    """A launched kernel's write, not completed yet."""

    content: str
    word: Word  # of the block at launch


class SourceBlock(NamedTuple):
    word: Word
    content: str = _NOTHING
    holders: frozenset[int] = frozenset()
    key: str | None = None  # under which the prefix cache has it
    writes: tuple[Write, ...] = ()


class Read(NamedTuple):
    request: int
    content: str | None = None  # None: posted, data not taken yet


class ReaderBlock(NamedTuple):
    content: str = _NOTHING
    holder: int | None = None
    writes: tuple[str, ...] = ()
    read: Read | None = None


class SourceSide(StrEnum):
    NEW = "new"
    RESERVED = "reserved"
    RUNNING = "running"
    SEALED = "sealed"
    GONE = "gone"


class ReaderSide(StrEnum):
    NEW = "new"
    FOLLOWING = "following"
    READING = "reading"
    LANDED = "landed"
    RECOMPUTING = "recomputing"
    VISIBLE = "visible"
    OVER = "over"


_TICKET_EXISTS = (SourceSide.RESERVED, SourceSide.RUNNING, SourceSide.SEALED)
_CAN_CANCEL = (ReaderSide.FOLLOWING, ReaderSide.READING, ReaderSide.LANDED, ReaderSide.RECOMPUTING)


class Request(NamedTuple):
    source: SourceSide = SourceSide.NEW
    source_block: int = -1
    ticket_word: Word | None = None
    is_ready: bool = False  # the reader was told that the block is sealed
    reader: ReaderSide = ReaderSide.NEW
    reader_block: int = -1
    seen_word: Word | None = None  # read together with the data (only with the rule off)


class StoreJob(NamedTuple):
    block: int
    key: str
    word: Word
    content: str | None = None  # None: queued, not copied yet


class MemoryState(NamedTuple):
    source: tuple[SourceBlock, ...]
    reader: tuple[ReaderBlock, ...]
    requests: tuple[Request, ...]
    epoch: int = 0
    memory_before_restart: tuple[SourceBlock, ...] | None = None
    store_job: StoreJob | None = None
    tier: frozenset[tuple[str, str]] = frozenset()  # (key, content)
    num_cancels: int = 0


Step = tuple[str, MemoryState]


class MemoryModel:
    def __init__(self, scene: MemoryScene, rules: MemoryRules) -> None:
        self._scene = scene
        self._rules = rules

    def initial(self) -> MemoryState:
        return MemoryState(
            source=(SourceBlock(self._first_word(0)),) * self._scene.source_blocks,
            reader=(ReaderBlock(),) * self._scene.reader_blocks,
            requests=(Request(),) * len(self._scene.prompts),
        )

    def steps(self, state: MemoryState) -> Iterator[Step]:
        for index in range(len(state.requests)):
            yield from self._source_steps(state, index)
            yield from self._follow_steps(state, index)
            yield from self._reader_steps(state, index)
        yield from self._source_write_steps(state)
        yield from self._reader_write_steps(state)
        yield from self._read_steps(state)
        if self._scene.store:
            yield from self._store_steps(state)
        if self._scene.restart and state.epoch == 0:
            yield "S.restart", self._restarted(state)

    def violation(self, state: MemoryState) -> str | None:
        for index, request in enumerate(state.requests):
            wanted = self._scene.prompts[index]
            if request.reader is ReaderSide.VISIBLE and state.reader[request.reader_block].content != wanted:
                return f"{WRONG_KV}: request {index} uses {state.reader[request.reader_block].content!r} as {wanted!r}"
            is_valid = request.source is SourceSide.SEALED and request.is_ready and state.epoch == 0
            if request.reader is ReaderSide.RECOMPUTING and is_valid:
                return f"{SPURIOUS_STALE}: request {index} must recompute although its block is pinned and valid"
        for key, content in state.tier:
            if key != content:
                return f"{TIER_POISONED}: key {key!r} holds {content!r}"
        return None

    def is_finished(self, state: MemoryState) -> bool:
        return all(r.source is SourceSide.GONE and r.reader is not ReaderSide.READING for r in state.requests)

    # ---------------------------------------------------------------------------------- source: requests

    def _source_steps(self, state: MemoryState, index: int) -> Iterator[Step]:
        request, prompt = state.requests[index], self._scene.prompts[index]
        if request.source is SourceSide.NEW and request.reader is ReaderSide.NEW:
            hits = [b for b, block in enumerate(state.source) if block.key == prompt]
            yield from self._hit_steps(state, index, hits) if hits else self._reserve_steps(state, index)
        if request.source is SourceSide.RESERVED:
            yield f"S.launch({index})", self._launched(state, index)
        if request.source in _TICKET_EXISTS:
            block = state.source[request.source_block]
            freed = block._replace(holders=block.holders - {index})
            state = _with_source(state, request.source_block, freed)
            yield f"S.unpin({index})", _with_request(state, index, request._replace(source=SourceSide.GONE))

    def _reserve_steps(self, state: MemoryState, index: int) -> Iterator[Step]:
        for b, block in enumerate(state.source):
            if block.holders:
                continue
            word = _next_word(block.word) if self._rules.bump_before_reuse else block.word
            taken = block._replace(word=word, holders=frozenset({index}), key=None)
            request = state.requests[index]._replace(source=SourceSide.RESERVED, source_block=b, ticket_word=word)
            yield f"S.reserve({index}, s{b})", _with_request(_with_source(state, b, taken), index, request)

    def _hit_steps(self, state: MemoryState, index: int, hits: list[int]) -> Iterator[Step]:
        for b in hits:
            block = state.source[b]
            word = block.word if self._rules.keep_word_on_hit else _next_word(block.word)
            block = block._replace(word=word, holders=block.holders | {index})
            if not self._rules.rewrite_in_private_block:
                # Another batch gives other low bits: the same token's KV is not the same bytes.
                block = block._replace(writes=(*block.writes, Write(f"{block.key}'", word)))
            request = Request(SourceSide.SEALED, b, ticket_word=word, is_ready=True)
            yield f"S.hit({index}, s{b})", _with_request(_with_source(state, b, block), index, request)

    def _launched(self, state: MemoryState, index: int) -> MemoryState:
        request, prompt = state.requests[index], self._scene.prompts[index]
        block = state.source[request.source_block]
        block = block._replace(writes=(*block.writes, Write(prompt, block.word)))
        if not self._rules.publish_only_sealed:
            block = block._replace(key=prompt)
        state = _with_source(state, request.source_block, block)
        return _with_request(state, index, request._replace(source=SourceSide.RUNNING))

    def _source_write_steps(self, state: MemoryState) -> Iterator[Step]:
        for b, block in enumerate(state.source):
            if not block.writes:
                continue
            write, *later = block.writes
            block = block._replace(content=write.content, writes=tuple(later))
            sealed = [i for i in range(len(state.requests)) if self._completes(state, i, b, write)]
            if sealed and self._rules.publish_only_sealed:
                block = block._replace(key=self._scene.prompts[sealed[0]])
            after = _with_source(state, b, block)
            for i in sealed:
                after = _with_request(after, i, after.requests[i]._replace(source=SourceSide.SEALED, is_ready=True))
            yield f"S.write_completes(s{b}={write.content})", after

    def _completes(self, state: MemoryState, index: int, block: int, write: Write) -> bool:
        request = state.requests[index]
        if request.source is not SourceSide.RUNNING or request.source_block != block:
            return False
        return write.word == request.ticket_word or not self._rules.credit_by_launch_word

    # ---------------------------------------------------------------------------------- reader: requests

    def _follow_steps(self, state: MemoryState, index: int) -> Iterator[Step]:
        """Reserve a destination, post the read; or learn that the source gave up."""
        request = state.requests[index]
        if request.reader is ReaderSide.NEW and request.source in _TICKET_EXISTS:
            for b, block in enumerate(state.reader):
                if self._is_reservable(block):
                    after = _with_reader(state, b, block._replace(holder=index))
                    following = request._replace(reader=ReaderSide.FOLLOWING, reader_block=b)
                    yield f"R.reserve({index}, r{b})", _with_request(after, index, following)
        if request.reader is not ReaderSide.FOLLOWING:
            return
        block = state.reader[request.reader_block]
        if request.is_ready and block.read is None:
            after = _with_reader(state, request.reader_block, block._replace(read=Read(index)))
            yield f"R.read({index})", _with_request(after, index, request._replace(reader=ReaderSide.READING))
        if not request.is_ready and request.source is SourceSide.GONE:
            recomputing = request._replace(reader=ReaderSide.RECOMPUTING)
            yield f"R.handoff_failed({index})", _with_request(state, index, recomputing)

    def _is_reservable(self, block: ReaderBlock) -> bool:
        is_quarantined = block.read is not None and self._rules.quarantine_destinations
        is_retiring = bool(block.writes) and self._rules.retire_after_last_step
        return block.holder is None and not is_quarantined and not is_retiring

    def _reader_steps(self, state: MemoryState, index: int) -> Iterator[Step]:
        request = state.requests[index]
        block = state.reader[request.reader_block]
        if request.reader is ReaderSide.READING and not self._rules.words_after_data and request.seen_word is None:
            seen = request._replace(seen_word=self._visible_block(state, request).word)
            yield f"R.read_words({index})", _with_request(state, index, seen)
        if request.reader is ReaderSide.LANDED:
            is_fresh = (request.seen_word or self._visible_block(state, request).word) == request.ticket_word
            checked = request._replace(reader=ReaderSide.VISIBLE if is_fresh else ReaderSide.RECOMPUTING)
            yield f"R.check({index}: {'fresh' if is_fresh else 'stale'})", _with_request(state, index, checked)
        if request.reader is ReaderSide.RECOMPUTING and not block.writes:
            after = _with_reader(state, request.reader_block, block._replace(content=self._scene.prompts[index]))
            yield f"R.recompute({index})", _with_request(after, index, request._replace(reader=ReaderSide.VISIBLE))
        if request.reader is ReaderSide.VISIBLE:
            yield from self._decode_steps(state, index)
        if request.reader in _CAN_CANCEL and state.num_cancels < self._scene.cancels:
            after = state._replace(num_cancels=state.num_cancels + 1)
            yield f"R.cancel({index})", self._ended(after, index)

    def _decode_steps(self, state: MemoryState, index: int) -> Iterator[Step]:
        block_index = state.requests[index].reader_block
        block = state.reader[block_index]
        if self._scene.overshoot and not block.writes:
            launched = block._replace(writes=(self._scene.prompts[index],))
            yield f"R.launch({index})", _with_reader(state, block_index, launched)
        yield f"R.finish({index})", self._ended(state, index)

    def _ended(self, state: MemoryState, index: int) -> MemoryState:
        request = state.requests[index]
        freed = state.reader[request.reader_block]._replace(holder=None)
        state = _with_reader(state, request.reader_block, freed)
        return _with_request(state, index, request._replace(reader=ReaderSide.OVER))

    def _reader_write_steps(self, state: MemoryState) -> Iterator[Step]:
        for b, block in enumerate(state.reader):
            if block.writes:
                done = block._replace(content=block.writes[0], writes=block.writes[1:])
                yield f"R.write_completes(r{b}={block.writes[0]})", _with_reader(state, b, done)

    # --------------------------------------------------------------------------------- reads in flight

    def _read_steps(self, state: MemoryState) -> Iterator[Step]:
        for b, block in enumerate(state.reader):
            if block.read is None:
                continue
            request = state.requests[block.read.request]
            if block.read.content is None:
                taken = block.read._replace(content=self._visible_block(state, request).content)
                yield f"read takes data({block.read.request})", _with_reader(state, b, block._replace(read=taken))
                continue
            is_waited_for = request.reader is ReaderSide.READING and request.reader_block == b
            if is_waited_for and not self._rules.words_after_data and request.seen_word is None:
                continue  # data and words are one operation here: both are there, or neither
            after = _with_reader(state, b, block._replace(content=block.read.content, read=None))
            if is_waited_for:
                after = _with_request(after, block.read.request, request._replace(reader=ReaderSide.LANDED))
            yield f"read lands({block.read.request})", after

    def _visible_block(self, state: MemoryState, request: Request) -> SourceBlock:
        """What the reader's mapping shows: after a restart the memory of the earlier start."""
        memory = state.memory_before_restart or state.source
        return memory[request.source_block]

    # ----------------------------------------------------------------------------------- store, restart

    def _store_steps(self, state: MemoryState) -> Iterator[Step]:
        job = state.store_job
        if job is None:
            stored = {key for key, _ in state.tier}
            for b, block in enumerate(state.source):
                if block.key is not None and block.content == block.key and block.key not in stored:
                    yield f"store.queue(s{b})", state._replace(store_job=StoreJob(b, block.key, block.word))
        elif job.content is None:
            copied = job._replace(content=state.source[job.block].content)
            yield f"store.copy(s{job.block})", state._replace(store_job=copied)
        elif self._rules.recheck_stores and state.source[job.block].word != job.word:
            yield "store.drop", state._replace(store_job=None)
        else:
            yield f"store.put({job.key})", state._replace(store_job=None, tier=state.tier | {(job.key, job.content)})

    def _restarted(self, state: MemoryState) -> MemoryState:
        requests = tuple(
            r._replace(source=SourceSide.GONE) if r.source in _TICKET_EXISTS else r for r in state.requests
        )
        return state._replace(
            source=(SourceBlock(self._first_word(1)),) * len(state.source),
            epoch=1,
            memory_before_restart=state.source,
            requests=requests,
            store_job=None,
        )

    def _first_word(self, epoch: int) -> Word:
        return Word(epoch if self._rules.epoch_in_word else 0, 0)


def _next_word(word: Word) -> Word:
    return word._replace(generation=word.generation + 1)


def _with_source(state: MemoryState, index: int, block: SourceBlock) -> MemoryState:
    return state._replace(source=replaced(state.source, index, block))


def _with_reader(state: MemoryState, index: int, block: ReaderBlock) -> MemoryState:
    return state._replace(reader=replaced(state.reader, index, block))


def _with_request(state: MemoryState, index: int, request: Request) -> MemoryState:
    if request.source is SourceSide.GONE and request.reader is ReaderSide.OVER:
        # Of no more interest, but for the block that a quarantined read may still take its data from.
        request = Request(SourceSide.GONE, request.source_block, reader=ReaderSide.OVER)
    return state._replace(requests=replaced(state.requests, index, request))

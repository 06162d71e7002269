"""A request inside the engine, and its sequences (one per choice).

The scheduler moves them between states; the runner sees only token ids, positions and block tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from kvrelay_core.hashing import hash_units
from kvrelay_core.media.hash_keys import media_keys
from kvrelay_core.media.mrope import MropePositions
from kvrelay_core.request import AttemptId, ChoiceState, FinishReason, Generation, MediaReference
from kvrelay_engine.logit_adjustments import PromptTokens
from kvrelay_transfer.layout import KvLayout, block_keys


class SequenceState(Enum):
    WAITING = "waiting"  # for tokens of a step's budget and for blocks
    WAITING_REMOTE_KV = "waiting for remote KV"
    RUNNING = "running"
    FINISHED = "finished"


class HashChain:
    """Unit hashes of a growing token sequence, extended as tokens come."""

    def __init__(self, root: bytes, layout: KvLayout, media: Iterable[MediaReference] = ()) -> None:
        """`media`: of the tokens that will come."""
        self._layout = layout
        self._parent = root
        self._extra_keys = media_keys(tuple(media), layout.hash_unit_tokens)
        self.unit_hashes: list[bytes] = []

    def extend(self, tokens: list[int]) -> None:
        """Hashes the full units of `tokens` that are not hashed yet."""
        num_done, unit_tokens = len(self.unit_hashes), self._layout.hash_unit_tokens
        new = hash_units(self._parent, tokens[num_done * unit_tokens :], unit_tokens, self._extra_keys[num_done:])
        if new:
            self.unit_hashes += new
            self._parent = new[-1]

    def keys(self) -> list[bytes]:
        return block_keys(self.unit_hashes, self._layout)

    def fork(self) -> HashChain:
        """A chain of its own over the same tokens so far."""
        copy = HashChain(self._parent, self._layout)
        copy._extra_keys = self._extra_keys
        copy.unit_hashes = list(self.unit_hashes)
        return copy

    def cover(self, tokens: list[int]) -> bytes:
        """Hashes that every one of `tokens` goes into: of the full units, then of the rest, where there is one."""
        self.extend(tokens)
        num_full = len(self.unit_hashes)
        rest = tokens[num_full * self._layout.hash_unit_tokens :]
        last = hash_units(self._parent, rest, len(rest), self._extra_keys[num_full:]) if rest else ()
        return b"".join((*self.unit_hashes, *last))


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request. `tokens` = prompt, committed and generated tokens."""

    request: EngineRequest
    choice: int
    tokens: list[int]
    chain: HashChain
    state: SequenceState = SequenceState.WAITING
    num_computed: int = 0  # tokens whose KV is in the pool
    num_published: int = 0  # blocks offered to the prefix cache so far
    num_cached: int = 0  # tokens that came from the prefix cache or a hand-off
    num_offered: int = 0  # chunks that the tiers were offered, or need not be
    blocks: list[int] = field(default_factory=list)
    sliding: list[int] = field(default_factory=list)  # of the sliding group, by position; null where none is held
    num_slid: int = 0  # entries at the start of `sliding` that are null for good
    last_step: int = 0  # last launched step that touches the blocks
    num_recomputes: int = 0  # times that it lost its KV here, preempted or with its hand-off
    finish_reason: FinishReason | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.request.generation.prompt)

    @property
    def num_generated(self) -> int:
        """Committed tokens included: the position of the next token."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_seats(self) -> int:
        """Running sequences that this one is or will be: a trunk takes the seats of its branches."""
        return 1 if self.request.is_prefill else max(1, len(self.request.pending_choices))


@dataclass(slots=True, eq=False)
class EngineRequest:
    """A Prefill or Decode command in progress.

    It begins with one sequence, the trunk; when the trunk's KV is there it branches into `pending_choices`.
    """

    id: int
    attempt: AttemptId
    generation: Generation
    is_prefill: bool
    arrived_s: float
    handoff: bool = False  # Prefill: a ticket is issued for its blocks
    deadline_at_s: float | None = None
    first_token_by_s: float | None = None  # promised; unlike a deadline, it may be missed
    first_scheduled_s: float | None = None
    positions: MropePositions | None = None  # of a prompt with images, where the model gives tokens three of them
    prompt_tokens: PromptTokens = field(init=False)
    sequences: list[Sequence] = field(default_factory=list)
    pending_choices: tuple[ChoiceState, ...] = ()  # that the trunk has yet to branch into; () afterwards
    unwanted: set[int] = field(default_factory=set)  # choices that were aborted, for ever

    def __post_init__(self) -> None:
        self.prompt_tokens = PromptTokens(self.generation.prompt)

    def time_split(self, now_s: float) -> tuple[float, float]:
        """Seconds until it was first scheduled, and since then."""
        assert self.first_scheduled_s is not None, "it was not scheduled yet"
        return self.first_scheduled_s - self.arrived_s, now_s - self.first_scheduled_s

    @property
    def is_wanted(self) -> bool:
        """Whether any choice that goes on is."""
        if self.pending_choices:
            return any(choice.index not in self.unwanted for choice in self.pending_choices)
        return any(
            sequence.state is not SequenceState.FINISHED and sequence.choice not in self.unwanted
            for sequence in self.sequences
        )

    @property
    def unwanted_sequences(self) -> list[Sequence]:
        """None before the trunk has branched: it is everybody's."""
        return [] if self.pending_choices else [s for s in self.sequences if s.choice in self.unwanted]

    @property
    def due_s(self) -> float:
        """When the next thing that somebody waits for has to be there; inf: whenever."""
        trunk = self.trunk
        # Prefill gives the first token of a request whose KV comes from there.
        waits_for_first = not trunk.num_generated and trunk.state is not SequenceState.WAITING_REMOTE_KV
        times_s = (self.deadline_at_s, self.first_token_by_s if waits_for_first else None)
        return min((at_s for at_s in times_s if at_s is not None), default=inf)

    @property
    def trunk(self) -> Sequence:
        return self.sequences[0]

"""Model of PROTOCOL C1 to C3 and C7: who decides which token stands at a position.

Attempt 1 runs on prefill P and decode D; if its hand-off is lost the router has D resume, if D is lost it places
the next attempt on worker E. Samplers may disagree (other kernels, other batches), so a token is written as the
whole history that it was sampled after: "pd" is D's token after P's token "p". Messages between two parties keep
their order and may be late; those of a dead worker or a broken session may be lost. Not modelled: KV, choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

NUM_TOKENS = 3

DOUBLE_EMISSION = "DOUBLE EMISSION"
OUT_OF_ORDER = "OUT OF ORDER"
INCOHERENT = "INCOHERENT"


@dataclass(frozen=True)
class TokenRules:
    first_copy_wins: bool = True  # C1: a second copy of a position is dropped
    gaps_wait: bool = True  # C1: a token is committed only after all before it
    drop_lower_attempts: bool = True  # C1: what a superseded attempt still sends is not used
    resume_with_committed: bool = True  # C1, C3: committed tokens are input for ever
    decode_echoes_first_token: bool = True  # C2: position 0 reaches the router by decode too
    decode_asks_when_lost: bool = True  # C3: decode never samples position 0 by itself
    decode_always_told: bool = True  # C3: the router answers every HandoffLost
    repeat_the_same_answer: bool = True  # C3, C7: HandoffLost reported again gets the same Resume, not a new attempt
    reattach_sends_again: bool = True  # C7: a resumed session sends again what the router does not have


@dataclass(frozen=True)
class TokenScene:
    """Which faults may happen, beside those of prefill and of the hand-off."""

    decode_may_die: bool = True
    session_may_break: bool = True  # once, between router and D


class Prefill(StrEnum):
    RUNNING = "running"
    FINISHED = "finished"
    DEAD = "dead"


class Phase(StrEnum):
    WAITING = "waiting"  # for the hand-off
    ASKING = "asking"  # HandoffLost sent
    GOING = "going"
    DEAD = "dead"


class Token(NamedTuple):
    attempt: int
    history: str  # one letter per position, of the worker that sampled it

    @property
    def position(self) -> int:
        return len(self.history) - 1


class Decode(NamedTuple):
    name: str
    phase: Phase = Phase.WAITING
    attempt: int = 1
    history: str = ""  # what it has decoded so far
    outbox: tuple[Token, ...] = ()


class TokenState(NamedTuple):
    prefill: Prefill = Prefill.RUNNING
    follow_open: bool = True
    finished_message: bool = False  # P to router, carries "p"
    complete_message: bool = False  # P to D, carries "p"
    first: Decode = Decode("d")
    second: Decode | None = None  # E, once attempt 2 was placed there
    lost_message: bool = False  # D to router: HandoffLost
    resume_message: str | None = None  # router to D: the committed history
    is_session_broken: bool = False
    num_breaks: int = 0
    attempt: int = 1  # the router's
    committed: tuple[str, ...] = ()  # histories, as sent to the client
    gap_buffer: frozenset[str] = frozenset()


Step = tuple[str, TokenState]


class TokenModel:
    def __init__(self, scene: TokenScene, rules: TokenRules) -> None:
        self._scene = scene
        self._rules = rules

    def initial(self) -> TokenState:
        return TokenState()

    def steps(self, state: TokenState) -> Iterator[Step]:
        yield from self._prefill_steps(state)
        yield from self._decode_steps(state)
        yield from self._second_steps(state)
        yield from self._session_steps(state)
        yield from self._router_steps(state)

    def violation(self, state: TokenState) -> str | None:
        positions = [len(history) - 1 for history in state.committed]
        if len(set(positions)) != len(positions):
            return f"{DOUBLE_EMISSION}: the client got {list(state.committed)}"
        if positions != sorted(positions):
            return f"{OUT_OF_ORDER}: the client got {list(state.committed)}"
        for earlier, later in zip(state.committed, state.committed[1:], strict=False):
            if not later.startswith(earlier):
                return f"{INCOHERENT}: {later!r} does not continue {earlier!r}"
        return None

    def is_finished(self, state: TokenState) -> bool:
        return len(state.committed) == NUM_TOKENS

    # ------------------------------------------------------------------------------------------ workers

    def _prefill_steps(self, state: TokenState) -> Iterator[Step]:
        if state.prefill is Prefill.RUNNING:
            yield (
                "P.finishes",
                state._replace(
                    prefill=Prefill.FINISHED,
                    finished_message=True,
                    complete_message=state.follow_open,
                ),
            )
        if state.prefill is not Prefill.DEAD:
            dead = state._replace(prefill=Prefill.DEAD, follow_open=False)
            yield "P.dies", dead
            yield "P.dies, Finished is lost", dead._replace(finished_message=False)
        if state.follow_open:
            yield "Follow is lost", state._replace(follow_open=False, complete_message=False)

    def _decode_steps(self, state: TokenState) -> Iterator[Step]:
        decode = state.first
        if decode.phase is Phase.DEAD:
            return
        if state.complete_message and decode.phase is Phase.WAITING:
            after = state._replace(complete_message=False, first=self._started(decode, "p"))
            yield "D.completes with P's token", after
        elif decode.phase is Phase.WAITING and not state.follow_open and not state.complete_message:
            if self._rules.decode_asks_when_lost:
                asking = decode._replace(phase=Phase.ASKING)
                yield "D.reports HandoffLost", state._replace(first=asking, lost_message=True)
            else:
                yield "D.goes on alone", state._replace(first=_sampled(decode._replace(phase=Phase.GOING)))
        if state.resume_message is not None:
            resumed = decode._replace(phase=Phase.GOING, history=state.resume_message, attempt=state.attempt)
            is_asking = decode.phase is Phase.ASKING
            after = state._replace(resume_message=None, first=resumed if is_asking else decode)
            yield "D.resumes" if is_asking else "D.drops a second Resume", after
        if decode.phase is Phase.GOING and len(decode.history) < NUM_TOKENS:
            yield "D.samples", state._replace(first=_sampled(decode))
        if self._scene.decode_may_die:
            dead = decode._replace(phase=Phase.DEAD)  # its last messages may still arrive
            after = state._replace(first=dead, lost_message=False, resume_message=None)
            yield "D.dies", self._placed_anew(after)

    def _started(self, decode: Decode, history: str) -> Decode:
        echo = (Token(decode.attempt, history),) if self._rules.decode_echoes_first_token else ()
        return decode._replace(phase=Phase.GOING, history=history, outbox=decode.outbox + echo)

    def _second_steps(self, state: TokenState) -> Iterator[Step]:
        if state.second is not None and len(state.second.history) < NUM_TOKENS:
            yield "E.samples", state._replace(second=_sampled(state.second))

    def _session_steps(self, state: TokenState) -> Iterator[Step]:
        decode = state.first
        if decode.phase is Phase.DEAD:
            return
        if self._scene.session_may_break and state.num_breaks == 0:
            yield (
                "session breaks",
                state._replace(
                    first=decode._replace(outbox=()),
                    lost_message=False,
                    resume_message=None,
                    is_session_broken=True,
                    num_breaks=1,
                ),
            )
        if state.is_session_broken:
            yield "session resumes", self._reattached(state._replace(is_session_broken=False))

    def _reattached(self, state: TokenState) -> TokenState:
        """D sends what the router does not have; tokens that it sampled meanwhile may overtake."""
        if not self._rules.reattach_sends_again:
            return state
        decode = state.first
        missing = range(len(state.committed) + 1, len(decode.history) + 1)
        again = tuple(Token(decode.attempt, decode.history[:length]) for length in missing)
        is_asking = decode.phase is Phase.ASKING
        return state._replace(first=decode._replace(outbox=decode.outbox + again), lost_message=is_asking)

    # ------------------------------------------------------------------------------------------- router

    def _router_steps(self, state: TokenState) -> Iterator[Step]:
        if state.finished_message:
            after = state._replace(finished_message=False)
            yield "router gets P's token", self._received(after, Token(1, "p"))
        if state.lost_message and self._rules.decode_always_told:
            is_repeated = state.attempt > 1 and self._rules.repeat_the_same_answer
            attempt = state.attempt if is_repeated else state.attempt + 1
            answer = self._history_to_resume(state)
            yield "router has D resume", state._replace(lost_message=False, attempt=attempt, resume_message=answer)
        if state.first.outbox:
            token, *later = state.first.outbox
            after = state._replace(first=state.first._replace(outbox=tuple(later)))
            yield f"router gets D's {token.history}", self._received(after, token)
        if state.second is not None and state.second.outbox:
            token, *later = state.second.outbox
            after = state._replace(second=state.second._replace(outbox=tuple(later)))
            yield f"router gets E's {token.history}", self._received(after, token)

    def _history_to_resume(self, state: TokenState) -> str:
        return state.committed[-1] if state.committed and self._rules.resume_with_committed else ""

    def _placed_anew(self, state: TokenState) -> TokenState:
        """A lost decode worker: the next attempt goes to E, with the tokens that stand."""
        attempt = state.attempt + 1
        second = Decode("e", Phase.GOING, attempt, self._history_to_resume(state))
        return state._replace(second=second, attempt=attempt, gap_buffer=frozenset())

    def _received(self, state: TokenState, token: Token) -> TokenState:
        if token.attempt < state.attempt and self._rules.drop_lower_attempts:
            return state
        is_known = any(len(history) == len(token.history) for history in state.committed)
        if is_known and self._rules.first_copy_wins:
            return state
        if token.position > len(state.committed) and self._rules.gaps_wait:
            return state._replace(gap_buffer=state.gap_buffer | {token.history})
        return _committed(state, token.history)


def _sampled(decode: Decode) -> Decode:
    history = decode.history + decode.name
    return decode._replace(history=history, outbox=(*decode.outbox, Token(decode.attempt, history)))


def _committed(state: TokenState, history: str) -> TokenState:
    """Commits a token, and then those that waited for it."""
    state = state._replace(committed=(*state.committed, history))
    waiting = sorted(h for h in state.gap_buffer if len(h) == len(state.committed) + 1)
    if not waiting:
        return state
    return _committed(state._replace(gap_buffer=state.gap_buffer - set(waiting)), waiting[0])

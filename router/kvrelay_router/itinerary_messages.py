"""What goes into an itinerary (events) and what comes out (actions). Plain data.

`leg` and `attempt` name the placement that an event is about; events of a superseded attempt have no effect.
Workers are named by keys that mean nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.v1.common_pb2 import EmbeddingTicket, KvTicket
from kvrelay_core.errors import KvRelayError
from kvrelay_core.request import ChoiceState, FirstToken, Generation
from kvrelay_router.committer import Ending, Token


@dataclass(frozen=True, slots=True)
class Route:
    """Where a leg was placed: on a pair, or on a decode worker alone."""

    prefill: str | None
    decode: str
    decode_alone_tokens: int = 0  # inputs up to this long may be recomputed on the decode worker


# --------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class LegEvent:
    leg: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Placed(LegEvent):
    route: Route


@dataclass(frozen=True, slots=True)
class Unplaced(LegEvent):
    """Nobody took it in time. `all_refused`: workers serve, and each of them said no."""

    error: KvRelayError
    all_refused: bool = False


@dataclass(frozen=True, slots=True)
class PrefillAccepted(LegEvent):
    ticket: KvTicket | None  # never looked into here; None when no hand-off was asked for


@dataclass(frozen=True, slots=True)
class PrefillFinished(LegEvent):
    tokens: tuple[FirstToken, ...]


@dataclass(frozen=True, slots=True)
class PrefillFailed(LegEvent):
    """The worker gave the request up; it holds nothing of it any more. A WorkerLostError is the worker's own end."""

    error: KvRelayError


@dataclass(frozen=True, slots=True)
class PrefillLost(LegEvent):
    """The worker, or the way to it, is gone."""

    error: KvRelayError


@dataclass(frozen=True, slots=True)
class HandoffDone(LegEvent):
    """Decode has all KV and has released the ticket."""


@dataclass(frozen=True, slots=True)
class DecodeTokens(LegEvent):
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class DecodeEnding(LegEvent):
    """Decode is through with one choice; after the last one it holds nothing of the request."""

    ending: Ending


@dataclass(frozen=True, slots=True)
class HandoffLost(LegEvent):
    """Decode waits to be told: resume or abort."""

    error: KvRelayError
    verified_tokens: int = 0  # whose KV decode has; the rest of the input would be computed there


@dataclass(frozen=True, slots=True)
class HandedBack(LegEvent):
    """Decode preempted the request for good and holds nothing of it any more."""

    error: KvRelayError


@dataclass(frozen=True, slots=True)
class DecodeFailed(LegEvent):
    """As PrefillFailed."""

    error: KvRelayError


@dataclass(frozen=True, slots=True)
class DecodeLost(LegEvent):
    error: KvRelayError


@dataclass(frozen=True, slots=True)
class StopChoice:
    """The front door has seen enough of a choice: a stop string."""

    choice: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """Cancelled, past its deadline, or the client is gone or too slow: `error` says which."""

    error: KvRelayError


Event = LegEvent | StopChoice | Abandon

# -------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class LegAction:
    leg: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Place(LegAction):
    """Find workers; with `prefill` given, only a decode worker for the ticket that this prefill issued."""

    excluded: frozenset[str]  # refused it: not again
    avoided: frozenset[str]  # lost it: rather others
    prefill: str | None = None


@dataclass(frozen=True, slots=True)
class OpenPrefill(LegAction):
    worker: str
    generation: Generation
    handoff: bool
    embeddings: tuple[EmbeddingTicket, ...] = ()  # of each media item of the generation


@dataclass(frozen=True, slots=True)
class CancelPrefill(LegAction):
    worker: str


@dataclass(frozen=True, slots=True)
class ReleaseTicket(LegAction):
    """Prefill has finished, and no decode will follow its ticket (any more)."""

    worker: str


@dataclass(frozen=True, slots=True)
class OpenDecode(LegAction):
    worker: str
    generation: Generation
    ticket: KvTicket | None  # None: compute everything there


@dataclass(frozen=True, slots=True)
class ResumeDecode(LegAction):
    """`attempt` supersedes `lost_attempt` on the same worker."""

    worker: str
    lost_attempt: int
    choices: tuple[ChoiceState, ...]


@dataclass(frozen=True, slots=True)
class AbortDecode(LegAction):
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class AbortChoices(LegAction):
    """Decode goes on with the other ones."""

    worker: str
    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """New tokens of one choice, in order, for the client."""

    choice: int
    tokens: Sequence[Token]


@dataclass(frozen=True, slots=True)
class FinishChoice:
    ending: Ending


@dataclass(frozen=True, slots=True)
class Complete:
    """Every choice is finished. Nothing follows."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The request failed. Nothing follows."""

    error: KvRelayError


Action = LegAction | Commit | FinishChoice | Complete | Fail

"""What the world of an itinerary is made of: the calls open at its workers, and the errors that they may end with."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvrelay_core.errors import (
    DrainingError,
    InternalError,
    InvalidRequestError,
    KvRelayError,
    MismatchError,
    OverloadedError,
    StaleTicketError,
    UnavailableError,
    WorkerLostError,
)
from kvrelay_core.request import Generation

ERRORS: tuple[KvRelayError, ...] = (
    OverloadedError("full"),
    DrainingError("draining"),
    StaleTicketError("stale"),
    MismatchError("layout"),
    InternalError("a bug"),
    WorkerLostError("its engine died"),
)
ENCODE_ERRORS: tuple[KvRelayError, ...] = (
    OverloadedError("full"),
    UnavailableError("it did not answer"),
    WorkerLostError("it died"),
    InvalidRequestError("the image is cut off"),
)
LOST = WorkerLostError("gone")
WORKERS = ("w0", "w1", "w2")
ENCODERS = ("e0", "e1")
Key = tuple[str, int]


def token_of(choice: int, position: int) -> int:
    return 1000 * choice + position


@dataclass
class AtPrefill:
    """One request open at a prefill worker."""

    generation: Generation
    handoff: bool
    accepted: bool = False
    finished: bool = False
    handed_over: bool = False  # decode has all KV


@dataclass
class AtDecode:
    generation: Generation
    worker: str
    attempt: int
    has_kv: bool = False
    resumed: bool = False
    next_position: dict[int, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

"""What a worker's error means for a request: is another worker worth a try, and is the ticket still good?"""

from __future__ import annotations

from kvrelay_core.errors import (
    HandoffError,
    KvRelayError,
    MismatchError,
    OverloadedError,
    SupersededError,
    TicketRejectedError,
    UnavailableError,
    UnsupportedError,
    WorkerLostError,
)


def is_refusal(error: KvRelayError) -> bool:
    """The worker did not take it; the ticket is still good for another one."""
    # A worker that says WorkerLostError of itself died with the request on it.
    return isinstance(error, (OverloadedError, UnavailableError)) and not isinstance(error, WorkerLostError)


def is_worth_another_place(error: KvRelayError) -> bool:
    return isinstance(error, (UnavailableError, OverloadedError, HandoffError, TicketRejectedError, SupersededError))


def is_unfit(error: KvRelayError) -> bool:
    """This decode worker cannot use the ticket; what another one says of it is open."""
    return isinstance(error, MismatchError) and not isinstance(error, UnsupportedError)

"""The exception tree. Every error that leaves a KVRelay component is one of these.

    KvRelayError
    ├── InvalidRequestError        INVALID_ARGUMENT     the caller must change the request
    │   └── UnknownModelError      NOT_FOUND            no such served model
    ├── ConfigError                INVALID_ARGUMENT     flags, files or checkpoints that cannot work
    ├── OverloadedError            RESOURCE_EXHAUSTED   shed: come back later, or ask another worker
    │   └── PoolExhaustedError     RESOURCE_EXHAUSTED   not enough free KV blocks
    ├── UnavailableError           UNAVAILABLE          retry elsewhere
    │   ├── WorkerLostError        UNAVAILABLE          a worker or its stream is gone
    │   └── DrainingError          UNAVAILABLE          the worker takes nothing new
    ├── MismatchError              FAILED_PRECONDITION  model, layout or hashes differ
    │   └── UnsupportedError       FAILED_PRECONDITION  this cluster cannot do it
    ├── HandoffError               ABORTED              the hand-off ended; recompute or place anew
    │   ├── StaleTicketError       DATA_LOSS            a fence word changed: nothing of the read is used
    │   ├── LeaseExpiredError      ABORTED              the pins of the ticket are gone
    │   ├── TransferError          ABORTED              the connector failed
    │   └── EmbeddingLostError     ABORTED              an image's embedding cannot be had: encode it again
    ├── TicketRejectedError        PERMISSION_DENIED    forged, altered, or of another epoch
    ├── UnauthenticatedError       UNAUTHENTICATED      missing or wrong token
    ├── SupersededError            ALREADY_EXISTS       a higher attempt of the request is known
    ├── RequestCancelledError      CANCELLED
    ├── DeadlineError              DEADLINE_EXCEEDED
    └── InternalError              INTERNAL             a bug: the message says where

The status names are those of google.rpc.Code; `kvrelay_core.rpc` maps both ways.
"""

from __future__ import annotations


class KvRelayError(Exception):
    """Root of the tree. The message says what happened and what to do about it."""

    status = "INTERNAL"

    def __init__(self, message: str, **metadata: str | int | float) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = {name: str(value) for name, value in metadata.items()}

    @property
    def reason(self) -> str:
        return type(self).__name__


class InvalidRequestError(KvRelayError):
    status = "INVALID_ARGUMENT"


class UnknownModelError(InvalidRequestError):
    status = "NOT_FOUND"


class ConfigError(KvRelayError):
    status = "INVALID_ARGUMENT"


class OverloadedError(KvRelayError):
    status = "RESOURCE_EXHAUSTED"


class PoolExhaustedError(OverloadedError):
    pass


class UnavailableError(KvRelayError):
    status = "UNAVAILABLE"


class WorkerLostError(UnavailableError):
    pass


class DrainingError(UnavailableError):
    pass


class MismatchError(KvRelayError):
    status = "FAILED_PRECONDITION"


class UnsupportedError(MismatchError):
    pass


class HandoffError(KvRelayError):
    status = "ABORTED"


class StaleTicketError(HandoffError):
    status = "DATA_LOSS"


class LeaseExpiredError(HandoffError):
    pass


class TransferError(HandoffError):
    pass


class EmbeddingLostError(HandoffError):
    """Its metadata `media` is the hex form of the item's content hash."""


class TicketRejectedError(KvRelayError):
    status = "PERMISSION_DENIED"


class UnauthenticatedError(KvRelayError):
    status = "UNAUTHENTICATED"


class SupersededError(KvRelayError):
    status = "ALREADY_EXISTS"


class RequestCancelledError(KvRelayError):
    status = "CANCELLED"


class DeadlineError(KvRelayError):
    status = "DEADLINE_EXCEEDED"


class InternalError(KvRelayError):
    status = "INTERNAL"


def _tree(root: type[KvRelayError]) -> dict[str, type[KvRelayError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


_BY_REASON = _tree(KvRelayError)

# What an error of an unknown class, from another release, is taken for.
_BY_STATUS: dict[str, type[KvRelayError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "NOT_FOUND": UnknownModelError,
    "RESOURCE_EXHAUSTED": OverloadedError,
    "UNAVAILABLE": UnavailableError,
    "FAILED_PRECONDITION": MismatchError,
    "ABORTED": HandoffError,
    "DATA_LOSS": StaleTicketError,
    "PERMISSION_DENIED": TicketRejectedError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "ALREADY_EXISTS": SupersededError,
    "CANCELLED": RequestCancelledError,
    "DEADLINE_EXCEEDED": DeadlineError,
}


def error_from(reason: str, status: str, message: str, metadata: dict[str, str] | None = None) -> KvRelayError:
    """Rebuilds an error that crossed a process border from its class name, or else its status name."""
    cls = _BY_REASON.get(reason) or _BY_STATUS.get(status, InternalError)
    return cls(message, **(metadata or {}))

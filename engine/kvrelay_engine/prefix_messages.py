"""Messages about prefixes that one worker has and another one could use: see `prefix_pulls` and `prefix_exports`."""

from __future__ import annotations

from kvrelay_core.request import AttemptId, HandoffTiming
from kvrelay_engine.message_kinds import Command, Event
from kvrelay_transfer.ticket import KvTicket


class PrefixWanted(Event, frozen=True):
    """The request waits for what `source_address` has of its beginning. The service asks there."""

    id: int
    attempt: AttemptId
    source_address: str
    unit_hashes: bytes  # of the full units wanted, 32 bytes each


class PrefixPulled(Event, frozen=True):
    """The pull is over, whatever came of it: what was moved, and what was here already."""

    id: int
    timing: HandoffTiming


class PrefixFound(Command, frozen=True):
    """The answer to PrefixWanted; None: nothing is to be had there."""

    id: int
    ticket: KvTicket | None


class LookupPrefix(Command, frozen=True):
    """Another worker asks what we have of these hashes. Answered by PrefixTicket."""

    call: int
    attempt: AttemptId
    unit_hashes: bytes


class PrefixTicket(Event, frozen=True):
    call: int
    ticket: KvTicket | None

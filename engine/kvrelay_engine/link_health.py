"""Which connectors of which peers are to be left alone for a while, since their reads failed.

Two failed reads in a row, and the connector is left for 30 s; each time that it comes back and fails again, twice as
long, up to 10 min. A read that succeeds forgets it all. What was posted before the connector was left and ends later
says nothing new: neither a failure of the same incident nor a success that was lucky. Only what the connector itself
did wrong counts: a stale block or a refusal by the source says nothing about the way the bytes went. All this outlives
the link, and whoever connects the same start of the peer once more. Knows no links.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay_core.clock import Clock
from kvrelay_core.errors import DeadlineError, KvRelayError, TransferError

MAX_FAILURES = 2
FIRST_REST_S = 30.0
LONGEST_REST_S = 600.0


@dataclass(slots=True)
class _Record:
    num_failures: int = 0  # in a row
    rest_s: float = FIRST_REST_S  # the next one's length
    rests_until_s: float = 0.0  # 0.0: it is not left


class LinkHealth:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._records: dict[tuple[str, str], _Record] = {}

    def note_success(self, peer_id: str, connector: str) -> None:
        record = self._records.get((peer_id, connector))
        if record is not None and not record.rests_until_s:
            self.stay(peer_id, connector)

    def note_failure(self, peer_id: str, connector: str) -> bool:
        """Whether the connector is to be left now."""
        record = self._records.setdefault((peer_id, connector), _Record())
        if record.rests_until_s:
            return False
        record.num_failures += 1
        if record.num_failures < MAX_FAILURES:
            return False
        self.rest(peer_id, connector)
        return True

    def rest(self, peer_id: str, connector: str) -> None:
        """Leaves a connector; one that has failed before, longer than the last time."""
        record = self._records.setdefault((peer_id, connector), _Record())
        record.num_failures = 0
        record.rests_until_s = self._clock.now() + record.rest_s
        record.rest_s = min(LONGEST_REST_S, 2 * record.rest_s)

    def stay(self, peer_id: str, connector: str) -> None:
        """It carries the pair, be it for want of another: it begins anew."""
        self._records.pop((peer_id, connector), None)

    def rests(self, peer_id: str, connector: str) -> bool:
        record = self._records.get((peer_id, connector))
        return record is not None and record.rests_until_s > self._clock.now()

    def has_rested(self, peer_id: str, connector: str) -> bool:
        """It was left, and its rest is over."""
        record = self._records.get((peer_id, connector))
        return record is not None and 0.0 < record.rests_until_s <= self._clock.now()

    def try_again(self, peer_id: str, connector: str) -> None:
        """It is tried now: one more failure, and it rests again."""
        record = self._records[peer_id, connector]
        record.rests_until_s = 0.0
        record.num_failures = MAX_FAILURES - 1

    def end_rests(self, peer_id: str) -> bool:
        """There is no other way. Whether any connector of the peer rested."""
        resting = [record for key, record in self._records.items() if key[0] == peer_id and self.rests(*key)]
        for record in resting:
            record.rests_until_s = self._clock.now()
        return bool(resting)

    def forget(self, peer_id: str) -> None:
        """The peer has restarted, or is gone for long."""
        for key in [key for key in self._records if key[0] == peer_id]:
            del self._records[key]


def is_fault_of_the_way(error: KvRelayError | None) -> bool:
    """Whether a failed read speaks against its connector."""
    return type(error) in (TransferError, DeadlineError)


def is_worth_another_try(error: KvRelayError | None) -> bool:
    """At once, perhaps over another connector. After a deadline there is no time for it."""
    return type(error) is TransferError

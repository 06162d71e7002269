"""What the service can tell of the lease of one request's ticket (PROTOCOL B2).

The engine holds the lease and says nothing when one ends by its time; so its times are followed here, a little late
rather than early. Knows nothing of streams: it is told what became of them.
"""

from __future__ import annotations

import math

from kvrelay_core.clock import Clock
from kvrelay_transfer.ticket import LeaseTerms

# The engine hears of an event after us, and looks at its leases every now and then.
LATENESS_S = 0.5


class LeaseWatch:
    """Over until it is granted."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._terms = LeaseTerms()
        self._is_read = False
        self._ends_s = -math.inf

    @property
    def is_over(self) -> bool:
        return self._ends_s <= self._clock.now()

    @property
    def has_reader(self) -> bool:
        """Somebody follows the ticket, or may come back to."""
        return self._is_read and not self.is_over

    def granted(self, terms: LeaseTerms) -> None:
        self._terms = terms
        self.refused()

    def followed(self) -> None:
        self._is_read, self._ends_s = True, math.inf

    def lost(self) -> None:
        """The reader's transport broke."""
        self._end_in(self._terms.lost_grace_s)

    def refused(self) -> None:
        """It is the router's again, for another reader."""
        self._is_read = False
        self._end_in(self._terms.first_follow_s)

    def ended(self) -> None:
        self._is_read, self._ends_s = False, -math.inf

    def _end_in(self, duration_s: float) -> None:
        self._ends_s = self._clock.now() + duration_s + LATENESS_S

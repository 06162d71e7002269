"""How much to ask of a peer next: what suits the link, as long as all of it may be given up at once.

Whoever cancels many requests together puts all that is under way into quarantine; that alone must not reach the cap at
which the peer's link is torn down. Knows numbers only: no reads, no requests.
"""

from __future__ import annotations

from kvrelay_transfer.connectors.base import ReadWindow


class ReadRoom:
    def __init__(self, max_reads: int | None, max_read_bytes: int | None, cap_bytes: int) -> None:
        """`cap_bytes` of one link may be in quarantine. Where a limit is None the link's own holds."""
        self._max_reads = max_reads
        self._max_read_bytes = max_read_bytes
        self._cap_bytes = cap_bytes

    def next_read_bytes(self, window: ReadWindow, num_reads: int, under_way_bytes: int, given_up_bytes: int) -> int:
        """0: nothing now. `num_reads` of the one who asks; `under_way_bytes` of all who read from the peer, without
        those that were given up and have not ended."""
        if num_reads >= (self._max_reads or window.max_reads):
            return 0
        wanted_bytes = self._max_read_bytes or window.max_read_bytes
        room_bytes = self._cap_bytes - under_way_bytes - given_up_bytes
        # With nothing under way a read comes through whatever is stuck: it succeeds, or its failure fills the cap.
        return max(0, min(wanted_bytes, room_bytes)) or (0 if under_way_bytes else 1)

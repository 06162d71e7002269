"""Which decode worker was the last to hold the KV of which tokens, by the router's own memory.

A guess and no more: the worker may have reused the blocks since. Whoever follows the hint asks there, and computes
what is not to be had. Bounded, the oldest first to be forgotten. Knows no sessions and no placement.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

MAX_UNITS = 1 << 16  # 4 M tokens of conversations; about 10 MB


class KvHolders:
    def __init__(self, max_units: int = MAX_UNITS) -> None:
        self._max_units = max_units
        self._holder: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holder)

    def note(self, worker: str, unit_hashes: Sequence[bytes]) -> None:
        """`worker` holds the KV of the chain now. Its end is forgotten first, as it is reused first."""
        for unit_hash in reversed(unit_hashes):
            self._holder[unit_hash] = worker
            self._holder.move_to_end(unit_hash)
        while len(self._holder) > self._max_units:
            self._holder.popitem(last=False)

    def find(self, unit_hashes: Sequence[bytes], is_usable: Callable[[str], bool]) -> tuple[str, int] | None:
        """The worker that holds the longest part of the chain, and how many units that are."""
        for num_units in range(len(unit_hashes), 0, -1):
            worker = self._holder.get(unit_hashes[num_units - 1])
            if worker is not None and is_usable(worker):
                return worker, num_units
        return None

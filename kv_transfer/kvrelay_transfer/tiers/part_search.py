"""Where the parts of a fetch are, one after another: in host memory, or in the first tier that has the next one.

Tiers are asked for some parts at a time, few at first so that loading can begin, by their own threads. What they say
is a promise that need not be kept. Its user's lock guards it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.tier import Tier
from kvrelay_transfer.tiers.tier_stack import TierStack
from kvrelay_transfer.tiers.tier_stats import Count
from kvrelay_transfer.tiers.workers import Job

HOST = -1
_FIRST_WINDOW, _MAX_WINDOW = 8, 512  # parts that are asked for at a time


class PartSearch:
    """`places[i]` is the number of the tier that has part i, or HOST."""

    def __init__(
        self,
        stack: TierStack,
        keys: Sequence[PartKey],
        until_s: float,
        lock: threading.Lock,
        progressed: Callable[[], None],
    ) -> None:
        """A tier that would hardly answer until then is not asked. `progressed` is called under the lock, on threads
        of the tiers."""
        self._stack = stack
        self._keys = keys
        self._until_s = until_s
        self._lock = lock
        self._progressed = progressed
        self._window = _FIRST_WINDOW
        self._is_asking = False
        self._lacking: set[int] = set()  # tiers that do not have the next part
        self.places: list[int] = []
        self.is_over = False

    # ------------------------------------------------------------------------------------ under the lock

    def advance(self) -> None:
        if self.is_over or self._is_asking:
            return
        num_here = self._stack.host.store.num_leading(self._keys[len(self.places) :])
        if num_here:
            self.places += [HOST] * num_here
            self._lacking.clear()
        if len(self.places) == len(self._keys):
            self.is_over = True
            return
        self._stack.host.counts.add(Count.MISSES)
        for index, tier in enumerate(self._stack.tiers):
            if index not in self._lacking and self._ask(index, tier):
                return
        self.is_over = True

    def search_again(self, first: int) -> None:
        """Host memory does not have part `first` any more."""
        del self.places[first:]
        self._lacking.clear()
        self.is_over = False
        self.advance()

    def stop(self) -> None:
        self.is_over = True

    def _ask(self, index: int, tier: Tier) -> bool:
        if not tier.can_read or self._stack.clock.now() + tier.speed.seconds_for(0) >= self._until_s:
            return False
        first = len(self.places)
        keys = self._keys[first : first + self._window]
        answer = partial(self._answered, index, first, len(keys))
        job = Job(lambda: answer(tier.count_prefix(keys)), lambda: answer(0))
        self._is_asking = tier.readers.post_first(job)
        return self._is_asking

    # ---------------------------------------------------------------------------- on threads of the tiers

    def _answered(self, index: int, first: int, num_asked: int, num_found: int) -> None:
        with self._lock:
            self._is_asking = False
            if first == len(self.places) and not self.is_over:  # else it is about what was searched before
                self._take(index, num_asked, num_found)
            self.advance()
            self._progressed()

    def _take(self, index: int, num_asked: int, num_found: int) -> None:
        if num_found:
            self.places += [index] * num_found
            self._lacking.clear()
        if num_found == num_asked:
            self._window = min(2 * self._window, _MAX_WINDOW)
        else:
            self._lacking.add(index)
            # Who was emptied lacks the rest as well: nobody is to believe that it has been stored.
            self._stack.tiers[index].known.discard(self._keys[len(self.places) :])

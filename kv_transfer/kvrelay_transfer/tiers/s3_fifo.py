"""S3-FIFO: an order of eviction that a scan of things asked for once does not flush.

New keys wait in a small queue; those that were used again before their turn go over to the main one, the others go, and
are remembered for a while as ghosts: who comes back goes to the main queue at once. There a key that was used since its
last turn gets another one. (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from kvrelay_transfer.tiers.eviction import Eviction, K

_SMALL_SHARE = 0.1
_MAX_USES = 3  # that are remembered


class S3Fifo(Eviction[K]):
    def __init__(self) -> None:
        self._small: OrderedDict[K, int] = OrderedDict()  # uses since it came, oldest first
        self._main: OrderedDict[K, int] = OrderedDict()  # uses since its last turn
        self._ghosts: OrderedDict[K, None] = OrderedDict()
        self._chosen: K | None = None  # the last victim: if it goes now, it was evicted

    def insert(self, key: K) -> None:
        was_here = key in self._ghosts
        self._ghosts.pop(key, None)
        (self._main if was_here else self._small)[key] = 0

    def touch(self, key: K) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(_MAX_USES, queue[key] + 1)

    def remove(self, key: K) -> None:
        is_evicted, self._chosen = key == self._chosen, None
        if self._small.pop(key, None) is None:
            del self._main[key]
        elif is_evicted:
            self._remember(key)

    def victim(self, may_go: Callable[[K], bool]) -> K | None:
        num_keys = len(self._small) + len(self._main)
        scans = [self._scan_small, self._scan_main]
        if len(self._small) < _SMALL_SHARE * num_keys:
            scans.reverse()
        for scan in scans:
            self._chosen = scan(may_go)
            if self._chosen is not None:
                break
        return self._chosen

    def _scan_small(self, may_go: Callable[[K], bool]) -> K | None:
        kept: list[tuple[K, int]] = []
        try:
            while self._small:
                key, uses = self._small.popitem(last=False)
                if uses > 1:
                    self._main[key] = 0
                    continue
                kept.append((key, uses))
                if may_go(key):
                    return key
            return None
        finally:
            _put_back(self._small, kept)

    def _scan_main(self, may_go: Callable[[K], bool]) -> K | None:
        kept: list[tuple[K, int]] = []
        try:
            while self._main:
                key, uses = self._main.popitem(last=False)
                if uses:
                    self._main[key] = uses - 1
                    continue
                kept.append((key, uses))
                if may_go(key):
                    return key
            return None
        finally:
            _put_back(self._main, kept)

    def _remember(self, key: K) -> None:
        self._ghosts[key] = None
        while len(self._ghosts) > max(1, len(self._main)):
            self._ghosts.popitem(last=False)


def _put_back(queue: OrderedDict[K, int], kept: list[tuple[K, int]]) -> None:
    """Those whose turn it was, where they were."""
    for key, uses in reversed(kept):
        queue[key] = uses
        queue.move_to_end(key, last=False)

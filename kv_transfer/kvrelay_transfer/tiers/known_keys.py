"""Which parts a tier has, as far as this process knows: those it put there or got from there, and those on the way.

A bounded number; what is forgotten is asked for again. What turns out to be gone is to be discarded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from kvrelay_transfer.tiers.part_key import PartKey

_MAX_KEYS = 1 << 16


class KnownKeys:
    """Thread-safe."""

    def __init__(self, max_keys: int = _MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._lock = threading.Lock()
        self._stored: OrderedDict[PartKey, None] = OrderedDict()
        self._claimed: set[PartKey] = set()

    def __contains__(self, key: PartKey) -> bool:
        """Stored, or being stored."""
        with self._lock:
            return key in self._stored or key in self._claimed

    def claim(self, key: PartKey) -> bool:
        """The caller stores it now, and tells by `settle` what came of it. False: it is stored or being stored."""
        with self._lock:
            if key in self._stored or key in self._claimed:
                return False
            self._claimed.add(key)
            return True

    def settle(self, key: PartKey, *, is_stored: bool) -> None:
        with self._lock:
            self._claimed.discard(key)
            if is_stored:
                self._add(key)

    def add(self, key: PartKey) -> None:
        with self._lock:
            self._add(key)

    def discard(self, keys: Iterable[PartKey]) -> None:
        with self._lock:
            for key in keys:
                self._stored.pop(key, None)

    def _add(self, key: PartKey) -> None:
        self._stored[key] = None
        self._stored.move_to_end(key)
        if len(self._stored) > self._max_keys:
            self._stored.popitem(last=False)

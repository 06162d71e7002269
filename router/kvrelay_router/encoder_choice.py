"""Which encoder gets which media item: the one that is known to have it, else the one with the least to do.

By the router's own memory, which may be wrong: an encoder that has evicted an item encodes it again. Bounded, the
items that were not asked for the longest are the first to be forgotten. Knows no sessions.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence

from kvrelay_router.placement import LoadAccount

MAX_ITEMS = 1 << 16  # about 10 MB


class EncoderChoice:
    def __init__(self, max_items: int = MAX_ITEMS) -> None:
        self.loads = LoadAccount()  # outstanding rows, each of as many patches as any other
        self._max_items = max_items
        self._holders: OrderedDict[bytes, str] = OrderedDict()

    def note(self, encoder: str, item: bytes) -> None:
        """`encoder` has the item now."""
        self._holders[item] = encoder
        self._holders.move_to_end(item)
        while len(self._holders) > self._max_items:
            self._holders.popitem(last=False)

    def assign(
        self, num_rows: Mapping[bytes, int], serving: Sequence[str], avoided: frozenset[str]
    ) -> dict[str, list[bytes]]:
        """Encoder -> its items. `num_rows`: what each item adds to the load. `serving` has at least one encoder;
        avoided ones get something only when there are no others."""
        candidates = [encoder for encoder in serving if encoder not in avoided] or list(serving)
        assigned: defaultdict[str, list[bytes]] = defaultdict(list)
        added: defaultdict[str, int] = defaultdict(int)
        for item, rows in num_rows.items():
            encoder = self._holders.get(item, "")
            if encoder not in candidates:
                encoder = min(candidates, key=lambda key: (self.loads.load_of(key) + added[key], key))
                added[encoder] += rows
            assigned[encoder].append(item)
        return dict(assigned)

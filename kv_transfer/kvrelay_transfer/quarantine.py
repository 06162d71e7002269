"""Destination blocks whose read was given up but has not ended: nobody may write or reuse them (PROTOCOL A5).

A block leaves the quarantine when its transfer reports a terminal state, and in no other way. A link (a connector to a
peer) that holds too many is to be torn down, which ends its transfers, at once or when the connector can. Links over
other connectors to the same peer are none the worse for it. Knows nothing of requests or pools.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from kvrelay_transfer.connectors.base import Transfer


@dataclass(slots=True, frozen=True, eq=False)
class _Held:
    peer_id: str
    connector: str
    transfer: Transfer
    blocks: tuple[int, ...]


class Quarantine:
    def __init__(self, max_blocks_per_link: int) -> None:
        self._max_blocks_per_link = max_blocks_per_link
        self._held: list[_Held] = []

    def add(self, peer_id: str, connector: str, transfer: Transfer, blocks: Iterable[int]) -> None:
        """Asks the transfer to end early and takes over its destination blocks."""
        transfer.abort()
        self._held.append(_Held(peer_id, connector, transfer, tuple(blocks)))

    def collect(self) -> list[int]:
        """Polls every transfer; returns the blocks that are free to be reused now."""
        freed: list[int] = []
        still_held: list[_Held] = []
        for held in self._held:
            if held.transfer.poll().is_terminal:
                freed += held.blocks
            else:
                still_held.append(held)
        self._held = still_held
        return freed

    @property
    def num_transfers(self) -> int:
        return len(self._held)

    @property
    def num_blocks(self) -> int:
        return sum(len(held.blocks) for held in self._held)

    def num_blocks_of(self, peer_id: str, connector: str) -> int:
        return sum(len(held.blocks) for held in self._held if (held.peer_id, held.connector) == (peer_id, connector))

    def links_over_cap(self) -> list[tuple[str, str]]:
        """(peer, connector) of links that are to be torn down."""
        num_blocks: Counter[tuple[str, str]] = Counter()
        for held in self._held:
            num_blocks[held.peer_id, held.connector] += len(held.blocks)
        return [link for link, count in num_blocks.items() if count > self._max_blocks_per_link]

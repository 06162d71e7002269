"""Blocks leave the quarantine when their transfer is terminal, and in no other way."""

from __future__ import annotations

import pytest

from kvrelay_transfer.connectors.base import Transfer, TransferState
from kvrelay_transfer.quarantine import Quarantine


class StubTransfer(Transfer):
    def __init__(self) -> None:
        self.state = TransferState.PENDING
        self.was_aborted = False

    def poll(self) -> TransferState:
        return self.state

    def abort(self) -> None:
        self.was_aborted = True


@pytest.mark.parametrize("end", [TransferState.DONE, TransferState.FAILED, TransferState.TORN_DOWN])
def test_blocks_are_held_until_their_transfer_ends(end: TransferState) -> None:
    quarantine = Quarantine(max_blocks_per_link=10)
    first, second = StubTransfer(), StubTransfer()
    quarantine.add("peer", "nixl", first, [1, 2])
    quarantine.add("peer", "nixl", second, [3])
    assert first.was_aborted and second.was_aborted
    assert quarantine.collect() == [] and quarantine.num_blocks == 3

    first.state = end
    assert quarantine.collect() == [1, 2]
    assert (quarantine.num_blocks, quarantine.num_transfers) == (1, 1)
    assert quarantine.collect() == []


def test_the_cap_is_per_link() -> None:
    quarantine = Quarantine(max_blocks_per_link=3)
    quarantine.add("slow", "nixl", StubTransfer(), [1, 2])
    quarantine.add("slow", "grpc", StubTransfer(), [8, 9])
    quarantine.add("other", "nixl", StubTransfer(), [3, 4, 5])
    assert quarantine.links_over_cap() == []
    quarantine.add("slow", "nixl", StubTransfer(), [6, 7])
    assert quarantine.links_over_cap() == [("slow", "nixl")]

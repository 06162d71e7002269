"""Only the engine start that issued a ticket accepts it, and only as it issued it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from handoff_sides import LAYOUT
from msgspec.structs import replace

from kvrelay_core.errors import TicketRejectedError
from kvrelay_core.request import AttemptId
from kvrelay_transfer.ticket import GroupBlocks, KvTicket, LeaseTerms, TicketSigner

EPOCH = b"e" * 16
SIGNER = TicketSigner(b"k" * 32, EPOCH)
TICKET = SIGNER.sign(
    KvTicket(
        ticket_id="t1",
        source_id="prefill-0",
        source_address="host:1",
        engine_epoch=EPOCH,
        attempt=AttemptId("router", "request", 1),
        model_fingerprint=b"m" * 32,
        layout=LAYOUT,
        groups=(GroupBlocks(0, 0, (3, 5), (30, 50)),),
        num_tokens=7,
        unit_hashes=b"h" * 32,
        lease=LeaseTerms(),
    )
)
ALTERED: dict[str, Any] = {
    "ticket_id": "t2",
    "source_id": "prefill-1",
    "source_address": "elsewhere:1",
    "attempt": AttemptId("router", "request", 2),
    "model_fingerprint": b"n" * 32,
    "layout": replace(LAYOUT, head_dim=16),
    "groups": (GroupBlocks(0, 0, (3, 6), (30, 50)),),
    "num_tokens": 8,
    "unit_hashes": b"i" * 32,
    "lease": LeaseTerms(wall_cap_s=1e9),
    "mac": b"x" * 32,
    "is_pinned": False,
    "more_layouts": (replace(LAYOUT, window=8),),
}


def test_a_ticket_survives_the_wire() -> None:
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(TICKET), type=KvTicket)
    assert copy == TICKET
    SIGNER.verify(copy)


def test_every_field_is_covered() -> None:
    assert set(ALTERED) == set(KvTicket.__struct_fields__) - {"engine_epoch"}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_field_is_refused(name: str) -> None:
    with pytest.raises(TicketRejectedError) as caught:
        SIGNER.verify(replace(TICKET, **{name: ALTERED[name]}))
    assert caught.value.metadata["cause"] == "mac"


def test_an_altered_word_is_refused() -> None:
    group = replace(TICKET.groups[0], words=(30, 51))
    with pytest.raises(TicketRejectedError):
        SIGNER.verify(replace(TICKET, groups=(group,)))


def test_a_forged_ticket_is_refused() -> None:
    with pytest.raises(TicketRejectedError):
        SIGNER.verify(TicketSigner(b"guessed".ljust(32), EPOCH).sign(TICKET))


def test_a_ticket_of_another_start_is_refused() -> None:
    restarted = TicketSigner(b"k" * 32, b"f" * 16)
    with pytest.raises(TicketRejectedError) as caught:
        restarted.verify(TICKET)
    assert caught.value.metadata["cause"] == "epoch"

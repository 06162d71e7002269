"""The encoder's engine: batches, the cache, leases, bad items; with a fake tower and a manual clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from encoder_rig import EncoderRig, hash_of, rows_of
from msgspec.structs import replace

from kvrelay_engine import messages
from kvrelay_engine.encoder_messages import EncodeItem
from kvrelay_transfer.ticket import EmbeddingTicket


@pytest.fixture
def rig() -> Iterator[EncoderRig]:
    rig = EncoderRig(max_patches=48)
    yield rig
    rig.close()


def read(rig: EncoderRig, ticket: EmbeddingTicket) -> torch.Tensor:
    return rig.memory.tensor[list(ticket.blocks)].flatten(0, 1)[: ticket.num_tokens]


def test_a_ticket_says_where_the_rows_are(rig: EncoderRig) -> None:
    ticket = rig.encode(b"picture")
    assert (ticket.content_hash, ticket.num_tokens, len(ticket.blocks)) == (hash_of(b"picture"), 7, 2)
    assert torch.equal(read(rig, ticket), rows_of(b"picture"))
    assert ticket.words == tuple(rig.memory.words.read(block) for block in ticket.blocks)
    assert rig.check().blocks_pinned == 2
    assert rig.release(ticket)
    rig.check_empty()


def test_items_of_several_requests_share_a_step_under_the_budget_of_patches(rig: EncoderRig) -> None:
    for request_id, data in enumerate((b"aaaa", b"bbbb", b"cccc", b"dddd", b"e" * 20)):
        rig.ask(request_id, data)
    rig.run()
    assert rig.tower.batches == [[b"aaaa", b"bbbb", b"cccc"], [b"dddd"], [b"e" * 20]]


def test_an_item_that_is_here_is_not_encoded_again(rig: EncoderRig) -> None:
    first = rig.encode(b"picture")
    rig.release(first)
    second = rig.encode(b"picture", request_id=2)
    assert len(rig.tower.batches) == 1 and rig.answer(2).was_cached
    assert (second.blocks, second.words) == (first.blocks, first.words)
    assert second.ticket_id != first.ticket_id


def test_an_item_asked_for_twice_at_the_same_time_is_encoded_once(rig: EncoderRig) -> None:
    for request_id in (1, 2, 3):
        rig.ask(request_id, b"picture")
    rig.engine.handle(messages.Abort(2, "test"))
    rig.run()
    assert rig.tower.batches == [[b"picture"]]
    tickets = [rig.answer(1).ticket, rig.answer(3).ticket]
    assert rig.check().leases == 2
    for ticket in tickets:
        assert ticket is not None and rig.release(ticket)
    rig.check_empty()


def test_an_item_nobody_waits_for_any_more_is_not_encoded(rig: EncoderRig) -> None:
    rig.ask(1, b"picture")
    rig.engine.handle(messages.Abort(1, "test"))
    rig.run()
    assert rig.tower.batches == [] and rig.events == []
    rig.check_empty()


def test_what_is_decoded_does_not_wait_for_what_is_not(rig: EncoderRig) -> None:
    rig.decoder.held = {b"large", b"vast"}
    for request_id, data in enumerate((b"large", b"one.", b"vast", b"two.")):
        rig.ask(request_id, data)
    rig.run()
    assert rig.tower.batches == [[b"one.", b"two."]] and rig.engine.is_decoding
    rig.decoder.held = set()
    rig.run()
    assert rig.tower.batches[1] == [b"large", b"vast"] and not rig.engine.is_decoding


def test_what_is_ready_is_encoded_in_the_order_in_which_it_came(rig: EncoderRig) -> None:
    rig.decoder.held = {b"one."}
    held = rig.encode(b"x" * 4 * 36, 9)  # there is no room
    for request_id, data in enumerate((b"one.", b"two." * 4)):
        rig.ask(request_id, data)
    rig.engine.step()
    rig.decoder.held = set()
    rig.engine.step()
    rig.release(held)
    rig.run()
    assert rig.tower.batches[1:] == [[b"one."], [b"two." * 4]]


def test_an_item_that_is_given_up_while_it_is_decoded_is_not_encoded(rig: EncoderRig) -> None:
    rig.decoder.held = {b"picture"}
    rig.ask(1, b"picture")
    rig.engine.step()
    rig.engine.handle(messages.Abort(1, "test"))
    assert rig.decoder.is_idle, "the decoder was told"
    rig.decoder.held = set()
    rig.run()
    assert rig.tower.batches == [] and rig.events == []
    rig.check_empty()


def test_an_item_asked_for_anew_is_decoded_anew(rig: EncoderRig) -> None:
    rig.decoder.held = {b"picture"}
    rig.ask(1, b"picture")
    rig.engine.handle(messages.Abort(1, "test"))
    rig.ask(2, b"picture")
    rig.decoder.held = set()
    rig.run()
    assert rig.tower.batches == [[b"picture"]] and rig.answer(2).ticket is not None


def test_what_a_processor_trips_over_is_an_error_too(rig: EncoderRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def trip(data: bytes) -> None:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(rig.tower, "process", trip)
    rig.ask(1, b"picture")
    rig.run()
    assert rig.error(1) == "InternalError"
    rig.check_empty()


def test_a_bad_item_is_an_error_of_its_own(rig: EncoderRig) -> None:
    rig.ask(1, b"good")
    rig.ask(2, b"bad")
    rig.run()
    assert rig.error(2) == "InvalidRequestError"
    assert rig.answer(1).ticket is not None


def test_an_item_that_breaks_the_tower_does_not_take_others_along(rig: EncoderRig) -> None:
    rig.tower.poison = b"pois"
    for request_id, data in enumerate((b"one.", b"pois", b"two.")):
        rig.ask(request_id, data)
    rig.run()
    assert rig.error(1) == "InternalError"
    for request_id in (0, 2):
        ticket = rig.answer(request_id).ticket
        assert ticket is not None and rig.release(ticket)
    rig.check_empty()


def test_the_least_recently_used_item_goes_first_and_its_words_change(rig: EncoderRig) -> None:
    items = [bytes([letter]) * 4 * 13 for letter in b"abc"]  # 13 of 39 blocks each
    tickets = [rig.encode(data, request_id) for request_id, data in enumerate(items)]
    for ticket in tickets:
        rig.release(ticket)
    rig.release(rig.encode(items[0], 7))  # used again: b is the oldest now
    rig.release(rig.encode(b"d" * 4, 8))
    assert rig.cache.find(hash_of(items[1])) is None
    assert rig.cache.find(hash_of(items[0])) is not None and rig.cache.find(hash_of(items[2])) is not None
    words = tuple(map(rig.memory.words.read, tickets[1].blocks))
    assert sum(now != before for now, before in zip(words, tickets[1].words, strict=True)) == 1
    rig.check_empty()


def test_a_lease_ends_with_its_time_and_the_item_stays(rig: EncoderRig) -> None:
    ticket = rig.encode(b"picture")
    rig.clock.advance(ticket.lease.first_follow_s - 0.1)
    rig.engine.step()
    assert rig.check().leases == 1
    rig.clock.advance(0.1)
    rig.engine.step()
    load = rig.check()
    assert (load.leases, load.expired_leases, load.blocks_in_use) == (0, 1, 0)
    assert not rig.release(ticket)
    rig.encode(b"picture", request_id=2)
    assert rig.answer(2).was_cached


def test_an_item_waits_for_blocks_that_leases_hold(rig: EncoderRig) -> None:
    held = rig.encode(b"x" * 4 * 30)
    rig.ask(2, b"y" * 4 * 20)
    rig.run()
    assert len(rig.tower.batches) == 1, "there is no room"
    rig.release(held)
    rig.run()
    assert rig.answer(2).ticket is not None


def test_an_item_that_waits_too_long_for_room_is_refused(rig: EncoderRig) -> None:
    rig.encode(b"x" * 4 * 30)
    rig.ask(2, b"y" * 4 * 20)
    rig.engine.step()
    rig.clock.advance(2.0)
    rig.engine.step()
    assert rig.error(2) == "OverloadedError"
    assert not rig.engine.has_jobs


def test_an_item_larger_than_the_pool_is_refused(rig: EncoderRig) -> None:
    rig.ask(1, b"x" * 4 * 40)
    rig.run()
    assert rig.error(1) == "PoolExhaustedError"
    rig.check_empty()


def test_waiting_bytes_are_bounded(rig: EncoderRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay_engine.encoder.engine.MAX_QUEUED_BYTES", 10)
    rig.ask(1, b"12345678")
    rig.ask(2, b"abc")
    assert rig.error(2) == "OverloadedError"
    rig.run()
    rig.ask(3, b"abc")
    rig.run()
    assert rig.answer(3).ticket is not None


def test_a_draining_encoder_takes_nothing_new(rig: EncoderRig) -> None:
    rig.ask(1, b"before")
    rig.engine.handle(messages.Drain())
    rig.ask(2, b"after")
    rig.run()
    assert rig.error(2) == "DrainingError" and rig.answer(1).ticket is not None


def test_foreign_and_altered_tickets_open_nothing(rig: EncoderRig) -> None:
    ticket = rig.encode(b"picture")
    for forged in (replace(ticket, num_tokens=8), replace(ticket, engine_epoch=b"x" * 16)):
        rig.engine.handle(messages.Export(1, forged, 0, ticket.blocks[:1], 0))
        exported = rig.events.pop()
        assert isinstance(exported, messages.Exported) and exported.error is not None
        assert exported.error.reason == "TicketRejectedError"
        assert not rig.release(forged)
    rig.engine.handle(messages.Export(1, ticket, 0, (max(ticket.blocks) + 1,), 0))
    exported = rig.events.pop()
    assert isinstance(exported, messages.Exported) and exported.error is not None
    assert rig.check().leases == 1


def test_a_leaked_reference_is_found(rig: EncoderRig) -> None:
    ticket = rig.encode(b"picture")
    rig.cache.pool.pin(ticket.blocks)
    with pytest.raises(AssertionError, match="references"):
        rig.engine.check_integrity()
    rig.cache.pool.release(ticket.blocks)


def test_closing_leaves_nothing(rig: EncoderRig) -> None:
    rig.encode(b"picture")
    rig.engine.handle(EncodeItem(5, hash_of(b"more"), b"more"))
    rig.engine.handle(messages.Shutdown())
    rig.check_empty()

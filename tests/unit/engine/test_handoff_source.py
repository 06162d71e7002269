"""The prefill side of hand-offs: what a reader is told, when pins come back, which tickets are refused."""

from __future__ import annotations

import pytest
from handoff_sides import LAYOUT, MODEL, SourceSide, fill_block, first_tokens, make_sequence
from msgspec.structs import replace

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import InternalError, RequestCancelledError
from kvrelay_engine.messages import (
    Command,
    Drain,
    Event,
    Export,
    Exported,
    FollowAttach,
    FollowAttached,
    FollowBeat,
    FollowComplete,
    FollowFailed,
    FollowLost,
    FollowReady,
    FollowRelease,
    PrefillStreamClosed,
    Released,
    ReleaseReason,
    ReleaseTicket,
)
from kvrelay_transfer.ticket import GroupBlocks, KvTicket, LeaseTerms, TicketSigner

FOLLOW = 11
TOKENS = list(range(100, 118))  # 18 tokens: four full blocks and half of one


class Prefill:
    """A source side with its clock; `tell` gives the source a command and returns what it emitted."""

    def __init__(self, **options: object) -> None:
        self.clock = ManualClock()
        self.side = SourceSide(self.clock, **options)  # type: ignore[arg-type]
        self.source = self.side.source

    def tell(self, *commands: Command) -> list[Event]:
        self.side.take_events()
        for command in commands:
            self.source.handle(command)
        return self.side.take_events()

    def pass_time(self, seconds: float) -> list[Event]:
        self.side.take_events()
        self.clock.advance(seconds)
        self.source.tick()
        return self.side.take_events()

    def assert_all_free(self) -> None:
        self.side.pool.check_integrity()
        assert self.source.num_leases == self.source.num_pinned == 0
        assert self.side.pool.num_in_use == 0


@pytest.fixture
def prefill() -> Prefill:
    return Prefill()


def failure_of(events: list[Event]) -> str:
    (failed,) = events
    assert isinstance(failed, FollowFailed)
    return failed.error.reason


# -------------------------------------------------------------------------------------------------- the ticket


def test_a_ticket_lists_blocks_words_and_hashes(prefill: Prefill) -> None:
    sequence = make_sequence(TOKENS)
    ticket = prefill.side.accept(sequence)
    prefill.side.signer.verify(ticket)
    words = tuple(prefill.side.pool.word(block) for block in sequence.blocks)
    assert ticket.groups == (GroupBlocks(0, 0, tuple(sequence.blocks), words),)
    assert (ticket.num_tokens, ticket.layout, ticket.model_fingerprint) == (18, LAYOUT, MODEL)
    assert ticket.unit_hashes == sequence.chain.cover(TOKENS) and len(ticket.unit_hashes) == 3 * 32  # two units, a rest
    assert (ticket.source_id, ticket.source_address) == ("prefill-0", "prefill:1")


def test_blocks_reserved_beyond_the_tokens_are_not_in_the_ticket(prefill: Prefill) -> None:
    sequence = make_sequence(TOKENS)
    sequence.blocks = prefill.side.pool.reserve(7)
    assert prefill.source.accept(sequence).groups[0].blocks == tuple(sequence.blocks[:5])


def test_the_wall_cap_grows_with_the_bytes() -> None:
    layout = replace(LAYOUT, num_layers=64, num_kv_heads=64, head_dim=128)  # 16 MiB a block
    prefill = Prefill(layout=layout, num_blocks=40)
    sequence = make_sequence(list(range(35 * 4)), layout=layout)
    sequence.blocks = prefill.side.pool.reserve(35)
    ticket = prefill.source.accept(sequence)
    assert ticket.lease.wall_cap_s == pytest.approx(4 * 35 * layout.block_bytes / 0.2e9)
    assert ticket.lease.wall_cap_s > 10.0
    short = make_sequence([1, 2], request_id=2, layout=layout)
    short.blocks = prefill.side.pool.reserve(1)
    assert prefill.source.accept(short).lease.wall_cap_s == 10.0


# ------------------------------------------------------------------------------------------ what a reader hears


def test_a_follower_hears_each_step_of_the_prefill(prefill: Prefill) -> None:
    sequence = make_sequence(TOKENS)
    ticket = prefill.side.accept(sequence)
    attached = prefill.tell(FollowAttach(FOLLOW, ticket))
    assert attached == [FollowAttached(FOLLOW, ticket.lease), FollowReady(FOLLOW, (0,))]

    prefill.source.sealed(sequence, 1)
    prefill.source.sealed(sequence, 1)
    prefill.source.sealed(sequence, 4)
    prefill.source.finished(sequence, first_tokens())
    group = ticket.groups[0]
    partial = (GroupBlocks(0, 16, group.blocks[4:], group.words[4:]),)
    assert prefill.side.take_events() == [
        FollowReady(FOLLOW, (1,)),
        FollowReady(FOLLOW, (4,)),
        FollowComplete(FOLLOW, first_tokens(), partial),
    ]


def test_ready_never_counts_the_partial_block(prefill: Prefill) -> None:
    sequence = make_sequence(TOKENS)
    prefill.tell(FollowAttach(FOLLOW, prefill.side.accept(sequence)))
    prefill.source.sealed(sequence, 5)
    assert prefill.side.take_events() == [FollowReady(FOLLOW, (4,))]


def test_an_aligned_prompt_has_no_partial_block(prefill: Prefill) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS[:16]))
    complete = prefill.tell(FollowAttach(FOLLOW, ticket))[-1]
    assert complete == FollowComplete(FOLLOW, first_tokens(), ())


def test_cached_blocks_are_ready_from_the_start(prefill: Prefill) -> None:
    sequence = make_sequence(TOKENS)
    sequence.num_computed = 8
    ticket = prefill.side.accept(sequence)
    assert prefill.tell(FollowAttach(FOLLOW, ticket))[1] == FollowReady(FOLLOW, (2,))


def test_a_late_follower_hears_everything_at_once(prefill: Prefill) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS, num_choices=2), num_choices=2)
    attached, ready, complete = prefill.tell(FollowAttach(FOLLOW, ticket))
    assert isinstance(attached, FollowAttached)
    assert ready == FollowReady(FOLLOW, (4,))
    assert isinstance(complete, FollowComplete) and complete.first_tokens == first_tokens(2)


def test_a_follower_that_comes_back_hears_it_again(prefill: Prefill) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS))
    first = prefill.tell(FollowAttach(FOLLOW, ticket))
    again = prefill.tell(FollowLost(FOLLOW), FollowAttach(FOLLOW, ticket))
    assert again == first


def test_a_lost_follower_is_told_nothing(prefill: Prefill) -> None:
    sequence = make_sequence(TOKENS)
    prefill.tell(FollowAttach(FOLLOW, prefill.side.accept(sequence)), FollowLost(FOLLOW))
    prefill.source.sealed(sequence, 4)
    prefill.source.finished(sequence, first_tokens())
    assert prefill.side.take_events() == []


def test_a_second_follower_supersedes_the_first(prefill: Prefill) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS))
    prefill.tell(FollowAttach(FOLLOW, ticket))
    events = prefill.tell(FollowAttach(FOLLOW + 1, ticket))
    assert failure_of(events[:1]) == "SupersededError"
    assert isinstance(events[1], FollowAttached)


# -------------------------------------------------------------------------------------------- when pins come back


@pytest.mark.parametrize("reason", [ReleaseReason.PULLED, ReleaseReason.CANCELLED, ReleaseReason.FAILED])
def test_a_reader_that_leaves_frees_at_once(prefill: Prefill, reason: ReleaseReason) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS))
    assert prefill.source.num_pinned == 5
    prefill.tell(FollowAttach(FOLLOW, ticket))
    assert prefill.tell(FollowRelease(FOLLOW, reason), FollowRelease(FOLLOW, reason)) == []
    prefill.assert_all_free()


def test_a_refused_ticket_serves_another_reader(prefill: Prefill) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS))
    prefill.tell(FollowAttach(FOLLOW, ticket), FollowRelease(FOLLOW, ReleaseReason.REFUSED))
    assert prefill.source.num_pinned == 5
    assert len(prefill.tell(FollowAttach(FOLLOW + 1, ticket))) == 3


def test_blocks_stay_pinned_after_the_request_is_over(prefill: Prefill) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS))
    assert all(prefill.side.pool.references(block) == 1 for block in ticket.groups[0].blocks)
    prefill.tell(PrefillStreamClosed(1))
    prefill.assert_all_free()


def test_a_followed_ticket_survives_the_prefill_stream(prefill: Prefill) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS))
    prefill.tell(FollowAttach(FOLLOW, ticket), PrefillStreamClosed(1))
    assert prefill.source.num_pinned == 5


def test_release_by_call_is_idempotent_and_tells_the_follower(prefill: Prefill) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS))
    prefill.tell(FollowAttach(FOLLOW, ticket))
    events = prefill.tell(ReleaseTicket(1, ticket), ReleaseTicket(2, ticket))
    assert failure_of(events[:1]) == "LeaseExpiredError"
    assert events[1:] == [Released(1, True), Released(2, False)]
    prefill.assert_all_free()


def test_a_failed_request_tells_its_error_and_frees(prefill: Prefill) -> None:
    sequence = make_sequence(TOKENS)
    prefill.tell(FollowAttach(FOLLOW, prefill.side.accept(sequence)))
    prefill.source.failed(1, RequestCancelledError("cancelled"))
    assert failure_of(prefill.side.take_events()) == "RequestCancelledError"
    prefill.source.failed(1, RequestCancelledError("cancelled"))
    prefill.side.pool.release(sequence.blocks)
    prefill.assert_all_free()


def test_blocks_come_back_only_after_the_last_step_that_touches_them(prefill: Prefill) -> None:
    sequence = make_sequence(TOKENS)
    prefill.side.accept(sequence)
    sequence.last_step = 3
    prefill.side.pool.release(sequence.blocks, sequence.last_step)
    prefill.tell(PrefillStreamClosed(1))
    free_before = prefill.side.pool.num_free
    prefill.side.pool.complete_step(3)
    assert prefill.side.pool.num_free == free_before + 5
    prefill.assert_all_free()


# ------------------------------------------------------------------------------------------------------- expiry


def test_a_hung_reader_loses_its_lease_and_is_told(prefill: Prefill) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS))
    prefill.tell(FollowAttach(FOLLOW, ticket))
    assert prefill.pass_time(2.0) == []
    prefill.tell(FollowBeat(FOLLOW))
    assert prefill.pass_time(2.0) == []
    assert failure_of(prefill.pass_time(1.0)) == "LeaseExpiredError"
    assert prefill.source.num_expired == 1
    prefill.assert_all_free()
    assert failure_of(prefill.tell(FollowAttach(FOLLOW + 1, ticket))) == "LeaseExpiredError"


def test_a_ticket_that_nobody_follows_expires(prefill: Prefill) -> None:
    prefill.side.prefill(make_sequence(TOKENS))
    assert prefill.pass_time(30.0) == []
    assert prefill.source.num_expired == 1
    prefill.assert_all_free()


def test_a_reader_that_pulls_for_ever_meets_the_wall_cap() -> None:
    prefill = Prefill(terms=LeaseTerms(wall_cap_s=2.5))
    prefill.tell(FollowAttach(FOLLOW, prefill.side.prefill(make_sequence(TOKENS))))
    for _ in range(2):
        assert prefill.pass_time(1.0) == []
        prefill.tell(FollowBeat(FOLLOW))
    assert failure_of(prefill.pass_time(1.0)) == "LeaseExpiredError"
    prefill.assert_all_free()


def test_sealing_goes_on_silently_after_the_lease_has_ended(prefill: Prefill) -> None:
    sequence = make_sequence(TOKENS)
    prefill.side.accept(sequence)
    prefill.tell(PrefillStreamClosed(1))
    prefill.source.sealed(sequence, 4)
    prefill.source.finished(sequence, first_tokens())
    assert prefill.side.take_events() == []


# ---------------------------------------------------------------------------------------- the cap on pinned blocks


def test_the_pinned_share_is_capped_in_unique_blocks() -> None:
    prefill = Prefill(num_blocks=21, max_pinned_share=0.5)
    assert prefill.source.max_pinned_blocks == 10
    first = make_sequence(TOKENS)
    prefill.side.accept(first)
    assert prefill.source.can_accept(5) and not prefill.source.can_accept(6)
    pinned = set(first.blocks)
    assert prefill.source.can_accept(5, pinned) and not prefill.source.can_accept(6, pinned)
    shared = make_sequence(TOKENS, request_id=2)
    shared.blocks = first.blocks
    prefill.source.accept(shared)
    assert prefill.source.num_pinned == 5 and prefill.source.num_leases == 2
    prefill.tell(PrefillStreamClosed(1))
    assert prefill.source.num_pinned == 5
    prefill.tell(PrefillStreamClosed(2))
    assert prefill.source.num_pinned == 0


# ------------------------------------------------------------------------------------------------- bad tickets


def bad_tickets(prefill: Prefill) -> dict[str, KvTicket]:
    ticket = prefill.side.prefill(make_sequence(TOKENS))
    forged = TicketSigner(b"guess".ljust(32), ticket.engine_epoch).sign(ticket)
    other_epoch = replace(ticket, engine_epoch=b"f" * 16)
    of_other_start = TicketSigner(b"k" * 32, b"f" * 16).sign(other_epoch)
    return {
        "forged": forged,
        "altered": replace(ticket, num_tokens=17),
        "epoch": other_epoch,
        "of another start": of_other_start,
    }


@pytest.mark.parametrize("kind", ["forged", "altered", "epoch", "of another start"])
def test_a_bad_ticket_is_good_for_nothing(prefill: Prefill, kind: str) -> None:
    ticket = bad_tickets(prefill)[kind]
    assert failure_of(prefill.tell(FollowAttach(FOLLOW, ticket))) == "TicketRejectedError"
    (released,) = prefill.tell(ReleaseTicket(1, ticket))
    assert isinstance(released, Released) and not released.released
    assert released.error is not None and released.error.reason == "TicketRejectedError"
    (exported,) = prefill.tell(Export(1, ticket, 0, ticket.groups[0].blocks[:1], 0))
    assert isinstance(exported, Exported) and exported.words == ()
    assert exported.error is not None and exported.error.reason == "TicketRejectedError"
    with prefill.side.slots.slot(0) as slot:
        assert not any(slot), "nothing was copied"
    assert prefill.source.num_pinned == 5


# ------------------------------------------------------------------------------------------------------ exports


def test_an_export_copies_blocks_then_reads_their_words(prefill: Prefill) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS))
    blocks = ticket.groups[0].blocks
    (exported,) = prefill.tell(Export(9, ticket, 0, (blocks[3], blocks[4]), 2))
    assert exported == Exported(9, ticket.groups[0].words[3:5])
    expected = bytes(prefill.side.memory.block_rows[[blocks[3], blocks[4]]].flatten().tolist())
    with prefill.side.slots.slot(2) as slot:
        assert bytes(slot[: len(expected)]) == expected


def test_words_of_an_export_are_read_after_the_copy(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = prefill.side.prefill(make_sequence(TOKENS))
    copy_out = prefill.side.staging.copy_out

    def reuse_while_copying(blocks: tuple[int, ...], slot: int) -> None:
        copy_out(blocks, slot)
        prefill.side.overwrite(blocks[0])

    monkeypatch.setattr(prefill.side.staging, "copy_out", reuse_while_copying)
    (exported,) = prefill.tell(Export(1, ticket, 0, ticket.groups[0].blocks[:2], 0))
    assert isinstance(exported, Exported)
    assert exported.words[0] != ticket.groups[0].words[0]
    assert exported.words[1] == ticket.groups[0].words[1]


def test_only_sealed_blocks_of_the_ticket_are_exported(prefill: Prefill) -> None:
    sequence = make_sequence(TOKENS)
    ticket = prefill.side.accept(sequence)
    prefill.source.sealed(sequence, 2)
    blocks = ticket.groups[0].blocks
    unlisted = max(blocks) + 1
    fill_block(prefill.side.memory, unlisted, seed=1)

    def is_exported(block: int, group: int = 0) -> bool:
        (exported,) = prefill.tell(Export(1, ticket, group, (block,), 0))
        assert isinstance(exported, Exported)
        return exported.error is None

    assert [is_exported(block) for block in blocks] == [True, True, False, False, False]
    assert not is_exported(unlisted)
    assert not is_exported(blocks[0], group=1)
    prefill.source.finished(sequence, first_tokens())
    assert all(is_exported(block) for block in blocks)
    prefill.tell(PrefillStreamClosed(1))
    assert not is_exported(blocks[0]), "the lease has ended"


def test_a_command_for_somebody_else_is_a_bug(prefill: Prefill) -> None:
    with pytest.raises(InternalError, match="Drain"):
        prefill.source.handle(Drain())

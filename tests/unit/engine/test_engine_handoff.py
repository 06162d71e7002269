"""A prefill and a decode engine in one process: what arrives, what breaks, and that nothing is ever left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_rig import EnginePair, attempt_of, make_generation, prompt_of
from fake_runner import continuation

from kvrelay_core.errors import DeadlineError
from kvrelay_core.request import AttemptId, ChoiceState, ErrorInfo, FinishReason
from kvrelay_engine import messages
from kvrelay_transfer.connectors.base import LinkSpeed, Transfer, TransferState
from kvrelay_transfer.connectors.memory import MemoryTransfer


@pytest.fixture
def pairs() -> Iterator[list[EnginePair]]:
    made: list[EnginePair] = []
    yield made
    for pair in made:
        pair.check_empty()
        pair.close()


@pytest.fixture
def pair(pairs: list[EnginePair]) -> EnginePair:
    return make_pair(pairs)


def make_pair(pairs: list[EnginePair], **changes: Any) -> EnginePair:
    pair = EnginePair(**changes)
    pairs.append(pair)
    return pair


def run_until(pair: EnginePair, event_type: type[messages.Event], max_turns: int = 200) -> None:
    for _ in range(max_turns):
        pair.turn()
        if pair.reader.of(event_type) or pair.source.of(event_type):
            return
    raise AssertionError(f"no {event_type.__name__}")


# ------------------------------------------------------------------------------------------ it arrives


@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 33])
@pytest.mark.parametrize("chunk", [8, 11, 64])
def test_the_relay_is_exact_for_every_length_and_chunk_size(pairs: list[EnginePair], length: int, chunk: int) -> None:
    pair = make_pair(pairs, prefill={"max_batched_tokens": chunk})
    pair.submit(1, make_generation(prompt_of(length), 10))
    pair.run()
    assert pair.answer(1) == continuation(prompt_of(length), 10)
    assert pair.reader.tokens(1) == pair.answer(1)  # position 0 echoed
    assert pair.finish_reason(1) is FinishReason.LENGTH
    assert sum(map(sum, pair.reader.runner.batches)) == 9  # decode computed no prompt token
    assert pair.reader.the(messages.HandoffDone).timing.blocks_pulled == -(-length // 4)


@pytest.mark.parametrize(("theirs", "ours"), [(2, 8), (8, 2), (4, 16)])
@pytest.mark.parametrize("chunk", [11, 64])
def test_the_relay_is_exact_between_blocks_of_other_sizes(
    pairs: list[EnginePair], theirs: int, ours: int, chunk: int
) -> None:
    """Cold, then behind a prefix that both caches know, with several choices that share a partial block."""
    pair = make_pair(
        pairs, prefill={"block_tokens": theirs, "max_batched_tokens": chunk}, decode={"block_tokens": ours}
    )
    for index, length in enumerate([1, 7, 8, 9, 31, 32, 33, 47]):
        pair.submit(index, make_generation(prompt_of(length), 10, num_choices=1 + index % 2))
        pair.run()
        for choice in range(1 + index % 2):
            assert pair.answer(index, choice) == continuation(prompt_of(length), 10)
    assert pair.reader.of(messages.HandoffDone)[-1].timing.blocks_reused > 0
    assert not pair.reader.of(messages.RequestFailed)


def test_many_at_once_with_choices(pair: EnginePair) -> None:
    for index in range(6):
        pair.submit(index, make_generation(prompt_of(4 + 5 * index, index), 7, num_choices=1 + index % 2))
    pair.run()
    for index in range(6):
        for choice in range(1 + index % 2):
            assert pair.answer(index, choice) == continuation(prompt_of(4 + 5 * index, index), 7)


def test_pulling_begins_while_prefill_still_computes(pairs: list[EnginePair]) -> None:
    pair = make_pair(pairs, prefill={"max_batched_tokens": 8})
    pair.submit(1, make_generation(prompt_of(48), 3))
    for _ in range(4):
        pair.turn()
    assert not pair.source.of(messages.PrefillFinished)
    assert pair.reader.load().handoff_bytes > 0
    pair.run()


def test_prefix_hits_on_both_sides(pair: EnginePair) -> None:
    for request_id, length in ((1, 20), (2, 26)):
        pair.submit(request_id, make_generation(prompt_of(length), 4))
        pair.run()
    assert [event.cached_tokens for event in pair.source.of(messages.Accepted)] == [0, 20]
    timings = [event.timing for event in pair.reader.of(messages.HandoffDone)]
    assert [(timing.blocks_pulled, timing.blocks_reused) for timing in timings] == [(5, 0), (2, 5)]
    assert pair.answer(2) == continuation(prompt_of(26), 4)


def test_a_first_token_that_ends_its_choice_ends_it_on_decode(pair: EnginePair) -> None:
    prompt = prompt_of(9)
    (token,) = continuation(prompt, 1)
    pair.submit(1, make_generation(prompt, 8, eos_token_ids=(token,)))
    pair.run()
    assert pair.answer(1) == [token]
    assert pair.reader.finish(1) == messages.ChoiceFinished(1, 0, FinishReason.STOP, 1, token)


def test_committed_tokens_travel_as_input(pair: EnginePair) -> None:
    prompt, answer = prompt_of(6), continuation(prompt_of(6), 9)
    pair.submit(1, make_generation(prompt, 9, committed=tuple(answer[:3])))
    pair.run()
    assert pair.answer(1) == answer[3:]
    assert pair.source.the(messages.PrefillFinished).first_tokens[0].position == 3


def test_the_pinned_share_holds_up_prefill_and_starves_nobody(pairs: list[EnginePair]) -> None:
    pair = make_pair(pairs, prefill={"kv_blocks": 21, "max_pinned_share": 0.5, "max_batched_tokens": 64})
    for index in range(6):
        pair.submit(index, make_generation(prompt_of(24, index), 4))
    most_pinned = 0
    while pair.turn():
        most_pinned = max(most_pinned, pair.source.load().blocks_pinned)
    assert 6 <= most_pinned <= 10
    for index in range(6):
        assert pair.answer(index) == continuation(prompt_of(24, index), 4)


# -------------------------------------------------------------------------------------------- it breaks


@pytest.mark.parametrize("turns", range(12))
@pytest.mark.parametrize("lands_reads", [True, False])
def test_abort_on_both_sides_at_every_turn(pairs: list[EnginePair], turns: int, lands_reads: bool) -> None:
    pair = make_pair(pairs, prefill={"max_batched_tokens": 8})
    pair.lands_reads = lands_reads
    pair.submit(1, make_generation(prompt_of(30), 20, num_choices=2))
    for _ in range(turns):
        pair.turn()
    pair.reader.abort(1)
    pair.source.abort(1)
    pair.turn()
    assert pair.reader.load().blocks_quarantined == pair.reader.load().blocks_in_use  # only what reads still own
    pair.lands_reads = True
    pair.run()


@pytest.mark.parametrize("turns", range(2, 10))
def test_a_lost_follow_is_resumed_from_the_committed_tokens(pairs: list[EnginePair], turns: int) -> None:
    pair = make_pair(pairs, prefill={"max_batched_tokens": 8})
    prompt = prompt_of(30)
    pair.submit(1, make_generation(prompt, 8))
    for _ in range(turns):
        pair.turn()
    pair.reader.engine.handle(messages.HandoffFailed(1, error_info()))
    for _ in range(20):
        pair.turn()
    is_lost = bool(pair.reader.of(messages.HandoffLost))
    assert is_lost is not bool(pair.reader.of(messages.HandoffDone))
    assert is_lost or turns > 3
    assert not is_lost or pair.reader.load().blocks_in_use == 0  # what waits for the router holds nothing
    pair.reader.engine.handle(messages.Resume(1, (ChoiceState(0, tuple(pair.answer(1))),)))
    pair.run()
    assert pair.answer(1) == continuation(prompt, 8)
    if is_lost:
        computed = sum(map(sum, pair.reader.runner.batches))
        verified = pair.reader.the(messages.HandoffLost).verified_tokens
        assert computed == 30 - verified + 7  # verified blocks are not computed again


def test_several_choices_resume_with_their_own_tokens(pair: EnginePair) -> None:
    pair.lands_reads = False
    prompt = prompt_of(10)
    pair.submit(1, make_generation(prompt, 6, num_choices=3))
    run_until(pair, messages.PrefillFinished)
    pair.reader.engine.handle(messages.HandoffFailed(1, error_info()))
    run_until(pair, messages.HandoffLost)
    first = continuation(prompt, 1)[0]
    other = (first + 1) % 97  # as if it had been sampled
    choices = (ChoiceState(0, (first,)), ChoiceState(1, (other,)), ChoiceState(2))
    del pair.committed[1, 1]
    pair.reader.engine.handle(messages.Resume(1, choices))
    pair.lands_reads = True
    pair.run()
    assert pair.reader.tokens(1, 0) == continuation(prompt, 6)[1:]
    assert pair.reader.tokens(1, 1) == continuation([*prompt, other], 5)
    assert pair.reader.tokens(1, 2) == continuation(prompt, 6)


def test_a_lost_handoff_waits_for_the_router_only_so_long(pair: EnginePair) -> None:
    pair.submit(1, make_generation(prompt_of(12), 6))
    pair.turn()
    pair.reader.engine.handle(messages.HandoffFailed(1, error_info()))
    run_until(pair, messages.HandoffLost)
    assert pair.reader.load().requests_waiting_remote_kv == 1
    pair.clock.advance(10.1)
    pair.run()
    assert pair.reader.error(1) == "HandoffError"


def test_an_idle_engine_looks_as_often_as_suits_the_connector(
    pair: EnginePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryTransfer, "poll_s", 0.00005)
    pair.lands_reads = False
    pair.submit(1, make_generation(prompt_of(12), 6))
    assert pair.reader.engine.remote_kv.poll_s == Transfer.poll_s
    while not pair.fabric.pending:
        pair.turn()
    assert pair.reader.engine.remote_kv.poll_s == 0.00005
    pair.lands_reads = True
    pair.run()
    assert pair.reader.engine.remote_kv.poll_s == Transfer.poll_s


@pytest.mark.parametrize(("gb_per_s", "waits"), [(100.0, True), (1e-6, False), (0.0, False)])
def test_a_step_waits_for_kv_that_is_due_at_once(
    pair: EnginePair, monkeypatch: pytest.MonkeyPatch, gb_per_s: float, waits: bool
) -> None:
    """Over a quick link, whose read lands while the step waits."""
    looks: list[MemoryTransfer] = []
    poll = MemoryTransfer.poll

    def land_at_the_third_look(transfer: MemoryTransfer) -> TransferState:
        looks.append(transfer)
        if looks.count(transfer) == 3:
            transfer.land()
        return poll(transfer)

    monkeypatch.setattr(MemoryTransfer, "poll_s", 0.00005)
    monkeypatch.setattr(MemoryTransfer, "poll", land_at_the_third_look)
    pair.lands_reads = False
    pair.submit(1, make_generation(prompt_of(12), 6))
    run_until(pair, messages.PeerConnected)
    link = pair.reader.engine.remote_kv.reader.peers.records.find(pair.source.peer.peer_id, "memory")
    link.speed, link.is_judged = LinkSpeed(gb_per_s), True
    while not pair.fabric.pending and not looks:
        pair.turn()
    arrived = bool(pair.reader.of(messages.HandoffDone))
    assert arrived is waits, "it joined the very step that posted it"
    pair.lands_reads = True
    pair.run()
    assert pair.answer(1) == continuation(prompt_of(12), 6)


def test_a_stale_block_is_never_used(pair: EnginePair) -> None:
    """The source's block is rewritten between the read's data and its words."""
    pair.lands_reads = False
    prompt = prompt_of(12)
    pair.submit(1, make_generation(prompt, 6))
    while not pair.fabric.pending:
        pair.turn()
    transfer = pair.fabric.pending[0]
    transfer.copy_data()
    pair.source.memory.words.bump(transfer.request.remote_blocks[0])
    transfer.read_words()
    pair.turn()
    lost = pair.reader.the(messages.HandoffLost)
    assert (lost.error.reason, lost.verified_blocks) == ("StaleTicketError", 0)
    pair.reader.engine.handle(messages.Resume(1, (ChoiceState(0, tuple(pair.answer(1))),)))
    pair.lands_reads = True
    pair.run()
    assert pair.answer(1) == continuation(prompt, 6)
    assert pair.reader.load().stale_reads == 1


def test_a_failed_read_is_a_lost_handoff_and_frees_both_sides(pair: EnginePair) -> None:
    pair.lands_reads = False
    pair.submit(1, make_generation(prompt_of(12), 6))
    while not pair.fabric.pending:
        pair.turn()
    pair.fabric.pending[0].end(TransferState.FAILED, DeadlineError("the read did not end in time"))
    pair.lands_reads = True
    run_until(pair, messages.HandoffLost)
    pair.turn()
    assert pair.source.load().leases == 0
    pair.reader.abort(1)


def test_no_room_on_decode_is_a_refusal_and_the_ticket_goes_on(pairs: list[EnginePair]) -> None:
    pair = make_pair(pairs, decode={"max_num_seqs": 1})
    pair.submit(1, make_generation(prompt_of(8), 3000))
    run_until(pair, messages.HandoffDone)
    pair.submit(2, make_generation(prompt_of(12, 2), 4))
    for _ in range(5):
        pair.turn()
    pair.clock.advance(2.5)
    run_until(pair, messages.RequestFailed)
    assert pair.reader.error(2) == "OverloadedError"
    released = [event for event in pair.reader.of(messages.HandoffRelease) if event.id == 2]
    assert [event.reason for event in released] == [messages.ReleaseReason.REFUSED]
    assert pair.source.load().leases == 1
    pair.reader.abort(1)
    ticket = pair.source.of(messages.Accepted)[1].ticket
    assert ticket is not None
    pair.reader.events.clear()
    pair.pump()
    pair.generations[3] = pair.generations[2]
    pair.follow(3, ticket)  # the same ticket, offered again
    pair.run()
    assert pair.answer(3) == continuation(prompt_of(12, 2), 4)


def test_a_ticket_for_other_tokens_is_refused(pair: EnginePair) -> None:
    pair.auto_follow = False
    pair.submit(1, make_generation(prompt_of(12), 4))
    pair.run()
    ticket = pair.source.the(messages.Accepted).ticket
    pair.reader.engine.handle(messages.Decode(5, attempt_of(1), make_generation(prompt_of(12, 9), 4), ticket))
    assert pair.reader.error(5) == "MismatchError"
    pair.source.abort(1)


@pytest.mark.parametrize(
    ("router_id", "request_id", "attempt", "is_taken"),
    [
        ("router", "1", 2, True),
        ("router", "1", 3, True),  # decode is tried again
        ("router", "1", 1, False),
        ("router", "2", 2, False),
        ("another", "1", 2, False),
    ],
)
def test_a_ticket_serves_its_own_request_and_no_attempt_below_it(
    pair: EnginePair, router_id: str, request_id: str, attempt: int, is_taken: bool
) -> None:
    pair.auto_follow = False
    generation = make_generation(prompt_of(12), 4)
    pair.source.engine.handle(messages.Prefill(1, AttemptId("router", "1", 2), generation, True))
    pair.run()
    ticket = pair.source.the(messages.Accepted).ticket
    pair.reader.engine.handle(messages.Decode(1, AttemptId(router_id, request_id, attempt), generation, ticket))
    assert [event.error.reason for event in pair.reader.of(messages.RequestFailed)] == ["MismatchError"] * (
        not is_taken
    )
    pair.reader.abort(1)
    pair.source.abort(1)


def test_aborting_a_finished_prefill_frees_its_ticket(pair: EnginePair) -> None:
    pair.auto_follow = False
    pair.submit(1, make_generation(prompt_of(12), 4))
    pair.run()
    assert pair.source.load().leases == 1
    pair.source.abort(1)


def test_a_prefill_that_dies_fails_its_follower(pair: EnginePair) -> None:
    pair.submit(1, make_generation(prompt_of(60), 4, deadline_s=0.0035))
    run_until(pair, messages.HandoffLost)
    assert pair.source.error(1) == "DeadlineError"
    assert pair.reader.the(messages.HandoffLost).error.reason == "DeadlineError"
    pair.reader.abort(1)


def test_beats_keep_a_slow_pull_alive_and_their_absence_ends_it(pair: EnginePair) -> None:
    pair.lands_reads = False
    pair.submit(1, make_generation(prompt_of(12), 4))
    for _ in range(6):
        pair.turn()
    for _ in range(5):
        pair.clock.advance(0.9)
        pair.reader.engine.beat()
        pair.pump()
        pair.source.engine.step()
    assert pair.source.load().leases == 1
    pair.clock.advance(3.5)  # 8 s in all: the wall cap is not what ends it
    pair.lands_reads = True
    pair.source.engine.step()
    assert pair.source.load().expired_leases == 1
    pair.run()
    pair.reader.abort(1)


def error_info() -> ErrorInfo:
    return ErrorInfo("TransferError", "ABORTED", "the stream was lost")

"""Hand-offs and prefixes of engines with a sliding group: the window alone travels, and both groups are verified."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_rig import EnginePair, make_generation, prompt_of
from fake_runner import continuation
from msgspec.structs import replace
from sliding_rig import drop, make_pair

from kvrelay_core.error_info import info_of
from kvrelay_core.errors import StaleTicketError, TransferError
from kvrelay_core.request import AttemptId, ChoiceState, PrefixHint
from kvrelay_engine import messages
from kvrelay_engine.kv_group import SLIDING_GROUP
from kvrelay_engine.prefix_messages import LookupPrefix, PrefixFound, PrefixPulled, PrefixTicket, PrefixWanted
from kvrelay_engine.sliding_blocks import most_in_ticket, most_while_computing, most_while_decoding
from kvrelay_transfer.ticket import KvTicket


@pytest.fixture
def pairs() -> Iterator[list[EnginePair]]:
    made: list[EnginePair] = []
    yield made
    for pair in made:
        pair.check_empty()
        pair.close()


def keep(pairs: list[EnginePair], **sizes: Any) -> EnginePair:
    pairs.append(make_pair(**sizes))
    return pairs[-1]


def test_two_thousand_tokens_and_a_window_of_64(pairs: list[EnginePair]) -> None:
    """At both ends of a hand-off, in blocks of 16 and chunks of 64: of 125 blocks 14 and 6."""
    sizes = {"window": 64, "block_tokens": 16, "hash_unit_tokens": 64, "max_batched_tokens": 64, "kv_blocks": 200}
    pair = keep(pairs, prefill=sizes, **sizes)
    prompt = prompt_of(2000)
    pair.submit(1, make_generation(prompt, 40))
    assert pair.source.sliding is not None and pair.reader.sliding is not None
    most_there = most_here = 0
    while pair.turn():
        most_there = max(most_there, pair.source.sliding.pool.num_in_use)
        most_here = max(most_here, pair.reader.sliding.pool.num_in_use)
    assert pair.answer(1) == continuation(prompt, 40)
    window = pair.source.sliding.layout
    assert 0 < most_there <= most_while_computing(window, 64) + most_in_ticket(window) == 14
    assert 0 < most_here <= most_while_decoding(window) == 6


def test_prefill_keeps_what_its_ticket_names(pairs: list[EnginePair]) -> None:
    pair = keep(pairs)
    pair.auto_follow = False
    pair.submit(1, make_generation(prompt_of(201), 6))
    pair.run()
    ticket = pair.source.the(messages.Accepted).ticket
    assert ticket is not None and pair.source.sliding is not None
    tail = ticket.groups[SLIDING_GROUP]
    assert (tail.group, tail.first_token, len(tail.blocks)) == (1, 192, 3)
    assert pair.source.load().sliding_blocks == 3
    pair.follow(1, ticket)
    pair.run()
    assert pair.answer(1) == continuation(prompt_of(201), 6)


# --------------------------------------------------------------------------------------------- hand-offs


@pytest.mark.parametrize("length", [3, 9, 10, 11, 12, 13, 39, 40, 41, 200])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_answers_after_a_handoff(pairs: list[EnginePair], length: int, num_choices: int) -> None:
    pair = keep(pairs)
    prompt = prompt_of(length)
    pair.submit(1, make_generation(prompt, 30, num_choices=num_choices))
    pair.run()
    for choice in range(num_choices):
        assert pair.answer(1, choice) == continuation(prompt, 30)


@pytest.mark.parametrize(("source", "reader"), [(4, 8), (8, 4), (16, 4), (4, 16), (8, 16)])
@pytest.mark.parametrize("length", [7, 33, 48, 61, 150])
def test_blocks_of_other_sizes(pairs: list[EnginePair], source: int, reader: int, length: int) -> None:
    units = {"hash_unit_tokens": 4}
    pair = keep(pairs, prefill={"block_tokens": source, **units}, block_tokens=reader, **units)
    prompt = prompt_of(length)
    for request in (1, 2):
        pair.submit(request, make_generation(prompt, 30))
        pair.run()
        assert pair.answer(request) == continuation(prompt, 30)


def test_many_handoffs_through_small_pools(pairs: list[EnginePair]) -> None:
    small = {"sliding_blocks": 24, "kv_blocks": 120}
    pair = keep(pairs, prefill=small, **small)
    prompts = {request: prompt_of(20 + 7 * request, request % 5) for request in range(16)}
    for request, prompt in prompts.items():
        pair.submit(request, make_generation(prompt, 12))
    pair.run()
    assert {request: pair.answer(request) for request in prompts} == {
        request: continuation(prompt, 12) for request, prompt in prompts.items()
    }


def test_a_stale_window_makes_nothing_visible(pairs: list[EnginePair]) -> None:
    """The words of the sliding group are compared as well: its blocks were given away under the read."""
    pair = keep(pairs)
    pair.lands_reads = False
    pair.submit(1, make_generation(prompt_of(90), 12))
    pair.run()
    ticket = pair.source.the(messages.Accepted).ticket
    assert ticket is not None and pair.source.sliding is not None
    pair.source.sliding.pool._words.bump(ticket.groups[SLIDING_GROUP].blocks[-1])
    pair.lands_reads = True
    pair.run()
    lost = pair.reader.the(messages.HandoffLost)
    assert (lost.error.reason, lost.verified_tokens) == (StaleTicketError.__name__, 0)
    pair.reader.engine.handle(messages.Resume(1, (ChoiceState(0, tuple(pair.answer(1))),)))
    pair.run()
    assert pair.answer(1) == continuation(prompt_of(90), 12)


@pytest.mark.parametrize("num_turns", range(0, 24, 2))
def test_a_lost_handoff_is_resumed_or_aborted_at_any_time(pairs: list[EnginePair], num_turns: int) -> None:
    pair = keep(pairs)
    prompt = prompt_of(150)
    pair.submit(1, make_generation(prompt, 12))
    pair.submit(2, make_generation(prompt_of(150, 3), 12))
    for _ in range(num_turns):
        pair.turn()
    error = info_of(TransferError("the stream was lost"))
    for request in (1, 2):
        pair.reader.engine.handle(messages.HandoffFailed(request, error))
    pair.abort_at_reader(2)
    pair.run()
    if pair.reader.of(messages.HandoffLost):
        pair.reader.engine.handle(messages.Resume(1, (ChoiceState(0, tuple(pair.answer(1))),)))
        pair.run()
    if pair.reader.of(messages.StepTokens) or num_turns:
        assert pair.answer(1) == continuation(prompt, 12)[: len(pair.answer(1))]


def test_reads_that_never_end_keep_their_blocks(pairs: list[EnginePair]) -> None:
    """PROTOCOL A5 in both groups: nothing is promised twice while quarantined blocks are out."""
    pair = keep(pairs, sliding_blocks=24)
    pair.lands_reads = False
    pair.submit(1, make_generation(prompt_of(90), 12))
    pair.run()
    pair.abort_at_reader(1)
    pair.turn()
    assert pair.reader.sliding is not None
    assert pair.reader.load().blocks_quarantined > 0 and pair.reader.load().sliding_blocks > 0
    pair.lands_reads = True
    pair.run()
    assert pair.reader.load().sliding_blocks == 0


def test_a_ticket_that_names_other_blocks_of_the_window_is_a_mismatch(pairs: list[EnginePair]) -> None:
    pair = keep(pairs)
    pair.auto_follow = False
    pair.submit(1, make_generation(prompt_of(90), 12))
    pair.turn()
    ticket = pair.source.the(messages.Accepted).ticket
    assert isinstance(ticket, KvTicket)
    full, tail = ticket.groups
    for request, groups in enumerate(((full,), (full, replace(tail, first_token=0)), (tail, full), (full, full)), 5):
        pair.generations[request] = pair.generations[1]
        pair.reader.decode(request, pair.generations[1], replace(ticket, groups=groups))
        assert pair.reader.error(request) == "MismatchError"
    pair.source.abort(1)
    pair.run()


# --------------------------------------------------------------------------------- prefixes from elsewhere


def pull_prefix(pair: EnginePair, request_id: int, prompt: list[int], num_hinted: int) -> None:
    """A prefill at the reader's with a hint to the source, up to the ticket: what the services carry between them."""
    hint = PrefixHint(pair.source.peer.peer_id, num_hinted)
    attempt = AttemptId("router", str(request_id), 1)
    pair.reader.engine.handle(messages.Decode(request_id, attempt, make_generation(prompt, 9), None, hint))
    for wanted in [event for event in pair.reader.of(PrefixWanted) if event.id == request_id]:
        pair.source.engine.handle(LookupPrefix(request_id, wanted.attempt, wanted.unit_hashes))
        (answer,) = [event for event in pair.source.of(PrefixTicket) if event.call == request_id]
        pair.reader.engine.handle(PrefixFound(request_id, answer.ticket))


def test_a_prefix_is_pulled_with_its_window(pairs: list[EnginePair]) -> None:
    pair = keep(pairs, prefix_wait_s=5.0)
    prompt = prompt_of(90)
    pair.source.prefill(1, make_generation(prompt))
    pair.source.run()
    pull_prefix(pair, 2, [*prompt, 5, 6], 90)
    assert pair.reader.sliding is not None
    pair.turn()
    assert pair.reader.load().sliding_blocks == 3, "what token 88 sees: 79 to 87"
    pair.run()
    assert pair.reader.tokens(2) == continuation([*prompt, 5, 6], 9)
    (pulled,) = pair.reader.of(PrefixPulled)
    assert pulled.timing.blocks_pulled == 22 and pair.reader.runner.batches[0] == [4]


def test_only_what_is_missing_of_each_group_is_pulled(pairs: list[EnginePair]) -> None:
    """The reader has all of the one group; what has been evicted is the window."""
    pair = keep(pairs, prefix_wait_s=5.0)
    prompt = prompt_of(90)
    for rig in (pair.source, pair.reader):
        rig.prefill(1, make_generation(prompt))
        rig.run()
    drop(pair.reader, prompt, tuple(range(22)))
    pull_prefix(pair, 2, [*prompt, 5, 6], 90)
    pair.run()
    (pulled,) = pair.reader.of(PrefixPulled)
    assert (pulled.timing.blocks_pulled, pulled.timing.blocks_reused) == (0, 22) and pulled.timing.size_bytes > 0
    assert pair.reader.tokens(2) == continuation([*prompt, 5, 6], 9)


@pytest.mark.parametrize("num_cached", [0, 90])
def test_a_pull_takes_nothing_that_was_promised(pairs: list[EnginePair], num_cached: int) -> None:
    """Not even by pinning what is cached here."""
    pair = keep(pairs, prefix_wait_s=5.0, sliding_blocks=15)
    prompt = prompt_of(90)
    pair.source.prefill(1, make_generation(prompt))
    pair.source.run()
    if num_cached:
        pair.reader.prefill(1, make_generation(prompt))
        pair.reader.run()
        drop(pair.reader, prompt, (3,))
        pair.reader.pool.clear_cache()
    for request in (2, 3):
        pair.reader.decode(request, make_generation(prompt_of(60, request), 30))
        pair.reader.step()
    pull_prefix(pair, 4, [*prompt, 5, 6], 90)
    pair.run()
    for request, asked in ((2, prompt_of(60, 2)), (3, prompt_of(60, 3))):
        assert pair.reader.tokens(request) == continuation(asked, 30)
    assert pair.reader.tokens(4) == continuation([*prompt, 5, 6], 9)
    assert not pair.reader.the(PrefixPulled).timing.blocks_pulled

"""Engines with a sliding group: every token sees its window, tokens do not depend on who frees what when, and what is
held stays bounded.

The fake runner looks at all of each token's window through the sliding table, and notes what is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_rig import EnginePair, EngineRig, make_generation, prompt_of
from fake_runner import continuation
from msgspec.structs import replace

from kvrelay_core.error_info import info_of
from kvrelay_core.errors import StaleTicketError, TransferError
from kvrelay_core.request import AttemptId, ChoiceState, PrefixHint
from kvrelay_engine import messages
from kvrelay_engine.kv_group import SLIDING_GROUP
from kvrelay_engine.prefix_messages import LookupPrefix, PrefixFound, PrefixPulled, PrefixTicket, PrefixWanted
from kvrelay_engine.sliding_blocks import most_while_computing, most_while_decoding
from kvrelay_transfer.ticket import KvTicket

WINDOW = 10  # tokens; a block has 4
LONG = {"kv_blocks": 256, "max_batched_tokens": 16, "max_num_seqs": 4}


@pytest.fixture
def rigs() -> Iterator[list[EngineRig]]:
    made: list[EngineRig] = []
    yield made
    for rig in made:
        rig.check_empty()
        rig.close()


@pytest.fixture
def pairs() -> Iterator[list[EnginePair]]:
    made: list[EnginePair] = []
    yield made
    for pair in made:
        pair.check_empty()
        pair.close()


def make_rig(rigs: list[EngineRig], role: str = "decode", **changes: Any) -> EngineRig:
    rigs.append(EngineRig(role, window=WINDOW, **(LONG | {"decode_alone_tokens": 1000} | changes)))
    return rigs[-1]


def make_pair(pairs: list[EnginePair], *, prefill: dict[str, Any] | None = None, **decode: Any) -> EnginePair:
    common: dict[str, Any] = {"window": WINDOW, **LONG}
    pairs.append(EnginePair(prefill=common | (prefill or {}), decode=common | decode))
    return pairs[-1]


def most_in_use(rig: EngineRig, max_steps: int = 5000) -> int:
    """Of the sliding group, while the rig computes all that it has to."""
    most = 0
    for _ in range(max_steps):
        busy = rig.step()
        assert rig.sliding is not None
        most = max(most, rig.sliding.pool.num_in_use)
        rig.load()
        if not busy:
            return most
    raise AssertionError("still computing")


# ------------------------------------------------------------------------------------------- bounded use


def test_a_long_prompt_and_its_answer_use_a_bounded_number_of_blocks(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, max_model_len=2000)
    prompt = prompt_of(600)
    rig.decode(1, make_generation(prompt, 100))
    assert rig.sliding is not None
    bound = most_while_computing(rig.sliding.layout, 16)
    assert most_in_use(rig) <= bound == 7
    assert rig.tokens(1) == continuation(prompt, 100)


def test_decoding_uses_the_window_alone(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs)
    rig.decode(1, make_generation(prompt_of(100), 200))
    while not rig.of(messages.StepTokens):
        rig.step()
    assert rig.sliding is not None
    assert most_in_use(rig) <= most_while_decoding(rig.sliding.layout)


def test_prefill_keeps_what_its_ticket_names(pairs: list[EnginePair]) -> None:
    pair = make_pair(pairs)
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


def test_prompts_that_are_computed_at_once_wait_for_each_others_room(rigs: list[EngineRig]) -> None:
    """Promises are kept: with room for one and a half, the second one waits, and nobody is preempted."""
    rig = make_rig(rigs, sliding_blocks=13)
    for request in range(4):
        rig.decode(request, make_generation(prompt_of(90, request), 20))
    assert most_in_use(rig) <= 12
    for request in range(4):
        assert rig.tokens(request) == continuation(prompt_of(90, request), 20)


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, sliding_blocks=13)
    rig.decode(1, make_generation(prompt_of(90), 20, num_choices=4))
    (failed,) = rig.of(messages.RequestFailed)
    assert failed.error.reason == "PoolExhaustedError" and "28 KV blocks" in failed.error.message


# ------------------------------------------------------------------------------------------ prefix cache


def prefill_again(rig: EngineRig, request: int, prompt: list[int]) -> int:
    """Cached tokens of a prompt."""
    rig.prefill(request, make_generation(prompt))
    rig.run()
    return next(event.cached_tokens for event in rig.of(messages.Accepted) if event.id == request)


def test_a_hit_needs_the_window_before_its_end(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, "prefill")
    prompt = prompt_of(101)
    assert [prefill_again(rig, 1, prompt), prefill_again(rig, 2, prompt)] == [0, 100]
    assert prefill_again(rig, 3, [*prompt[:50], *prompt_of(50, 9)]) == 48


@pytest.mark.parametrize(
    ("lost", "hit"), [((24,), 96), ((22,), 88), ((22, 23), 88), ((21,), 100), ((0, 1), 100), ((23, 19), 92)]
)
def test_a_hit_ends_where_the_window_is_whole(rigs: list[EngineRig], lost: tuple[int, ...], hit: int) -> None:
    """Blocks of the sliding group alone were evicted; a window of 10 spans up to four of them."""
    rig = make_rig(rigs, "prefill")
    prompt = prompt_of(101)
    prefill_again(rig, 1, prompt)
    drop(rig, prompt, lost)
    assert prefill_again(rig, 2, prompt) == hit


def drop(rig: EngineRig, prompt: list[int], lost: tuple[int, ...]) -> None:
    """Takes blocks at these positions of the sliding group out of the cache."""
    assert rig.sliding is not None
    chain = rig.engine._cache.new_chain("")
    chain.extend(prompt)
    rig.sliding.pool.disown([chain.keys()[index] for index in lost])


def test_evicted_windows_cost_computing_and_never_a_token(rigs: list[EngineRig]) -> None:
    """The sliding group's cache is small: long prompts evict each other's blocks there, and not in the full group."""
    rig = make_rig(rigs, sliding_blocks=20, kv_blocks=1000)
    prompts = [prompt_of(150, seed) for seed in range(4)]
    for request in range(12):
        prompt = prompts[request % 4][: 150 - 13 * (request // 4)]
        rig.decode(request, make_generation(prompt, 9))
        rig.run()
        assert rig.tokens(request) == continuation(prompt, 9)


def test_what_a_broken_request_left_is_not_found(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, "prefill")
    prompt = prompt_of(101)
    rig.prefill(1, make_generation(prompt))
    for _ in range(6):
        rig.step()
    rig.runner.broken_rows = {0}
    rig.run()
    assert rig.error(1) == "InternalError"
    assert rig.sliding is not None and rig.sliding.pool.num_cached == 0
    assert prefill_again(rig, 2, prompt) == 0


# ----------------------------------------------------------------------------------- preemption, branches


def test_preempted_sequences_are_computed_again(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, kv_blocks=60)
    for request in range(4):
        rig.decode(request, make_generation(prompt_of(40, request), 40))
    rig.run()
    for request in range(4):
        assert rig.tokens(request) == continuation(prompt_of(40, request), 40)
    assert sum(map(len, rig.runner.batches)) > 0


@pytest.mark.parametrize("length", [38, 40, 41])
def test_choices_share_the_window_and_part(rigs: list[EngineRig], length: int) -> None:
    rig = make_rig(rigs)
    prompt = prompt_of(length)
    rig.decode(1, make_generation(prompt, 30, num_choices=3))
    most_in_use(rig)
    for choice in range(3):
        assert rig.tokens(1, choice) == continuation(prompt, 30)


def test_an_abort_in_every_step_leaves_nothing(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs)
    for num_steps in range(1, 25):
        rig.decode(num_steps, make_generation(prompt_of(70, num_steps), 20, num_choices=2))
        for _ in range(num_steps):
            rig.step()
        rig.abort(num_steps)
        rig.check_empty()


# --------------------------------------------------------------------------------------------- hand-offs


@pytest.mark.parametrize("length", [3, 9, 10, 11, 12, 13, 39, 40, 41, 200])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_answers_after_a_handoff(pairs: list[EnginePair], length: int, num_choices: int) -> None:
    pair = make_pair(pairs)
    prompt = prompt_of(length)
    pair.submit(1, make_generation(prompt, 30, num_choices=num_choices))
    pair.run()
    for choice in range(num_choices):
        assert pair.answer(1, choice) == continuation(prompt, 30)


@pytest.mark.parametrize(("source", "reader"), [(4, 8), (8, 4), (16, 4), (4, 16), (8, 16)])
@pytest.mark.parametrize("length", [7, 33, 48, 61, 150])
def test_blocks_of_other_sizes(pairs: list[EnginePair], source: int, reader: int, length: int) -> None:
    units = {"hash_unit_tokens": 4}
    pair = make_pair(pairs, prefill={"block_tokens": source, **units}, block_tokens=reader, **units)
    prompt = prompt_of(length)
    for request in (1, 2):
        pair.submit(request, make_generation(prompt, 30))
        pair.run()
        assert pair.answer(request) == continuation(prompt, 30)


def test_many_handoffs_through_small_pools(pairs: list[EnginePair]) -> None:
    small = {"sliding_blocks": 24, "kv_blocks": 120}
    pair = make_pair(pairs, prefill=small, **small)
    prompts = {request: prompt_of(20 + 7 * request, request % 5) for request in range(16)}
    for request, prompt in prompts.items():
        pair.submit(request, make_generation(prompt, 12))
    pair.run()
    assert {request: pair.answer(request) for request in prompts} == {
        request: continuation(prompt, 12) for request, prompt in prompts.items()
    }


def test_a_stale_window_makes_nothing_visible(pairs: list[EnginePair]) -> None:
    """The words of the sliding group are compared as well: its blocks were given away under the read."""
    pair = make_pair(pairs)
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
    pair = make_pair(pairs)
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
    pair = make_pair(pairs, sliding_blocks=24)
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
    pair = make_pair(pairs)
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
    pair = make_pair(pairs, prefix_wait_s=5.0)
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
    pair = make_pair(pairs, prefix_wait_s=5.0)
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
    pair = make_pair(pairs, prefix_wait_s=5.0, sliding_blocks=15)
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

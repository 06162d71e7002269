"""Tickets that are not what they should be: altered, used twice, too late, for another prompt, model or pool.

The tests call the workers as a router would. A ticket that decode cannot trust ends in a typed error or a lost
hand-off before the first token, does no harm to the genuine one, and leaves nothing held anywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest
from altered_tickets import MALFORMED, OF_ANOTHER_SOURCE, OTHER_CONTENT, SIGNED, Alter, flip, flip_word
from checkpoints import VARIANTS, make_checkpoint, reference_greedy
from cluster import Cluster
from direct_calls import (
    CALL_DEADLINE_S,
    NUM_TOKENS,
    DirectCalls,
    Prefilled,
    new_attempt,
    next_attempt,
    prefill_request,
)
from lone_worker import lone_decode
from made_checkpoints import CheckpointMaker
from oracle import make_prompt

from kvrelay.v1 import kv_source_pb2, prefill_pb2, worker_pb2
from kvrelay.v1.common_pb2 import KvTicket
from kvrelay.v1.worker_pb2_grpc import WorkerServiceStub
from kvrelay_core.errors import (
    InvalidRequestError,
    KvRelayError,
    LeaseExpiredError,
    MismatchError,
    TicketRejectedError,
    TransferError,
    UnavailableError,
)
from kvrelay_core.rpc.status import error_from_rpc

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

VOCAB_SIZE = 384
BLOCK_TOKENS = 16
KV_BLOCKS = 96
# One hash unit of 64 tokens, a full block behind it and a partial one.
PROMPT_TOKENS = 86
NUM_QUESTIONS = 72

Question = tuple[list[int], list[int]]  # a prompt and its answer


@pytest.fixture(scope="module")
def model_dir(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen3")


@pytest.fixture(scope="module")
def pair(model_dir: Path) -> Iterator[Cluster]:
    """A small pool, and steps so short that a prefill can be met half-way."""
    with Cluster(
        model_dir, block_tokens=BLOCK_TOKENS, kv_blocks=KV_BLOCKS, max_num_seqs=4, max_batched_tokens=16
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def questions(model_dir: Path) -> Iterator[Question]:
    prompts = [make_prompt(VOCAB_SIZE, PROMPT_TOKENS, seed) for seed in range(NUM_QUESTIONS)]
    return zip(prompts, reference_greedy(model_dir, prompts, NUM_TOKENS), strict=True)


@pytest.fixture
def question(questions: Iterator[Question]) -> Question:
    """One that nobody has asked yet: no worker has it in its cache."""
    return next(questions)


@pytest.fixture
async def calls(pair: Cluster) -> AsyncIterator[DirectCalls]:
    """After the test nothing of it is held."""
    async with DirectCalls(pair.address_of("prefill", 0), pair.address_of("decode", 0)) as direct:
        yield direct
    await asyncio.to_thread(pair.assert_no_leaks)


def assert_refused(error: KvRelayError, expected: type[KvRelayError], cause: str | None = None) -> None:
    assert type(error) is expected, repr(error)
    assert error.metadata.get("cause") == cause, error.metadata


# ------------------------------------------------------------------------------------------------ as it is


async def test_a_genuine_ticket_gives_the_answer(calls: DirectCalls, question: Question) -> None:
    prompt, answer = question
    prefilled = await calls.prefill(prompt)
    assert prefilled.first_token == answer[0]
    outcome = await calls.decode(prompt, prefilled.ticket, prefilled.attempt)
    assert (outcome.tokens, outcome.pulled_blocks, outcome.is_finished) == (answer, 6, True)


# ------------------------------------------------------------------------------------------------- altered


async def check_altered(calls: DirectCalls, question: Question, alter: Alter) -> KvRelayError:
    """Why the altered ticket was refused. The genuine one is as good after it as before."""
    prompt, answer = question
    prefilled = await calls.prefill(prompt)
    altered = KvTicket()
    altered.CopyFrom(prefilled.ticket)
    alter(altered)
    assert altered != prefilled.ticket
    outcome = await calls.decode(prompt, altered, prefilled.attempt)
    genuine = await calls.decode(prompt, prefilled.ticket, next_attempt(prefilled.attempt))
    assert (genuine.tokens, genuine.pulled_blocks) == (answer, 6), genuine
    return outcome.refusal


@pytest.mark.parametrize("name", SIGNED)
async def test_what_only_the_signature_tells(calls: DirectCalls, question: Question, name: str) -> None:
    assert_refused(await check_altered(calls, question, SIGNED[name]), TicketRejectedError, "mac")


@pytest.mark.parametrize("name", OF_ANOTHER_SOURCE)
async def test_a_source_that_decode_was_not_told_of(calls: DirectCalls, question: Question, name: str) -> None:
    assert_refused(await check_altered(calls, question, OF_ANOTHER_SOURCE[name]), TicketRejectedError, "source")


async def test_another_epoch(calls: DirectCalls, question: Question) -> None:
    error = await check_altered(calls, question, lambda ticket: flip(ticket, "engine_epoch"))
    assert_refused(error, TicketRejectedError, "epoch")


@pytest.mark.parametrize("name", OTHER_CONTENT)
async def test_other_content_than_the_request_needs(calls: DirectCalls, question: Question, name: str) -> None:
    error = await check_altered(calls, question, OTHER_CONTENT[name])
    assert isinstance(error, MismatchError) and error.status == "FAILED_PRECONDITION", repr(error)


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed(calls: DirectCalls, question: Question, name: str) -> None:
    assert_refused(await check_altered(calls, question, MALFORMED[name]), InvalidRequestError)


async def test_the_source_trusts_no_altered_ticket_in_any_call(calls: DirectCalls, question: Question) -> None:
    """PROTOCOL D1: Follow (as decode sees it, above), Fetch and Release; and Fetch gives what the ticket lists."""
    prompt, answer = question
    prefilled = await calls.prefill(prompt)
    altered = KvTicket()
    altered.CopyFrom(prefilled.ticket)
    flip_word(altered)
    blocks = list(altered.groups[0].blocks)
    listed = [*blocks, next(block for block in range(1, KV_BLOCKS) if block not in blocks)]
    for request, expected, cause in (
        (kv_source_pb2.FetchRequest(ticket=altered, blocks=blocks), TicketRejectedError, "mac"),
        (kv_source_pb2.FetchRequest(ticket=prefilled.ticket, blocks=listed), TransferError, None),
        (kv_source_pb2.FetchRequest(ticket=prefilled.ticket, blocks=[0]), TransferError, None),
        (kv_source_pb2.ReleaseRequest(ticket=altered), TicketRejectedError, "mac"),
    ):
        assert_refused(await call_source(calls, request), expected, cause)
    outcome = await calls.decode(prompt, prefilled.ticket, prefilled.attempt)
    assert (outcome.tokens, outcome.pulled_blocks) == (answer, 6)
    late = kv_source_pb2.FetchRequest(ticket=prefilled.ticket, blocks=blocks)
    assert_refused(await call_source(calls, late), LeaseExpiredError)


async def release(calls: DirectCalls, ticket: KvTicket) -> bool:
    request = kv_source_pb2.ReleaseRequest(ticket=ticket)
    return (await calls.source_stub.Release(request, timeout=CALL_DEADLINE_S)).released


async def call_source(
    calls: DirectCalls, request: kv_source_pb2.FetchRequest | kv_source_pb2.ReleaseRequest
) -> KvRelayError:
    """What it was refused with."""
    try:
        if isinstance(request, kv_source_pb2.ReleaseRequest):
            response: Any = await calls.source_stub.Release(request, timeout=CALL_DEADLINE_S)
        else:
            response = await calls.source_stub.Fetch(request, timeout=CALL_DEADLINE_S).read()
    except grpc.RpcError as error:
        return error_from_rpc(error, "prefill")
    raise AssertionError(f"answered: {response!r:.200}")


# ----------------------------------------------------------------------------------------- twice, too late


async def check_lost(
    calls: DirectCalls, question: Question, prefilled: Prefilled, expected: type[KvRelayError], cause: str | None = None
) -> None:
    """The ticket is worth nothing any more. Told what was committed, decode computes the answer by itself."""
    prompt, answer = question
    attempt = next_attempt(prefilled.attempt)
    refused = await calls.decode(prompt, prefilled.ticket, attempt)
    assert_refused(refused.refusal, expected, cause)
    assert refused.lost is not None, "the router was not asked to decide"
    for resume in (answer[:1], []):
        attempt = next_attempt(next_attempt(attempt))
        outcome = await calls.decode(prompt, prefilled.ticket, attempt, resume=resume)
        assert outcome.lost is not None and outcome.pulled_blocks is None
        assert (outcome.tokens, outcome.is_finished) == (answer[len(resume) :], True), outcome


async def test_a_ticket_is_used_once(calls: DirectCalls, question: Question) -> None:
    prompt, answer = question
    prefilled = await calls.prefill(prompt)
    outcome = await calls.decode(prompt, prefilled.ticket, prefilled.attempt)
    assert outcome.tokens == answer
    await check_lost(calls, question, prefilled, LeaseExpiredError)


async def test_a_ticket_that_was_released_by_a_call(calls: DirectCalls, question: Question) -> None:
    prefilled = await calls.prefill(question[0])
    for is_first in (True, False):  # repeatable (PROTOCOL B4)
        assert await release(calls, prefilled.ticket) is is_first
    await check_lost(calls, question, prefilled, LeaseExpiredError)


async def test_a_prefill_that_was_called_off_half_way(pair: Cluster, model_dir: Path, calls: DirectCalls) -> None:
    prompt = make_prompt(VOCAB_SIZE, 480, 1)
    [answer] = await asyncio.to_thread(reference_greedy, model_dir, [prompt], NUM_TOKENS)
    attempt = new_attempt()
    call = calls.prefill_stub.Prefill(prefill_request(prompt, attempt), timeout=CALL_DEADLINE_S)
    async for response in call:
        if response.WhichOneof("event") == "accepted":
            break
    call.cancel()
    await asyncio.to_thread(pair.assert_no_leaks)
    prefilled = Prefilled(attempt, response.accepted.ticket, answer[0])
    await check_lost(calls, (prompt, answer), prefilled, LeaseExpiredError)


@pytest.mark.parametrize("ending", ["released", "closed"])
async def test_the_routers_stream_was_the_lease(
    pair: Cluster, calls: DirectCalls, question: Question, ending: str
) -> None:
    attempt = new_attempt()
    session = calls.prefill_stub.Session(timeout=CALL_DEADLINE_S)
    hello = prefill_pb2.SessionHello(router_id=attempt.router_id)
    await session.write(prefill_pb2.PrefillServiceSessionRequest(hello=hello))
    opening = prefill_pb2.PrefillOpen(handle=1, request=prefill_request(question[0], attempt))
    await session.write(prefill_pb2.PrefillServiceSessionRequest(open=opening))
    ticket = None
    async for response in session:
        match response.event.WhichOneof("event"):
            case "accepted":
                ticket = response.event.accepted.ticket
            case "finished":
                break
    assert ticket is not None
    assert pair.loads()["prefill-0"].leases == 1
    if ending == "released":
        release = prefill_pb2.HandleCancel(handle=1)
        await session.write(prefill_pb2.PrefillServiceSessionRequest(release=release))
        await session.done_writing()
    else:
        session.cancel()
    await asyncio.to_thread(pair.assert_no_leaks, 5)  # a closed session may come back for 2 s
    await check_lost(calls, question, Prefilled(attempt, ticket, question[1][0]), LeaseExpiredError)
    session.cancel()


async def test_a_ticket_whose_blocks_hold_other_prompts(
    calls: DirectCalls, questions: Iterator[Question], question: Question
) -> None:
    prefilled = await calls.prefill(question[0])
    assert await release(calls, prefilled.ticket)
    [group] = prefilled.ticket.groups
    not_reused = dict(zip(group.blocks, group.words, strict=True))
    for seed in range(4):  # each takes most of the pool
        prompt = make_prompt(VOCAB_SIZE, 70 * BLOCK_TOKENS, 100 + seed)
        filler = await calls.prefill(prompt)
        assert await release(calls, filler.ticket)
        for block, word in zip(filler.ticket.groups[0].blocks, filler.ticket.groups[0].words, strict=True):
            assert not_reused.pop(block, None) != word, "written anew under the old word"
        if not not_reused:
            break
    assert not not_reused, f"not written again: {not_reused}"
    await check_lost(calls, question, prefilled, LeaseExpiredError)
    # The same prompt again, and one that nobody asked: the answers come from blocks that were used before.
    for prompt, answer in (question, *islice(questions, 1)):
        again = await calls.prefill(prompt)
        assert (await calls.decode(prompt, again.ticket, again.attempt)).tokens == answer


async def test_a_ticket_of_before_a_restart(pair: Cluster, calls: DirectCalls, questions: Iterator[Question]) -> None:
    question, later = islice(questions, 2)
    prefilled = await calls.prefill(question[0])
    old_pid = pair.kill("prefill")
    await asyncio.to_thread(pair.wait_restarted, "prefill", 0, old_pid)
    again = await prefill_once_up(calls, later[0])
    assert again.ticket.source == prefilled.ticket.source, "another address proves nothing"
    await check_lost(calls, question, prefilled, TicketRejectedError, "epoch")
    outcome = await calls.decode(later[0], again.ticket, again.attempt)
    assert (outcome.tokens, outcome.pulled_blocks) == (later[1], 6)


async def prefill_once_up(calls: DirectCalls, prompt: list[int]) -> Prefilled:
    async with asyncio.timeout(CALL_DEADLINE_S):
        while True:
            try:
                return await calls.prefill(prompt)
            except UnavailableError:
                await asyncio.sleep(0.1)


# -------------------------------------------------------------------------- another prompt, layout or model


async def check_other_prompt(calls: DirectCalls, question: Question, other: list[int]) -> None:
    prompt, answer = question
    prefilled = await calls.prefill(prompt)
    outcome = await calls.decode(other, prefilled.ticket, prefilled.attempt)
    assert_refused(outcome.refusal, MismatchError)
    # Decode gave the ticket back if it had attached by then; a client that has no further use for it does so too.
    await release(calls, prefilled.ticket)
    again = await calls.prefill(prompt)
    assert (await calls.decode(prompt, again.ticket, again.attempt)).tokens == answer


@pytest.mark.parametrize("changed", [0, 63, 64, 80, PROMPT_TOKENS - 1])
async def test_a_ticket_for_another_prompt_of_the_same_length(
    calls: DirectCalls, question: Question, changed: int
) -> None:
    """Be it in one token, wherever that is (PROTOCOL D2)."""
    other = list(question[0])
    other[changed] = (other[changed] + 1) % 300
    await check_other_prompt(calls, question, other)


@pytest.mark.parametrize("num_tokens", [PROMPT_TOKENS - 1, PROMPT_TOKENS + 1, BLOCK_TOKENS])
async def test_a_ticket_for_a_prompt_of_another_length(calls: DirectCalls, question: Question, num_tokens: int) -> None:
    await check_other_prompt(calls, question, (question[0] * 2)[:num_tokens])


def fingerprint_of(address: str) -> bytes:
    with grpc.insecure_channel(address) as channel:
        return WorkerServiceStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=5).model_fingerprint


@pytest.mark.parametrize("differs", ["dtype", "weights"])
async def test_a_pair_that_does_not_match(pair: Cluster, model_dir: Path, tmp_path: Path, differs: str) -> None:
    """The ticket as it is, and one that was made to fit: then the handshake tells."""
    prompt = make_prompt(VOCAB_SIZE, 40, 7)
    [answer] = await asyncio.to_thread(reference_greedy, model_dir, [prompt], NUM_TOKENS)
    if differs == "weights":
        model_dir = await asyncio.to_thread(make_checkpoint, tmp_path / "other", seed=1, **VARIANTS["qwen3"])
    dtype = "bfloat16" if differs == "dtype" else "float32"
    source, reader = pair.address_of("prefill", 0), pair.address_of("decode", 0)
    with lone_decode(model_dir, block_tokens=BLOCK_TOKENS, dtype=dtype) as address:
        async with DirectCalls(source, address) as stranger, DirectCalls(source, reader) as own:
            prefilled = await own.prefill(prompt)
            fitted = KvTicket()
            fitted.CopyFrom(prefilled.ticket)
            fitted.layout.dtype = dtype
            fitted.model_fingerprint = fingerprint_of(address)
            attempt = prefilled.attempt
            for ticket in (prefilled.ticket, fitted):
                outcome = await stranger.decode(prompt, ticket, attempt)
                assert_refused(outcome.refusal, MismatchError)
                if differs == "dtype" and ticket is prefilled.ticket:
                    assert "start both workers with the same --dtype" in outcome.refusal.message
                attempt = next_attempt(attempt)
            genuine = await own.decode(prompt, prefilled.ticket, prefilled.attempt)
            assert (genuine.tokens, genuine.pulled_blocks) == (answer, 3)
    await asyncio.to_thread(pair.assert_no_leaks)

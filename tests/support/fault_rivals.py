"""The cells that need somebody beside the request: a reader that leaves, a replayer, whoever fills a pool.

Each runs its whole cell, up to the answer; what must hold afterwards is asserted by the caller, as for every cell.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
from answers import Answer
from direct_calls import NUM_TOKENS, DirectCalls, Outcome, Prefilled, next_attempt
from fault_matrix import Cell, Stage
from fault_scene import BUSY_S, POINTS, POLLED_WITHIN_S, Asking, Question, Scene, cell_salt, wait_for
from fault_worker import FaultProcess
from oracle import make_prompt

from kvrelay.v1 import kv_source_pb2
from kvrelay_core.errors import KvRelayError, LeaseExpiredError, OverloadedError

VOCAB_SIZE = 384
# Of 159 blocks of 16 tokens it leaves fewer than the 44 of the request.
FILLING_TOKENS = 120 * 16

Rival = Callable[[Scene, ThreadPoolExecutor, Question, Cell], None]


# ------------------------------------------------------------------------------------- a reader that cancels


def land_after_cancel(scene: Scene, pool: ThreadPoolExecutor, question: Question, cell: Cell) -> None:
    """The reads stay under way while the request is cancelled and another one is served; then they land."""
    prompt, expected = question
    scene.reader.arm("stall")
    asking = Asking(pool, scene.cluster.target, prompt, len(expected), cell_salt())
    wait_for(lambda: scene.reader.load().transfers, "a read under way")
    started_s = time.monotonic()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        asking.result(cell.answer_within_s + BUSY_S)
    wait_for(lambda: scene.reader.load().blocks_quarantined, "its destination in quarantine")
    assert time.monotonic() - started_s < cell.answer_within_s + BUSY_S
    wait_for(lambda: not scene.reader.load().requests_waiting_remote_kv, "the request gone")
    held = scene.reader.load()
    assert held.blocks_in_use >= held.blocks_quarantined > 0
    # By the reader itself, beside the quarantined blocks: what lands later must not land in this one's.
    rival = asyncio.run(_prefill(scene.spare_source, prompt, cell_salt()))
    scene.reader.disarm("stall")
    outcome = asyncio.run(_decode(scene.spare_source, scene.reader, prompt, rival))
    assert outcome.tokens == expected[:NUM_TOKENS]
    scene.cluster.latest = scene.pair


# ------------------------------------------------------------------------------------------------ replayed


def replay_ticket(scene: Scene, pool: ThreadPoolExecutor, question: Question, cell: Cell) -> None:
    """The ticket is released, by its reader or by a call while it still reads; then another reader shows it."""
    prompt, expected = question
    ticket = asyncio.run(_prefill(scene.source, prompt, cell_salt()))
    scene.arm(POINTS[cell.stage][:1])
    asked = pool.submit(asyncio.run, _decode(scene.source, scene.reader, prompt, ticket))
    scene.wait_stage()
    if cell.stage is Stage.AFTER_LAST_PULL:
        scene.go_on()  # the release is what it was about to send
        wait_for(lambda: not scene.source.load().leases, "released")
    if cell.stage is Stage.DURING_PULL:
        assert asyncio.run(_release(scene.source, ticket))
    again = asyncio.run(_decode(scene.source, scene.spare_reader, prompt, ticket.next()))
    assert type(again.refusal) is LeaseExpiredError, again
    assert time.monotonic() - scene.started_s < cell.answer_within_s + BUSY_S
    if cell.stage is not Stage.AFTER_LAST_PULL:
        scene.go_on()
    outcome: Outcome = asked.result(cell.answer_within_s + BUSY_S)
    if cell.stage is Stage.DURING_PULL and outcome.lost is not None:  # else it had been quicker
        assert type(outcome.refusal) is LeaseExpiredError, outcome
    else:
        assert outcome.tokens == expected[:NUM_TOKENS], outcome


# ---------------------------------------------------------------------------------------------------- full


def fill_reader(scene: Scene, pool: ThreadPoolExecutor, question: Question, cell: Cell) -> None:
    """Before: no room, and the router offers the ticket to the other reader. Later: who comes then is refused."""
    if cell.stage is Stage.BEFORE_ACCEPT:
        with filled(pool, scene.spare_source, scene.reader, cell_salt()):
            answer = _ask(scene, pool, question, cell)
            assert answer.end.timing.decode_worker == scene.spare_reader.name
        scene.cluster.note(answer.end)
        return
    prompt, expected = question
    scene.arm(POINTS[cell.stage][:1])
    asking = Asking(pool, scene.cluster.target, prompt, len(expected), cell_salt())
    scene.wait_stage()
    late = pool.submit(asyncio.run, _fill(scene.spare_source, scene.reader, cell_salt()))
    wait_for(lambda: scene.spare_source.load().leases, "the rival's ticket")
    scene.go_on()
    answer = _right(asking.result(cell.answer_within_s + BUSY_S), expected)
    assert answer.end.timing.attempts == 1
    scene.cluster.note(answer.end)
    rival = late.result(POLLED_WITHIN_S)
    assert rival.pulled_blocks is not None or type(rival.refusal) is OverloadedError, rival


def fill_every_reader(scene: Scene, pool: ThreadPoolExecutor, question: Question, cell: Cell) -> None:
    """By one prompt, whose blocks its source pins once: the other source has room for the request."""
    prompt, expected = question
    cluster, salt = scene.cluster, cell_salt()
    with (
        filled(pool, scene.spare_source, scene.reader, salt),
        filled(pool, scene.spare_source, scene.spare_reader, salt),
    ):
        asking = Asking(pool, cluster.target, prompt, len(expected), cell_salt())
        answer = asking.result(cell.answer_within_s + BUSY_S)
    assert type(answer) is OverloadedError, answer
    cluster.latest = None


@contextmanager
def filled(pool: ThreadPoolExecutor, source: FaultProcess, reader: FaultProcess, salt: str) -> Iterator[None]:
    """A hand-off whose reads do not end holds most of the reader's blocks, until its wall cap."""
    reader.arm("stall")
    asked: Future[Outcome] = pool.submit(asyncio.run, _fill(source, reader, salt))
    wait_for(lambda: reader.load().transfers, "the rival's reads")
    try:
        yield
    finally:
        reader.disarm("stall")
        asked.result(POLLED_WITHIN_S)


# ------------------------------------------------------------------------------------------------ requests


def _ask(scene: Scene, pool: ThreadPoolExecutor, question: Question, cell: Cell) -> Answer:
    prompt, expected = question
    asking = Asking(pool, scene.cluster.target, prompt, len(expected), cell_salt())
    answer = _right(asking.result(cell.answer_within_s + BUSY_S), expected)
    assert answer.end.timing.attempts == 1
    return answer


def _right(answer: Answer | KvRelayError, expected: list[int]) -> Answer:
    assert isinstance(answer, Answer), repr(answer)
    assert answer.token_ids == expected, "a wrong token"
    return answer


@dataclass(frozen=True)
class Ticket:
    prefilled: Prefilled
    salt: str

    def next(self) -> Ticket:
        """The same, shown by another attempt."""
        attempt = next_attempt(self.prefilled.attempt)
        return replace(self, prefilled=replace(self.prefilled, attempt=attempt))


async def _fill(source: FaultProcess, reader: FaultProcess, salt: str) -> Outcome:
    prompt = make_prompt(VOCAB_SIZE, FILLING_TOKENS, 1)
    return await _decode(source, reader, prompt, await _prefill(source, prompt, salt))


async def _prefill(source: FaultProcess, prompt: list[int], salt: str) -> Ticket:
    async with DirectCalls(source.address, source.address, salt) as calls:
        return Ticket(await calls.prefill(prompt), salt)


async def _decode(source: FaultProcess, reader: FaultProcess, prompt: list[int], ticket: Ticket) -> Outcome:
    async with DirectCalls(source.address, reader.address, ticket.salt) as calls:
        return await calls.decode(prompt, ticket.prefilled.ticket, ticket.prefilled.attempt)


async def _release(source: FaultProcess, ticket: Ticket) -> bool:
    async with DirectCalls(source.address, source.address) as calls:
        request = kv_source_pb2.ReleaseRequest(ticket=ticket.prefilled.ticket)
        return (await calls.source_stub.Release(request, timeout=POLLED_WITHIN_S)).released


RIVALS: dict[str, Rival] = {
    "read landing after the reader cancelled": land_after_cancel,
    "ticket replayed after release": replay_ticket,
    "pool full on the reader": fill_reader,
    "pool full on every reader": fill_every_reader,
}

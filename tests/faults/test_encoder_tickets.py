"""Tickets of embeddings that are late, replayed, altered or of another start: the right token, or a typed error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from answers import Answer
from embedding_calls import EmbeddingCalls
from encoder_cluster import EncoderCluster
from picture_questions import PictureQuestion, answer_or_error, new_question
from vision_checkpoints import as_bytes, draw_picture, make_qwen2_5_vl

from kvrelay.v1.common_pb2 import EmbeddingTicket
from kvrelay_client import AsyncClient
from kvrelay_core.errors import (
    EmbeddingLostError,
    InvalidRequestError,
    KvRelayError,
    MismatchError,
    TicketRejectedError,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240), pytest.mark.full]

NUM_TO_EVICT_ALL = 80  # pictures of 16 KiB each, in a pool of 1 MiB


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_5_vl(tmp_path_factory.mktemp("encoder-tickets") / "qwen2_5_vl")


@pytest.fixture(scope="module", params=["shm", "grpc"])
def cluster(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[EncoderCluster]:
    with EncoderCluster(model_dir, encoders=1, connector=request.param) as cluster:
        yield cluster


class Ticketed(NamedTuple):
    question: PictureQuestion
    ticket: EmbeddingTicket
    calls: EmbeddingCalls

    async def ask(self, ticket: EmbeddingTicket | None = None) -> int | KvRelayError:
        """Its first token, of prefill-0, which has not seen the picture."""
        return await self.calls.first_token(self.question.prompt, ticket or self.ticket)


@pytest.fixture
async def ticketed(cluster: EncoderCluster) -> AsyncIterator[Ticketed]:
    """After the test nothing is left, and the next request is answered."""
    question = await asyncio.to_thread(new_question, cluster.target)
    async with EmbeddingCalls(cluster.encoders[0].address, cluster.prefill[0].address) as calls:
        [ticket] = await calls.encode(question.pictures)
        yield Ticketed(question, ticket, calls)
        if cluster.encoders[0].is_running:
            with contextlib.suppress(TicketRejectedError):  # of an earlier start
                await calls.release(ticket)
    await asyncio.to_thread(cluster.assert_nothing_held)


async def check_unharmed(cluster: EncoderCluster, question: PictureQuestion) -> None:
    """Nothing that a bad ticket brought is in a cache: all prefill workers are asked."""
    async with AsyncClient(cluster.target) as client:
        answers = await asyncio.gather(*(answer_or_error(client, question, 30) for _ in range(4)))
    for answer in answers:
        assert isinstance(answer, Answer), repr(answer)
        assert answer.token_ids == question.answer, "a wrong token"


def others(num_pictures: int) -> list[bytes]:
    return [as_bytes(draw_picture(64, 64, seed=10_000 + seed)) for seed in range(num_pictures)]


async def test_a_genuine_one_is_good_for_the_right_token(ticketed: Ticketed) -> None:
    assert await ticketed.ask() == ticketed.question.answer[0]
    assert not await ticketed.calls.release(ticketed.ticket), "prefill has released it"


async def test_a_replayed_one_is_read_as_long_as_the_item_is_there(ticketed: Ticketed, cluster: EncoderCluster) -> None:
    """By another prefill worker, after the pins were given back."""
    assert await ticketed.ask() == ticketed.question.answer[0]
    async with EmbeddingCalls(cluster.encoders[0].address, cluster.prefill[1].address) as calls:
        assert await calls.first_token(ticketed.question.prompt, ticketed.ticket) == ticketed.question.answer[0]


async def test_one_whose_item_was_evicted_is_lost(ticketed: Ticketed, cluster: EncoderCluster) -> None:
    assert await ticketed.calls.release(ticketed.ticket)
    await ticketed.calls.evict_all(others(NUM_TO_EVICT_ALL))
    error = await ticketed.ask()
    assert isinstance(error, EmbeddingLostError), repr(error)
    assert error.metadata["media"] == ticketed.ticket.content_hash.hex()
    await check_unharmed(cluster, ticketed.question)


async def test_one_of_an_earlier_start_is_lost(ticketed: Ticketed, cluster: EncoderCluster) -> None:
    await asyncio.to_thread(cluster.encoders[0].kill)
    await asyncio.to_thread(cluster.restart, cluster.encoders[0])
    error = await ticketed.ask()
    assert isinstance(error, (EmbeddingLostError, TicketRejectedError)), repr(error)
    with pytest.raises(TicketRejectedError):
        await ticketed.calls.release(ticketed.ticket)
    await check_unharmed(cluster, ticketed.question)


def flip_mac(ticket: EmbeddingTicket) -> None:
    ticket.hmac = bytes([ticket.hmac[0] ^ 1]) + ticket.hmac[1:]


def swap_blocks(ticket: EmbeddingTicket) -> None:
    for entries in (ticket.blocks.blocks, ticket.blocks.words):
        entries[0], entries[1] = entries[1], entries[0]


def change_word(ticket: EmbeddingTicket) -> None:
    ticket.blocks.words[0] ^= 1


def change_block(ticket: EmbeddingTicket) -> None:
    ticket.blocks.blocks[0] = 250


def far_block(ticket: EmbeddingTicket) -> None:
    ticket.blocks.blocks[0] = 10**6


def null_block(ticket: EmbeddingTicket) -> None:
    ticket.blocks.blocks[0] = 0


def rename(ticket: EmbeddingTicket) -> None:
    ticket.content_hash = bytes([ticket.content_hash[0] ^ 1]) + ticket.content_hash[1:]


def fewer_rows(ticket: EmbeddingTicket) -> None:
    ticket.num_tokens -= 16


def other_dtype(ticket: EmbeddingTicket) -> None:
    ticket.dtype = "bfloat16"


def stranger(ticket: EmbeddingTicket) -> None:
    ticket.source.address = "127.0.0.1:9"


def other_epoch(ticket: EmbeddingTicket) -> None:
    ticket.engine_epoch = bytes([ticket.engine_epoch[0] ^ 1]) + ticket.engine_epoch[1:]


ALTERED: tuple[Callable[[EmbeddingTicket], None], ...] = (
    flip_mac, swap_blocks, change_word, change_block, far_block, null_block, rename, fewer_rows, other_dtype, stranger,
    other_epoch,
)  # fmt: skip


@pytest.mark.parametrize("alter", ALTERED, ids=lambda alter: alter.__name__)
async def test_an_altered_one_is_refused(
    ticketed: Ticketed,
    cluster: EncoderCluster,
    alter: Callable[[EmbeddingTicket], None],
) -> None:
    altered = EmbeddingTicket()
    altered.CopyFrom(ticketed.ticket)
    alter(altered)
    error = await ticketed.ask(altered)
    refusals = (EmbeddingLostError, TicketRejectedError, MismatchError, InvalidRequestError)
    assert isinstance(error, refusals), repr(error)
    await check_unharmed(cluster, ticketed.question)
